"""The lean side of bge-onnx: embeds and reranks with artifacts that ``python -m export`` wrote.

Imports onnxruntime, tokenizers, numpy and the standard library, and nothing heavier.
"""

from runtime.checks import Limits
from runtime.embedder import Embedder
from runtime.errors import ArtifactError, BgeOnnxError, InputError, ProviderError, RunError
from runtime.hybrid import colbert_score, compute_lexical_matching_score, sparse_arrays, sparse_matrix
from runtime.manifest import verify_artifact
from runtime.metrics import prometheus_hook
from runtime.reranker import Reranker
from runtime.retriever import Hit, Retriever

__all__ = [
    "ArtifactError",
    "BgeOnnxError",
    "Embedder",
    "Hit",
    "InputError",
    "Limits",
    "ProviderError",
    "Reranker",
    "Retriever",
    "RunError",
    "colbert_score",
    "compute_lexical_matching_score",
    "prometheus_hook",
    "sparse_arrays",
    "sparse_matrix",
    "verify_artifact",
]
