"""This project: an artifact run by ``runtime``."""

from collections.abc import Sequence

from benchmarks.worker import Entries, Job, Run

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tokenizers", "numpy")
VARIANTS = {"embedder": ("fp32", "int8"), "sparse_embedder": ("fp32", "int8"), "reranker": ("fp32", "int8")}
PREPARED: dict[str, str] = {}


def embedder(job: Job) -> Run:
    """Texts grouped by exact length, whatever the batch size."""
    from runtime import Embedder

    model = Embedder(job.source, job.variant, device=job.device, threads=job.threads)
    return lambda texts, batch: model.encode(list(texts))


def sparse_embedder(job: Job) -> Run:
    """Texts grouped by exact length, whatever the batch size; a dict of weights for each."""
    import numpy as np

    from runtime import Embedder, sparse_arrays

    model = Embedder(job.source, job.variant, device=job.device, threads=job.threads)

    def run(texts: Sequence[str], batch: int) -> Entries:
        found = model.encode(list(texts), return_dense=False, return_sparse=True)["lexical_weights"]
        return lambda: np.vstack(
            [np.insert(np.column_stack(sparse_arrays(weights)), 0, i, axis=1) for i, weights in enumerate(found)]
        )

    return run


def reranker(job: Job) -> Run:
    """Pairs grouped by exact length, whatever the batch size."""
    import numpy as np

    from runtime import Reranker

    model = Reranker(job.source, job.variant, device=job.device, threads=job.threads)
    return lambda pairs, batch: np.array(model.compute_score([(q, p) for q, p in pairs]), np.float32)
