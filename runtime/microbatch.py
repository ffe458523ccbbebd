"""Concurrent small calls joined into one: each run takes what came while the one before was busy."""

import asyncio
import functools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from runtime.metrics import Hook
from runtime.pooling import Floats

TOGETHER = 256
"""Items that make a run full; a call with more queues piece by piece, so that it doesn't hold up the others."""
QUEUED = 1024
"""Calls that wait at once; further ones sleep until there is room."""

Item = TypeVar("Item")


class MicroBatcher(Generic[Item]):
    """Runs a function in a thread on the items of all that ``await`` it.

    Nothing waits for company: an idle function starts at once. Calls with other options than the oldest's wait for
    the next run. A call that is cancelled before its run costs nothing.
    """

    def __init__(self, run: Callable[..., Floats], hook: Hook) -> None:
        """Take the function and a hook for ``queue_seconds``.

        The function gets a list of items, the first one's number in its call for error messages (``first``) and the
        options, and gives a row for each item.
        """
        self._run, self._hook = run, hook
        self._queues: dict[tuple[int, asyncio.AbstractEventLoop], _Queue[Item]] = {}

    async def __call__(self, items: Sequence[Item], **options: Any) -> Floats:  # noqa: ANN401
        """A row for each item, in their order; raises what the function raised on these items."""
        here = os.getpid(), asyncio.get_running_loop()  # a forked child has its parent's loop, but not the thread
        queue = self._queues.get(here)
        if queue is None:  # loops of other threads may come and go meanwhile
            for other in list(self._queues):
                if other[1].is_closed():
                    self._queues.pop(other, None)
            queue = self._queues.setdefault(here, _Queue(self._run, self._hook))
        starts = range(0, len(items) or 1, TOGETHER)
        return np.concatenate([await queue.answer(items[i : i + TOGETHER], i, options) for i in starts])


@dataclass(frozen=True, slots=True, eq=False)
class _Call(Generic[Item]):
    items: Sequence[Item]
    first: int
    options: dict[str, Any]
    answer: asyncio.Future[tuple[Floats, float]]
    """A row for each item, and when their run began."""


class _Queue(Generic[Item]):
    """The calls of one event loop, first come, first served, and the thread that works them off."""

    def __init__(self, run: Callable[..., Floats], hook: Hook) -> None:
        self._run, self._hook = run, hook
        self._calls: deque[_Call[Item]] = deque()
        self._room = asyncio.Semaphore(QUEUED)
        self._thread = ThreadPoolExecutor(1, "bge-onnx")
        self._worker: asyncio.Task[None] | None = None

    async def answer(self, items: Sequence[Item], first: int, options: dict[str, Any]) -> Floats:
        since = time.perf_counter()
        async with self._room:
            call = _Call(items, first, options, asyncio.get_running_loop().create_future())
            if len(self._calls) == QUEUED:  # with cancelled ones, or there would be no room
                self._calls = deque(other for other in self._calls if not other.answer.cancelled())
            self._calls.append(call)
            # It ends when there is nothing left, so that a closing loop finds no task of ours.
            if self._worker is None or self._worker.done():
                self._worker = asyncio.create_task(self._work())
            rows, began = await call.answer
        self._hook("queue_seconds", began - since)
        return rows

    async def _work(self) -> None:
        calls: list[_Call[Item]] = []
        try:
            while calls := self._take():
                await self._serve(calls)
        except asyncio.CancelledError:  # the loop is ending; nobody may wait for ever
            for call in (*calls, *self._calls):
                call.answer.cancel()
            raise
        finally:
            self._worker = None

    def _take(self) -> list[_Call[Item]]:
        """The oldest calls with the same options, up to a full run."""
        taken: list[_Call[Item]] = []
        size = 0
        while self._calls and size < TOGETHER and (not taken or self._calls[0].options == taken[0].options):
            call = self._calls.popleft()
            if not call.answer.cancelled():
                taken.append(call)
                size += len(call.items)
        return taken

    async def _serve(self, calls: list[_Call[Item]]) -> None:
        items = [item for call in calls for item in call.items]
        loop, began = asyncio.get_running_loop(), time.perf_counter()
        run = functools.partial(self._run, items, first=calls[0].first, **calls[0].options)
        try:
            rows = await loop.run_in_executor(self._thread, run)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a panic of tokenizers' Rust code is no Exception
            if middle := len(calls) // 2:  # so that one caller's mistake is nobody else's
                await self._serve(calls[:middle])
                await self._serve(calls[middle:])
            elif not calls[0].answer.cancelled():
                calls[0].answer.set_exception(error)
            return
        start = 0
        for call in calls:
            if not call.answer.cancelled():
                call.answer.set_result((rows[start : start + len(call.items)], began))
            start += len(call.items)
