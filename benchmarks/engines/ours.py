"""This project: an artifact run by ``runtime``."""

from benchmarks.worker import Job, Run

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tokenizers", "numpy")
VARIANTS = {"embedder": ("fp32", "int8"), "reranker": ("fp32", "int8")}
PREPARED: dict[str, str] = {}


def embedder(job: Job) -> Run:
    """Texts grouped by exact length, whatever the batch size."""
    from runtime import Embedder

    model = Embedder(job.source, job.variant, device=job.device, threads=job.threads)
    return lambda texts, batch: model.encode(list(texts))


def reranker(job: Job) -> Run:
    """Pairs grouped by exact length, whatever the batch size."""
    import numpy as np

    from runtime import Reranker

    model = Reranker(job.source, job.variant, device=job.device, threads=job.threads)
    return lambda pairs, batch: np.array(model.compute_score([(q, p) for q, p in pairs]), np.float32)
