"""Work that several sessions do side by side, each in a thread."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import PriorityQueue
from typing import TypeVar

from runtime.session import Session

Given = TypeVar("Given")
Done = TypeVar("Done")


class Lanes:
    """Sessions that take one item each at a time, but one that is named twice takes two."""

    def __init__(self, sessions: Sequence[Session], *, lasting: bool = False) -> None:
        """Start no thread before there are several items.

        Args:
            sessions: What the work is done with.
            lasting: Whether the threads stay for further work, and all that there is at once shares the lanes.
        """
        self._sessions = tuple(sessions)
        self._lasting = ThreadPoolExecutor(len(self._sessions)) if lasting else None
        self._single = len(self._sessions) == 1 and not lasting
        if self._single:
            return  # a queue takes 2% of a query's time to make
        # The first free lane is taken, so that a few items go to as many sessions.
        self._free: PriorityQueue[int] = PriorityQueue()
        for lane in range(len(self._sessions)):
            self._free.put(lane)

    def side_by_side(self, work: Callable[[Session, Given], Done], items: Iterable[Given]) -> Iterator[Done]:
        """Of each item what the work makes of it, in order, with no more than two items a lane begun and not yielded.

        When it ends, however it does, nothing of it is running any more. Unless lanes are shared, a single one needs no
        thread, nor does a single item in a sequence.

        Args:
            work: Takes a session and an item.
            items: What is worked on; each is asked for when it is due.
        """
        if self._single or (not self._lasting and isinstance(items, Sequence) and len(items) < 2):
            yield from (work(self._sessions[0], item) for item in items)
            return
        begun: deque[Future[Done]] = deque()
        pool = self._lasting or ThreadPoolExecutor(len(self._sessions))
        try:
            for item in items:
                begun.append(pool.submit(self._take, work, item))
                if len(begun) == 2 * len(self._sessions):
                    wait([begun[0]])  # which stays there meanwhile, for who is interrupted
                    yield begun.popleft().result()
            while begun:
                wait([begun[0]])
                yield begun.popleft().result()
        finally:
            wait([future for future in begun if not future.cancel()])
            if not self._lasting:
                pool.shutdown()

    def _take(self, work: Callable[[Session, Given], Done], item: Given) -> Done:
        lane = self._free.get()
        try:
            return work(self._sessions[lane], item)
        finally:
            self._free.put(lane)
