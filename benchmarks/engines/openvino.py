"""OpenVINO: the stock export in fp32 and, where the CPU has it, bf16; and NNCF's int8 after calibration."""

import queue
from pathlib import Path
from typing import Any

from benchmarks.engines import plain
from benchmarks.worker import Job, Run

PACKAGES = ("openvino", "nncf", "tokenizers")
THROUGHPUT = "int8-throughput"
"""int8 with a stream a thread, which its manual advises for bulk work; the others have one stream on all threads."""
VARIANTS = {"embedder": ("fp32", "bf16", "int8", THROUGHPUT), "reranker": ("fp32", "bf16", "int8")}
PREPARED = {"fp32": "fp32", "bf16": "fp32", "int8": "int8", THROUGHPUT: "int8"}
CALIBRATION = Path(__file__).resolve().parents[2] / "export" / "texts" / "calibration.txt"
"""What our own int8 is calibrated on."""


def embedder(job: Job) -> Run:
    """Padded batches in the order they come; or sorted by length, side by side on a stream each."""
    if job.variant == THROUGHPUT:
        return plain.streamed(job, _compiled(job), job.threads)
    return plain.embedder(job, _compiled(job))


def reranker(job: Job) -> Run:
    """Padded batches in the order they come."""
    return plain.reranker(job, _compiled(job))


def prepare(job: Job) -> None:
    """Convert the stock export, and calibrate int8 on texts, or on each with the next as a pair."""
    import openvino

    model = openvino.Core().read_model(Path(job.stock) / "model.onnx")
    if job.variant == "int8":
        import nncf

        texts = [line for line in CALIBRATION.read_text("utf-8").splitlines() if line.strip()]
        inputs: list[Any] = texts if job.kind == "embedder" else list(zip(texts, texts[1:], strict=False))
        names, encode = {entry.any_name for entry in model.inputs}, plain.tokenize(job)
        dataset = nncf.Dataset([{k: v for k, v in encode([item]).items() if k in names} for item in inputs])
        model = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(inputs))
    openvino.save_model(model, Path(job.source) / "model.xml", compress_to_fp16=False)


def _compiled(job: Job) -> plain.Infer:
    import openvino

    core = openvino.Core()
    if job.variant == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("this CPU has no bf16")
    precision = {"INFERENCE_PRECISION_HINT": "bf16" if job.variant == "bf16" else "f32"}
    hint = {"PERFORMANCE_HINT": "LATENCY"}
    if job.variant == THROUGHPUT:
        hint = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": str(job.threads)}
    options = {"INFERENCE_NUM_THREADS": job.threads, **hint, **precision}
    model = core.compile_model(Path(job.source) / "model.xml", "CPU", options)
    names = {entry.any_name for entry in model.inputs}
    idle: queue.LifoQueue[Any] = queue.LifoQueue()  # a request serves one caller at a time

    def infer(feeds: dict[str, Any]) -> Any:  # noqa: ANN401
        try:
            request = idle.get_nowait()
        except queue.Empty:
            request = model.create_infer_request()
        found = request.infer({name: value for name, value in feeds.items() if name in names})[0].copy()
        idle.put(request)
        return found

    return infer
