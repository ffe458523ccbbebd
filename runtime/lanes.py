"""Work that several sessions do side by side, each in a thread."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
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
        self._free: SimpleQueue[Session] = SimpleQueue()
        for session in self._sessions:
            self._free.put(session)

    def side_by_side(self, work: Callable[[Session, Given], Done], items: Iterable[Given]) -> Iterator[Done]:
        """Of each item what the work makes of it, in order, with no more than two items a lane begun and not yielded.

        When it ends, however it does, nothing of it is running any more. A single lane needs no thread, nor does a
        single item in a sequence.

        Args:
            work: Takes a session and an item.
            items: What is worked on; each is asked for when it is due.
        """
        if len(self._sessions) == 1 or (isinstance(items, Sequence) and len(items) < 2):
            yield from (work(self._sessions[0], item) for item in items)
            return
        begun: deque[Future[Done]] = deque()
        pool = self._lasting or ThreadPoolExecutor(len(self._sessions))
        try:
            for item in items:
                begun.append(pool.submit(self._take, work, item))
                if len(begun) == 2 * len(self._sessions):
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            wait([future for future in begun if not future.cancel()])
            if not self._lasting:
                pool.shutdown()

    def _take(self, work: Callable[[Session, Given], Done], item: Given) -> Done:
        session = self._free.get()
        try:
            return work(session, item)
        finally:
            self._free.put(session)
