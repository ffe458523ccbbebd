"""The lean side of bge-onnx: embeds and reranks with artifacts that ``python -m export`` wrote.

Imports onnxruntime, tokenizers, numpy and the standard library, and nothing heavier.
"""

from runtime.embedder import Embedder
from runtime.errors import ArtifactError, BgeOnnxError, InputError, ProviderError
from runtime.hybrid import colbert_score, compute_lexical_matching_score, sparse_arrays, sparse_matrix
from runtime.reranker import Reranker
from runtime.retriever import Hit, Retriever

__all__ = [
    "ArtifactError",
    "BgeOnnxError",
    "Embedder",
    "Hit",
    "InputError",
    "ProviderError",
    "Reranker",
    "Retriever",
    "colbert_score",
    "compute_lexical_matching_score",
    "sparse_arrays",
    "sparse_matrix",
]
