"""Which texts run together, only those of exactly equal length so that nothing is padded, and on how many threads."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def plan_batches(lengths: Sequence[int] | NDArray[np.intp], max_tokens: int) -> list[NDArray[np.intp]]:
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
    if array.size == 1:  # the latency of a query
        return [np.zeros(1, np.intp)]
    order = np.argsort(-array, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(array[order])) + 1) if order.size else []
    batches = []
    for run in runs:
        size = max(1, max_tokens // max(1, int(array[run[0]])))
        batches += [run[start : start + size] for start in range(0, run.size, size)]
    return batches


def plan_threads(
    lengths: Sequence[int] | NDArray[np.intp], max_tokens: int, threads: int
) -> tuple[list[NDArray[np.intp]], list[NDArray[np.intp]]]:
    """Plan runs that take all threads, one after another, and runs of a thread each, side by side.

    A run on many threads waits for the slowest of them at every operator, one on its own thread never does. It has its
    share of the tokens, but a quarter of them however many threads there are; texts longer than that take all threads.

    Args:
        lengths: Tokens of each text.
        max_tokens: Most tokens in a run on all threads; a longer text runs alone.
        threads: Threads to use.

    Returns:
        The runs on all threads and those on one, as ``plan_batches`` gives them. There are none on one thread where
        they would leave a thread without any.
    """
    if threads == 1 or len(lengths) < threads:
        return plan_batches(lengths, max_tokens), []
    array = np.asarray(lengths, dtype=np.intp)
    share = max(max_tokens // threads, max_tokens // 4)
    (long,), (short,) = np.nonzero(array > share), np.nonzero(array <= share)
    narrow = plan_batches(array[short], min(share, max(1, int(array[short].sum()) // threads)))
    if len(narrow) < threads:
        return plan_batches(array, max_tokens), []
    return [long[places] for places in plan_batches(array[long], max_tokens)], [short[places] for places in narrow]
