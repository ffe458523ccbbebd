"""OpenVINO: the stock export in fp32 and, where the CPU has it, bf16; and NNCF's int8 after calibration."""

import threading
from pathlib import Path
from typing import Any

from benchmarks.engines import plain
from benchmarks.worker import Job, Run

PACKAGES = ("openvino", "nncf", "tokenizers")
VARIANTS = {"embedder": ("fp32", "bf16", "int8"), "reranker": ("fp32", "bf16", "int8")}
PREPARED = ("fp32", "bf16", "int8")
CALIBRATION = Path(__file__).resolve().parents[2] / "export" / "texts" / "calibration.txt"
"""What our own int8 is calibrated on."""


def embedder(job: Job) -> Run:
    """Padded batches in the order they come."""
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
    options = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY", **precision}
    model = core.compile_model(Path(job.source) / "model.xml", "CPU", options)
    names = {entry.any_name for entry in model.inputs}
    requests = threading.local()  # a request serves one caller at a time

    def infer(feeds: dict[str, Any]) -> Any:  # noqa: ANN401
        if not hasattr(requests, "own"):
            requests.own = model.create_infer_request()
        return requests.own.infer({name: value for name, value in feeds.items() if name in names})[0].copy()

    return infer
