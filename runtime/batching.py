"""Which texts run together: only those of exactly the same length, so that nothing is ever padded."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[NDArray[np.intp]]:
    """Group texts into runs of equal length.

    Padding costs in full on a CPU and larger batches gain little (``docs/decisions.md``), and without padding or a mask
    a text's vector can't depend on its neighbours.

    Args:
        lengths: Tokens of each text.
        max_tokens: Most tokens in a run; a longer text runs alone.

    Returns:
        Index arrays that together hold each of ``range(len(lengths))`` once, longest texts first, so that memory peaks
        at the start and the threads end together.
    """
    array = np.asarray(lengths, dtype=np.intp)
    order = np.argsort(-array, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(array[order])) + 1) if order.size else []
    batches = []
    for run in runs:
        size = max(1, max_tokens // max(1, int(array[run[0]])))
        batches += [run[start : start + size] for start in range(0, run.size, size)]
    return batches
