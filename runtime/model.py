"""What an embedder and a reranker share: an artifact opened on a device, and the one way to run its graph."""

import functools
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.batching import plan_threads
from runtime.checks import NO_LIMITS, Limits, check_count
from runtime.errors import ArtifactError, InputError
from runtime.manifest import TOKENIZER, Kind, Manifest, check_file, load_manifest
from runtime.metrics import Hook, ignore
from runtime.session import OPENING, PROVIDERS, Session, choose_device, create_session, run_session, usable_cpus
from runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_TOKENS_PER_RUN = 2048
"""Bounds memory: one run never holds more tokens, unless a single text does. More are no faster on a CPU.

A call with more tokens in all is bulk work."""

PREFERENCE = {"cpu": ("int8", "fp32"), "cuda": ("fp16", "fp32")}
"""What ``variant="auto"`` takes, first to last. Every variant has proven its parity at export."""

MAX_THREADS = 1024

Given = TypeVar("Given")
Done = TypeVar("Done")
Run = tuple[NDArray[np.intp], NDArray[np.int64], list[Any]]


@dataclass
class _Opened:
    """A model's sessions in one process.

    Attributes:
        process: Its number.
        session: Gives each run all threads.
        bulk: Gives each run one thread; None until there is bulk work, and where it can't be had.
        tried: Whether opening ``bulk`` was tried.
    """

    process: int
    session: Session
    bulk: Session | None = None
    tried: bool = False


