"""From one vector per token to one per text, in numpy."""

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import Pooling

Floats = NDArray[np.float32]

POOLED = "sentence_embedding"
"""What a graph that pools gives instead of ``last_hidden_state``: each text's vector, float32 ``(n, dim)``."""


def pool(hidden: Floats, how: Pooling) -> Floats:
    """Pool the token vectors of texts of equal length.

    No mask is needed, since texts are never padded. Each row depends on its own text alone, to the bit.

    Args:
        hidden: Last hidden state, float32 ``(n, tokens, dim)``.
        how: As sentence-transformers' ``Pooling`` module names them.

    Returns:
        float32 ``(n, dim)``.
    """
    pooled: Floats
    match how:
        case "cls":
            pooled = hidden[:, 0]
        case "last_token":
            pooled = hidden[:, -1]
        case "max":
            pooled = hidden.max(axis=1)
        case "mean":
            pooled = hidden.mean(axis=1)
    return pooled


def normalize(vectors: Floats) -> Floats:
    """L2-normalise each row of a float32 ``(n, dim)``; a zero row stays zero (as ``torch.nn.functional.normalize``)."""
    norms = np.sqrt((vectors * vectors).sum(axis=-1, keepdims=True))
    scaled: Floats = vectors / np.maximum(norms, np.float32(1e-12))
    return scaled
