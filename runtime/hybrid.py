"""Sparse and multi-vector representations: made of a graph's outputs, converted for vector stores, and compared."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BgeOnnxError
from runtime.pooling import Floats, normalize

if TYPE_CHECKING:
    import scipy.sparse

LexicalWeights = dict[str, float]
"""Token id, as a str, to weight: what FlagEmbedding's ``BGEM3FlagModel`` calls ``lexical_weights``."""


def token_lexical_weights(ids: NDArray[np.int64], weights: Floats, skipped: Sequence[int]) -> list[LexicalWeights]:
    """The greatest weight that each token id of a text has (BGE-M3).

    Args:
        ids: int64 ``(n, tokens)``.
        weights: One per token, float32 ``(n, tokens)``.
        skipped: Ids that count for nothing, the special tokens.
    """
    found = []
    for row, values in zip(ids, weights, strict=True):
        kept = (values > 0) & ~np.isin(row, skipped)
        unique, place = np.unique(row[kept], return_inverse=True)
        best = np.zeros(len(unique), np.float32)
        np.maximum.at(best, place, values[kept])
        found.append(dict(zip(map(str, unique.tolist()), best.tolist(), strict=True)))
    return found


def vocabulary_lexical_weights(weights: Floats) -> list[LexicalWeights]:
    """The positive weights of a text among all token ids (SPLADE), float32 ``(n, vocabulary)``."""
    return [{str(i): float(row[i]) for i in np.flatnonzero(row > 0)} for row in weights]


def colbert_vectors(vectors: Floats) -> list[Floats]:
    """A unit vector for each token but the first, float32 ``(tokens - 1, dim)``, of float32 ``(n, tokens, dim)``."""
    return list(normalize(vectors[:, 1:]))


def sparse_arrays(weights: LexicalWeights) -> tuple[NDArray[np.int64], Floats]:
    """Indices, ascending, and values: what vector stores take as a sparse vector (Qdrant, Milvus, Pinecone)."""
    indices = np.array(sorted(map(int, weights)), np.int64)
    return indices, np.array([weights[str(i)] for i in indices.tolist()], np.float32)


def sparse_matrix(weights: Sequence[LexicalWeights], vocabulary: int) -> "scipy.sparse.csr_array":
    """The texts' weights as float32 ``(n, vocabulary)``, by scipy; ``BgeOnnxError`` if it isn't installed."""
    try:
        import scipy.sparse
    except ImportError:
        raise BgeOnnxError("sparse_matrix needs scipy; run: pip install scipy, or use sparse_arrays") from None

    rows = [sparse_arrays(row) for row in weights]
    starts = np.cumsum([0, *(len(indices) for indices, _ in rows)])
    empty = [(np.empty(0, np.int64), np.empty(0, np.float32))]
    indices, values = (np.concatenate(parts) for parts in zip(*(rows or empty), strict=True))
    return scipy.sparse.csr_array((values, indices, starts), shape=(len(weights), vocabulary))


def compute_lexical_matching_score(
    lexical_weights_1: LexicalWeights | Sequence[LexicalWeights],
    lexical_weights_2: LexicalWeights | Sequence[LexicalWeights],
) -> float | Floats:
    """The sum of products over shared token ids: a float for two texts, float32 ``(n, m)`` for two lists of texts."""
    if isinstance(lexical_weights_1, dict) and isinstance(lexical_weights_2, dict):
        return float(sum(weight * lexical_weights_2.get(token, 0.0) for token, weight in lexical_weights_1.items()))
    left = [lexical_weights_1] if isinstance(lexical_weights_1, dict) else lexical_weights_1
    right = [lexical_weights_2] if isinstance(lexical_weights_2, dict) else lexical_weights_2
    scores = [[compute_lexical_matching_score(a, b) for b in right] for a in left]
    return np.array(scores, np.float32).reshape(len(left), len(right))


def colbert_score(q_reps: Floats, p_reps: Floats) -> float:
    """The mean over a query's tokens of the best match among a passage's (late interaction, as FlagEmbedding).

    Args:
        q_reps: The query's vectors, float32 ``(tokens, dim)``.
        p_reps: The passage's vectors, float32 ``(tokens, dim)``.
    """
    return float((q_reps @ p_reps.T).max(axis=1).mean())