class Model:
    """An exported model with one of its variants loaded.

    Safe to use from many threads at once, and after a fork: a session's threads don't live on in a child process,
    which therefore opens one of its own when it first needs it.

    Attributes:
        manifest: What the export recorded about the model.
        variant: The variant that was loaded, such as ``int8``.
        max_length: Tokens that are read of a text, or of a pair together, special tokens included.
    """

    KIND: ClassVar[Kind]

    def __init__(
        self,
        path: str | Path,
        variant: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        *,
        verify: bool = True,
        limits: Limits = NO_LIMITS,
        hook: Hook = ignore,
    ) -> None:
        """Load an artifact folder.

        Args:
            path: The folder that ``python -m export`` wrote.
            variant: ``fp32``, ``int8``, … or ``auto``: the fastest that the artifact has for the device.
            device: ``cpu``, ``cuda`` or ``auto``.
            threads: CPU threads for a run; by default all that the process may use. With 1, for many processes,
                texts are tokenised on one too.
            verify: Check the SHA-256 of every file that is loaded. False is for a service that starts often, from a
                folder that ``verify_artifact`` has checked since it was last written to.
            limits: What a call may ask for.
            hook: Gets what is counted (``runtime.metrics``).

        Raises:
            ArtifactError: The folder is not a whole, unaltered artifact of the kind, or lacks the variant.
            InputError: ``threads`` is no sensible number.
            ProviderError: The device can't be had.
        """
        self._folder, self._verify, self._limits, self._hook = Path(path), verify, limits, hook
        self.manifest = load_manifest(self._folder)
        if self.manifest.kind != self.KIND:
            raise ArtifactError(
                f"{path}: is of kind {self.manifest.kind}, not {self.KIND}; open it with {self.manifest.kind.title()}"
            )
        self._threads = usable_cpus() if threads is None else check_count("threads", threads, MAX_THREADS)
        self._device = choose_device(device)
        if device == "auto" and not _fitting(self.manifest, self._device):
            self._device = "cpu"
        self.variant = _choose_variant(self._folder, self.manifest, variant, self._device)
        self.max_length = self.manifest.max_length
        tokenizer = check_file(self._folder, self.manifest, TOKENIZER, digest=verify)
        self._tokenizer = Tokenizer(tokenizer, self.max_length, hook, parallel=self._threads > 1)
        self._opened: _Opened | None = _Opened(os.getpid(), self._open(self._threads, self._verify))

    def close(self) -> None:
        """Free the memory; calls that are running end well, later ones raise ``InputError``."""
        self._opened = None
        self.__dict__.pop("_together", None)  # the queue's thread ends with the calls that wait

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _open(self, threads: int, verify: bool) -> Session:
        loaded = self.manifest.variants[self.variant]
        if loaded.data:
            check_file(self._folder, self.manifest, loaded.data, digest=verify)
        graph = check_file(self._folder, self.manifest, loaded.file, digest=verify)
        session = create_session(graph, self._device, threads)
        for output in session.get_outputs():
            width = output.shape[-1]
            if output.name == "last_hidden_state" and isinstance(width, int) and width != self.manifest.dim:
                raise ArtifactError(
                    f"{self._folder}: its graph gives vectors of {width} dimensions, not {self.manifest.dim}; "
                    "export it again"
                )
        return session

    def _opened_here(self) -> _Opened:
        opened = self._opened  # another thread may close meanwhile
        if opened is None:
            raise InputError(f"the {self.KIND} {self.manifest.name} is closed; open it again")
        if opened.process != os.getpid():
            with OPENING:  # or each of its threads would open one
                if self._opened is opened:
                    logger.info("%s: opened again in a forked process", self._folder)
                    here = _Opened(os.getpid(), self._open(self._threads, self._verify))
                    if self._opened is opened:  # nor closed it
                        self._opened = here
            return self._opened_here()
        return opened

    def _bulk_session(self, opened: _Opened, tokens: int) -> Session | None:
        """The session with one thread a run, once a call had more tokens than a run has.

        Only int8 gets one: with two sessions it still has less than the memory of fp32 with one. It is of the very file
        that was loaded, or there is none: a folder that has changed since changes nothing.
        """
        if self.variant != "int8" or self._device != "cpu" or self._threads == 1:
            return None
        if tokens > MAX_TOKENS_PER_RUN and not opened.tried:
            opened.tried = True  # at once, so that other threads don't open it too; they go on without it meanwhile
            try:
                opened.bulk = self._open(1, verify=True)
            except ArtifactError as error:
                logger.warning("bulk work is slower, as the artifact is no longer what was loaded: %s", error)
        return opened.bulk

    def _run(
        self,
        outputs: Sequence[str],
        ids: Sequence[list[int]],
        types: Sequence[list[int]] | None = None,
        tokens: int = MAX_TOKENS_PER_RUN,
    ) -> Iterator[Run]:
        """Run texts, those of equal length together.

        Args:
            outputs: Names of the graph's outputs.
            ids: Token ids of each text; one without any is left out.
            types: Token types of each text; all 0 by default.
            tokens: Most tokens in a run.

        Yields:
            Of each run the places of its texts in ``ids``, their ids, int64 ``(n, tokens)``, and the outputs.
        """
        opened = self._opened_here()
        lengths = [len(row) for row in ids]
        bulk = self._bulk_session(opened, sum(lengths))
        wide, narrow = plan_threads(lengths, tokens, self._threads if bulk else 1)

        def run(session: Session, places: NDArray[np.intp]) -> tuple[Run, float]:
            rows = np.array([ids[i] for i in places], np.int64)
            row_types = None if types is None else np.array([types[i] for i in places], np.int64)
            start = time.perf_counter()
            found = run_session(session, outputs, rows, row_types) if rows.size else []
            return (places, rows, found), time.perf_counter() - start

        first = map(functools.partial(run, opened.session), wide)
        then = _side_by_side(functools.partial(run, bulk), narrow, self._threads) if bulk else ()
        for (places, rows, found), seconds in itertools.chain(first, then):
            if rows.size:
                self._hook("run_seconds", seconds)
                self._hook("batches", 1)
                self._hook("texts", len(rows))
                self._hook("tokens", rows.size)
                yield places, rows, found


def _side_by_side(work: Callable[[Given], Done], items: Sequence[Given], threads: int) -> Iterator[Done]:
    """Of each item what the work makes of it, in order, with no more than two items a thread begun and not yielded."""
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[Future[Done]] = deque()
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) == 2 * threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def _fitting(manifest: Manifest, device: str) -> list[str]:
    return [name for name, variant in manifest.variants.items() if PROVIDERS[device] in variant.providers]


def _choose_variant(folder: Path, manifest: Manifest, variant: str, device: str) -> str:
    fitting = _fitting(manifest, device)
    if variant == "auto":
        for name in (*PREFERENCE[device], *fitting):
            if name in fitting:
                return name
    elif variant in fitting:
        return variant
    wanted = PREFERENCE[device][-1] if variant == "auto" else variant
    raise ArtifactError(
        f"{folder}: no variant {variant!r} for {device}, only {', '.join(manifest.variants)}; "
        f"export it with --variants {wanted}"
    )
