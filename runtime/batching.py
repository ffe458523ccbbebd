"""Which texts run together, only those of exactly equal length so that nothing is padded, and on how many threads."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEAST = 128
"""Tokens of a run on one thread below which each takes noticeably more time."""


def plan_batches(
    lengths: Sequence[int] | NDArray[np.intp], max_tokens: int, threads: int = 1
) -> list[NDArray[np.intp]]:
    """Group texts into runs of equal length.

    Padding costs in full on a CPU and larger batches gain little (``docs/decisions.md``), and without padding or a mask
    a text's vector can't depend on its neighbours.

    Args:
        lengths: Tokens of each text.
        max_tokens: Most tokens in a run; a longer text runs alone.
        threads: How many take runs side by side. So that they end together, a run has no more than a thread's part of
            the tokens that are left, or ``LEAST`` (guided self-scheduling, Polychronopoulos and Kuck 1987).

    Returns:
        Index arrays that together hold each of ``range(len(lengths))`` once, longest texts first, so that memory peaks
        at the start and the threads end together.
    """
    if len(lengths) == 1:  # the latency of a query
        return [np.zeros(1, np.intp)]
    array = np.asarray(lengths, dtype=np.intp)
    order = np.argsort(-array, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(array[order])) + 1, array.size)  # of the texts of each length
    costs = np.maximum(array[order], 1).tolist()
    batches, start, left = [], 0, sum(costs)
    least = min(LEAST, left // threads)
    for end in ends.tolist():
        while start < end:
            tokens = min(max_tokens, max(left // threads, least))
            stop = min(end, start + max(1, tokens // costs[start]))
            batches.append(order[start:stop])
            left -= (stop - start) * costs[start]
            start = stop
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
    narrow = plan_batches(array[short], share, threads)
    if len(narrow) < threads:
        return plan_batches(array, max_tokens), []
    return [long[places] for places in plan_batches(array[long], max_tokens)], [short[places] for places in narrow]
