"""optimum's export, as it is, optimised (O3), and after ONNX Runtime's ``quantize_dynamic``, in a plain pipeline."""

from pathlib import Path
from typing import Any

from benchmarks.engines import plain
from benchmarks.worker import Job, Run

PACKAGES = ("optimum-onnx", "optimum", "transformers", "onnxruntime", "tokenizers")
SCHEDULED = "int8-scheduled"
"""The stock int8 graph under our scheduling: what is then still between it and ours is the graph."""
OPTIMISED = "fp32-o3"
VARIANTS = {"embedder": ("fp32", OPTIMISED, "int8", SCHEDULED), "reranker": ("fp32", "int8")}
PREPARED = {"fp32": "fp32", OPTIMISED: OPTIMISED, "int8": "int8", SCHEDULED: "int8"}


def embedder(job: Job) -> Run:
    """Padded batches in the order they come; or texts of equal length on a session with a thread for each."""
    if job.variant == SCHEDULED:
        return plain.scheduled(job, _session(job, job.threads), _session(job, 1))
    return plain.embedder(job, _session(job, job.threads))


def reranker(job: Job) -> Run:
    """Padded batches in the order they come."""
    return plain.reranker(job, _session(job, job.threads))


def prepare(job: Job) -> None:
    """Export; optimise or quantise what was exported. Every engine that loads a stock ONNX file starts from fp32."""
    if job.variant == "int8":
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(Path(job.stock) / "model.onnx", Path(job.source) / "model.onnx", per_channel=True)
        return
    if job.variant == OPTIMISED:
        from optimum.onnxruntime import AutoOptimizationConfig, ORTOptimizer

        optimizer = ORTOptimizer.from_pretrained(job.stock, ["model.onnx"])
        optimizer.optimize(AutoOptimizationConfig.O3(), job.source, file_suffix="")
        return
    from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTModelForSequenceClassification
    from transformers import AutoTokenizer

    kind = ORTModelForFeatureExtraction if job.kind == "embedder" else ORTModelForSequenceClassification
    kind.from_pretrained(job.checkpoint, export=True).save_pretrained(job.source)
    tokenizer = AutoTokenizer.from_pretrained(job.checkpoint)
    tokenizer.model_max_length = job.max_length  # some checkpoints' tokenizers allow more than the model was made for
    tokenizer("a text", padding=True, truncation=True)  # so that tokenizer.json says how to pad
    tokenizer.save_pretrained(job.source)


def _session(job: Job, threads: int) -> plain.Infer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        str(Path(job.source) / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = {entry.name for entry in session.get_inputs()}

    def infer(feeds: dict[str, Any]) -> Any:  # noqa: ANN401
        return session.run(None, {name: value for name, value in feeds.items() if name in names})[0]

    return infer
