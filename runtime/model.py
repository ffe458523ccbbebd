"""What an embedder and a reranker share: an artifact opened on a device, and the one way to run its graph."""

import contextlib
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.batching import plan_batches, plan_threads
from runtime.checks import NO_LIMITS, Limits, check_count
from runtime.errors import ArtifactError, InputError, ProviderError, RunError
from runtime.lanes import Lanes
from runtime.manifest import TOKENIZER, Kind, Manifest, Packing, check_file, load_manifest, real_folder
from runtime.metrics import Hook, ignore
from runtime.packing import Run, by_length, pack, plan_packed
from runtime.pooling import POOLED
from runtime.session import (
    OPENING,
    Gate,
    OutOfMemoryError,
    Session,
    choose_devices,
    create_session,
    provider_of,
    run_feeds,
    run_session,
    say_once,
    usable_cpus,
)
from runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_TOKENS_PER_RUN = 2048
"""Bounds memory: on a CPU one run never holds more tokens, unless a single text does. More are no faster."""
ENOUGH_TOKENS = 2048
"""With as many that can run side by side, a session for that is worth its memory, and opened."""
TOKENS_PER_THREAD = 512
"""The most that a run on a CPU has for each of its threads: what more of them hold between two operators leaves the
core's cache."""
CUDA_TOKENS_PER_RUN = 16_384
"""What ``MAX_TOKENS_PER_RUN`` is on a GPU, where a run of few tokens takes as long as one of many."""
PACKED_TOKENS_PER_RUN = 32_768
"""The same for a packed graph."""
IN_FLIGHT = 3
"""Packed runs that a GPU is given at once, so that it goes on with one while others' results are fetched."""
CROWDED = 0.01
"""Seconds for which calls count as crowded after several were: they come again, and not always at once."""
PIECE = 4096
"""Texts that are tokenised at once: their ids take ten times the memory of their vectors."""
AHEAD = 256
"""The same for a packed graph on a GPU, which is busy with those before meanwhile."""

PREFERENCE = {"cpu": ("int8", "fp32"), "cuda": ("fp16", "fp32")}
"""What ``variant="auto"`` takes, first to last. Each has proven its parity at export, fp16 at least in fp32."""

MAX_THREADS = 1024

Given = TypeVar("Given")


class Batch(NamedTuple):
    """Texts that run together."""

    places: NDArray[np.intp]
    """Where they are among all of the call."""
    ids: list[list[int]]
    types: list[list[int]] | None
    """Token types; all 0 by default."""
    feeds: dict[str, NDArray[Any]] | None = None
    """What a packed graph takes of them, once it is made."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of a call's texts or pairs, tokenised."""

    ids: Sequence[list[int]]
    types: Sequence[list[int]] | None = None
    """Token types; all 0 by default."""
    start: int = 0
    """The first one's place in the call."""


@dataclass
class _Opened:
    """A model's sessions in one process.

    Attributes:
        process: Its number.
        sessions: One for each device; on a CPU it gives each run all threads.
        lanes: On GPUs, what all calls of more than one run share.
        narrow: Gives each run one thread; None until it is needed, and where it can't be had.
        tried: Whether opening ``narrow`` was tried.
        apart: Tokens of runs that could have been side by side, of all calls; it may miss some of calls at once.
        small: The calls of few tokens that are running.
        crowded: Until when (``time.perf_counter``) they count as too many for runs on all threads.
        gate: What runs go through.
    """

    process: int
    sessions: tuple[Session, ...]
    lanes: Lanes | None = None
    narrow: Session | None = None
    tried: bool = False
    apart: int = 0
    small: set[object] = field(default_factory=set)
    crowded: float = 0.0
    gate: Gate = field(default_factory=Gate)


class Model:
    """An exported model with one of its variants loaded.

    Safe to use from many threads at once, and after a fork: a session's threads don't live on in a child process,
    which therefore opens one of its own when it first needs it.

    Attributes:
        manifest: What the export recorded about the model.
        variant: The variant that was loaded, such as ``int8``.
    """

    KIND: ClassVar[Kind]

    def __init__(
        self,
        path: str | Path,
        variant: str = "auto",
        device: str | Sequence[str] = "auto",
        threads: int | None = None,
        *,
        max_length: int | None = None,
        verify: bool = True,
        limits: Limits = NO_LIMITS,
        hook: Hook = ignore,
    ) -> None:
        """Load an artifact folder.

        Args:
            path: The folder that ``python -m export`` wrote.
            variant: ``fp32``, ``int8``, … or ``auto``: the fastest that the artifact has for the device.
            device: ``cpu``, ``cuda``, ``cuda:1``, …; a list of GPUs, which share the work of a call; or ``auto``: the
                first GPU where there is one, else the CPU.
            threads: CPU threads for a run; by default all that the process may use. With 1, for many processes,
                texts are tokenised on one too.
            max_length: Read no more tokens of a text, or of a pair together; by default as many as the model was made
                for (FlagEmbedding reads 512 of a pair).
            verify: Check the SHA-256 of every file that is loaded. False is for a service that starts often, from a
                folder that ``verify_artifact`` has checked since it was last written to.
            limits: What a call may ask for.
            hook: Gets what is counted (``runtime.metrics``).

        Raises:
            ArtifactError: The folder is not a whole, unaltered artifact of the kind, or lacks the variant.
            InputError: ``threads`` or ``max_length`` is no sensible number.
            ProviderError: The device can't be had.
            RunError: There isn't enough memory.
        """
        self._folder = real_folder(path)  # where a session that is opened later finds the same, too
        self._verify, self._limits, self._hook = verify, limits, hook
        self._turns = itertools.count()
        self.manifest = load_manifest(self._folder)
        if self.manifest.kind != self.KIND:
            raise ArtifactError(
                f"{path}: is of kind {self.manifest.kind}, not {self.KIND}; open it with {self.manifest.kind.title()}"
            )
        self._threads = usable_cpus() if threads is None else check_count("threads", threads, MAX_THREADS)
        longest = self.manifest.max_length
        length = longest if max_length is None else check_count("max_length", max_length, longest)
        tokenizer = check_file(self._folder, self.manifest, TOKENIZER, digest=verify)
        self._tokenizer = Tokenizer(tokenizer, length, hook, parallel=self._threads > 1)
        self._devices = choose_devices(device)
        wanted = {variant} & set(self.manifest.variants) or set(self.manifest.variants)
        if device == "auto" and wanted.isdisjoint(_fitting(self.manifest, self._devices[0])):
            self._devices = ("cpu",)
        self._opened: _Opened | None
        try:
            self._choose(variant)
        except (ProviderError, OutOfMemoryError) as error:
            if device != "auto" or not self._on_gpu:
                raise
            say_once(f"running on the CPU: {error}")
            self._devices = ("cpu",)
            self._choose(variant)

    def _choose(self, variant: str) -> None:
        """Open a variant on the devices."""
        self.variant = _choose_variant(self._folder, self.manifest, variant, self._devices[0])
        on_gpu = PACKED_TOKENS_PER_RUN if self._packing else CUDA_TOKENS_PER_RUN
        self._tokens = on_gpu if self._on_gpu else MAX_TOKENS_PER_RUN
        self._opened = self._open_all(self._verify)
        # Whether the graph pools itself: by one token, or packed.
        self._pools = any(output.name == POOLED for output in self._opened.sessions[0].get_outputs())

    @property
    def max_length(self) -> int:
        """Tokens that are read of a text, or of a pair together, special tokens included."""
        return self._tokenizer.max_length

    @property
    def _on_gpu(self) -> bool:
        return self._devices != ("cpu",)

    @property
    def _splits(self) -> bool:
        """Whether runs may have a thread each: only int8's, which with two sessions has less than fp32's memory."""
        return self.variant == "int8" and self._threads > 1

    @property
    def _packing(self) -> Packing | None:
        return self.manifest.variants[self.variant].packing

    def close(self) -> None:
        """Free the memory; runs that are under way end well, and all that would come later raises ``InputError``.

        So does what is left of a call that takes several, such as ``encode_iter`` or ``aencode`` of many texts.
        """
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

    def _open_all(self, verify: bool) -> _Opened:
        sessions = tuple(self._open(device, self._threads, verify) for device in self._devices)
        # Of graphs that aren't ours, operators may be upset by two runs at once, of whichever calls.
        each = IN_FLIGHT if self._packing else 1
        return _Opened(os.getpid(), sessions, Lanes(sessions * each, lasting=True) if self._on_gpu else None)

    def _open(self, device: str, threads: int, verify: bool) -> Session:
        loaded = self.manifest.variants[self.variant]
        if loaded.data:
            check_file(self._folder, self.manifest, loaded.data, digest=verify)
        graph = check_file(self._folder, self.manifest, loaded.file, digest=verify)
        session = create_session(graph, device, threads)
        for output in session.get_outputs():
            width = output.shape[-1]
            dense = output.name in ("last_hidden_state", POOLED)
            if dense and isinstance(width, int) and width != self.manifest.dim:
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
            if self._on_gpu:
                raise ProviderError(
                    f"{self._folder}: CUDA can't be used in a forked process; start it with multiprocessing's spawn"
                )
            with OPENING:  # or each of its threads would open one
                if self._opened is opened:
                    logger.info("%s: opened again in a forked process", self._folder)
                    here = self._open_all(self._verify)
                    if self._opened is opened:  # nor closed it
                        self._opened = here
            return self._opened_here()
        return opened

    def _narrow_session(self, opened: _Opened, needed: bool) -> Session | None:
        """The session with one thread a run, once it was needed, if runs may have one.

        It is of the very file that was loaded, or there is none: a folder that has changed since changes nothing.
        """
        if not self._splits:
            return None
        if needed and not opened.tried:
            opened.tried = True  # at once, so that other threads don't open it too; they go on without it meanwhile
            try:
                opened.narrow = self._open("cpu", 1, verify=True)
            except (ArtifactError, RunError) as error:
                logger.warning("bulk work is slower, as the model can't be opened a second time: %s", error)
        return opened.narrow

    def _run(self, outputs: Sequence[str], pieces: Iterable[Piece], tokens: int | None = None) -> Iterator[Run]:
        """Run texts: packed, or those of equal length together.

        Args:
            outputs: Names of the graph's outputs.
            pieces: Token ids of some texts, of which one without any is left out, and perhaps their token types, which
                are 0 by default. On a GPU the next piece is asked for while the one before is running.
            tokens: Most tokens in a run; by default what suits the device.

        Yields:
            Of texts of equal length their places among all, their ids, int64 ``(n, tokens)``, and the outputs. Without
            outputs of tokens a packed run is yielded whole, and with no ids.
        """
        opened, call = self._opened_here(), object()
        work = functools.partial(self._run_batch, outputs, opened.gate)
        plans: Iterable[tuple[Lanes, Iterable[Batch]]]
        if self._on_gpu:
            due = self._gpu_batches(pieces, tokens)
            plans = [self._gpu_plan(opened, list(due) if isinstance(pieces, list) else due)]
        else:
            plans = itertools.chain.from_iterable(self._cpu_plans(opened, call, piece, tokens) for piece in pieces)
        opened.small.add(call)
        try:
            for lanes, batches in plans:
                for runs, seconds, total in lanes.side_by_side(work, batches):
                    self._hook("run_seconds", seconds)
                    self._hook("batches", 1)
                    self._hook("texts", sum(len(places) for places, _, _ in runs))
                    self._hook("tokens", total)
                    yield from runs
        finally:
            self._note_crowd(opened)  # that it lasted until now
            opened.small.discard(call)

    def _cpu_plans(
        self, opened: _Opened, call: object, piece: Piece, tokens: int | None
    ) -> Iterator[tuple[Lanes, list[Batch]]]:
        """Batches, and the lanes that take them."""
        texts = _texts(piece)
        if self._packing:
            yield Lanes(opened.sessions), self._planned([texts], tokens)
            return
        lengths, most = _lengths(texts), self._most(tokens)
        total = int(lengths.sum())
        if total > TOKENS_PER_THREAD:
            opened.small.discard(call)
        # A run on all threads would wait at each operator for those of the other calls.
        self._note_crowd(opened)
        crowded = call in opened.small and time.perf_counter() < opened.crowded
        most_on_all = min(most, TOKENS_PER_THREAD * self._threads)
        on_all, on_one = plan_threads(lengths, most_on_all, self._threads if self._splits else 1)
        opened.apart += sum(int(lengths[places].sum()) for places in on_one)
        narrow = self._narrow_session(opened, crowded or opened.apart > ENOUGH_TOKENS)
        if narrow and crowded:
            yield Lanes((narrow,)), _parts(texts, plan_batches(lengths, most))
            return
        if on_one and not narrow:
            on_all = plan_batches(lengths, most_on_all)
        yield Lanes(opened.sessions), _parts(texts, on_all)
        if narrow:
            yield Lanes((narrow,) * self._threads), _parts(texts, on_one)

    def _note_crowd(self, opened: _Opened) -> None:
        """Note when there are as many small calls as threads."""
        if len(opened.small) >= self._threads:
            opened.crowded = time.perf_counter() + CROWDED

    def _gpu_plan(self, opened: _Opened, batches: Iterable[Batch]) -> tuple[Lanes, Iterable[Batch]]:
        """The batches, packed when they are due, and the lanes that take them.

        They are packed by who waits for the results, so that a lane whose run ends goes on with the next at once.
        """
        if self._packing and isinstance(batches, list) and len(batches) < 2:
            # A single run waits for no other call's, and the GPUs take turns.
            return Lanes((opened.sessions[next(self._turns) % len(opened.sessions)],)), batches
        assert opened.lanes

        def packed(batch: Batch) -> Batch:
            with contextlib.suppress(MemoryError):  # the lane tries again, and halves it
                return self._packed(batch)
            return batch

        return opened.lanes, map(packed, batches)

    def _packed(self, batch: Batch) -> Batch:
        """With what a packed graph takes."""
        if not self._packing or batch.feeds:
            return batch
        return batch._replace(feeds=pack(batch.ids, batch.types, self._packing.padding_id))

    def _gpu_batches(self, pieces: Iterable[Piece], tokens: int | None) -> Iterator[Batch]:
        """Batches of a piece after the other, each planned when it is due.

        What is left of a piece and would fill less than half a packed run goes with the next, but of the first, for
        which the GPU waits.
        """
        waiting: list[Batch] = []
        least = 0
        for piece in pieces:
            waiting.append(_texts(piece))
            if sum(map(_total, waiting)) >= least:
                batches = self._planned(waiting, tokens)
                waiting = [batches.pop()] if batches and _total(batches[-1]) < least else []
                yield from batches
                least = self._most(tokens) // 2 if self._packing else 0
        if waiting:
            yield from self._planned(waiting, tokens)

    def _planned(self, waiting: Sequence[Batch], tokens: int | None) -> list[Batch]:
        """What waits, in batches of no more tokens than a run may have."""
        texts, plan = _joined(waiting), plan_packed if self._packing else plan_batches
        return _parts(texts, plan(_lengths(texts), self._most(tokens)))

    def _most(self, tokens: int | None) -> int:
        """Most tokens in a run, of which a caller may want no more than so many."""
        return min(tokens or self._tokens, self._tokens)

    def _run_batch(
        self, outputs: Sequence[str], gate: Gate, session: Session, batch: Batch
    ) -> tuple[list[Run], float, int]:
        """Run a batch; one that is too much at once, in halves, down to a text that has all of the model's memory.

        Returns:
            What ``_run`` yields of it, the seconds it took, and its tokens.
        """
        total, start = _total(batch), time.perf_counter()
        runs: list[Run] | None = None
        if len(batch.ids) == 1 or total <= self._tokens:  # which may have been halved since this was planned
            try:
                with gate.entered():
                    runs = self._run_whole(outputs, session, batch, total)
            except (OutOfMemoryError, MemoryError):
                if len(batch.ids) == 1:
                    with gate.entered(alone=True):
                        runs = self._run_alone(outputs, session, batch, total)
                else:
                    if total > self._tokens // 2:
                        self._tokens = min(self._tokens, max(total // 2, MAX_TOKENS_PER_RUN // 4))
                    say_once(f"{self._folder}: runs are halved, since one lacked memory")
        if runs is None:
            runs = []
            for half in _parts(batch, np.split(np.arange(len(batch.ids)), [len(batch.ids) // 2])):
                runs += self._run_batch(outputs, gate, session, half)[0]
        return runs, time.perf_counter() - start, total

    def _run_alone(self, outputs: Sequence[str], session: Session, text: Batch, total: int) -> list[Run] | None:
        """Run a text that lacked memory once more, while no other of this model is, and again with what that gave back.

        Raises:
            OutOfMemoryError: It lacks memory all the same.
        """
        with contextlib.suppress(OutOfMemoryError, MemoryError):
            return self._run_whole(outputs, session, text, total, shrink=True)
        try:
            return self._run_whole(outputs, session, text, total)
        except MemoryError as error:
            raise OutOfMemoryError(str(error) or f"no memory for {total} tokens; free some") from None

    def _run_whole(
        self, outputs: Sequence[str], session: Session, batch: Batch, total: int, *, shrink: bool = False
    ) -> list[Run] | None:
        """Run a batch at once, and perhaps ``shrink`` what memory the session holds; None if its texts must run apart.

        Raises:
            OutOfMemoryError: It lacks memory.
            RunError: It fails otherwise, or a text is beyond fp16's range.
        """
        places, rows, types, feeds = self._packed(batch)
        if feeds is None:
            held = np.array(rows, np.int64)
            self._check_known(held)
            held_types = None if types is None else np.array(types, np.int64)
            return [(places, held, run_session(session, outputs, held, held_types, shrink=shrink))]
        self._check_known(feeds["input_ids"])
        found = run_feeds(session, outputs, feeds, f"{len(rows)} texts of {total} tokens", shrink=shrink)
        if not all(np.isfinite(values).all() for values in found):  # one text's in mean pooling are every text's
            if len(places) > 1:
                return None
            raise RunError(
                f"{self._folder}: {self._tokenizer.beginning(rows[0])!a} is beyond the range of {self.variant}; "
                "pass variant='fp32' for it, or export the model without fp16"
            )
        return by_length(outputs, found, places, rows)

    def _check_known(self, ids: NDArray[Any]) -> None:
        """On a GPU, raise ``ArtifactError`` on a token id that the graph doesn't know; on a CPU its run does."""
        vocab = self.manifest.vocab
        if self._on_gpu and vocab and ids.max() >= vocab:
            raise ArtifactError(
                f"{self._folder}: token id {ids.max()} is not in the graph's vocabulary of {vocab}; tokenizer.json and "
                "the graph don't belong together, export the model again"
            )

    def _ahead(
        self, items: Sequence[Given], encode: Callable[[Sequence[Given], int, list[int] | None], Piece]
    ) -> Iterable[Piece]:
        """Tokenise what there is, a lot of it piece by piece; for a GPU, the next while it is busy with the one before.

        Args:
            items: Texts or pairs.
            encode: Tokenises some of them, of which the first has this place, and says how many are cut.
        """
        most = AHEAD if self._on_gpu and self._packing else PIECE
        if len(items) <= most:
            return [encode(items, 0, None)]
        # Of the first, for which a GPU waits, there are half as many.
        edges = [0, *range(most // 2 if self._on_gpu else most, len(items), most), len(items)]
        cut: list[int] = []
        parts = ((items[start:end], start, cut) for start, end in itertools.pairwise(edges))

        def pieces() -> Iterator[Piece]:
            if not self._on_gpu:
                yield from itertools.starmap(encode, parts)
            else:
                with ThreadPoolExecutor(1) as thread:
                    following = thread.submit(encode, *next(parts))
                    for part in parts:
                        piece = following.result()
                        following = thread.submit(encode, *part)
                        yield piece
                    yield following.result()
            self._tokenizer.warn("pair" if self.KIND == "reranker" else "text", sum(cut), len(items))

        return pieces()


def _texts(piece: Piece) -> Batch:
    """The texts of a piece that have any tokens: only tokenizers without special tokens give none."""
    chosen = [i for i, ids in enumerate(piece.ids) if ids]
    types = None if piece.types is None else [piece.types[i] for i in chosen]
    return Batch(np.array(chosen, np.intp) + piece.start, [piece.ids[i] for i in chosen], types)


def _joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one call as one; all have token types or none has."""
    types = None if batches[0].types is None else [row for batch in batches for row in batch.types or ()]
    return Batch(np.concatenate([batch.places for batch in batches]), [row for b in batches for row in b.ids], types)


def _total(batch: Batch) -> int:
    return sum(map(len, batch.ids))


def _lengths(batch: Batch) -> NDArray[np.intp]:
    return np.array([len(ids) for ids in batch.ids], np.intp)


def _parts(batch: Batch, plan: Sequence[NDArray[np.intp]]) -> list[Batch]:
    """A batch as planned."""
    places, rows, types, _ = batch
    return [
        Batch(places[part], [rows[i] for i in part], None if types is None else [types[i] for i in part])
        for part in plan
    ]


def _fitting(manifest: Manifest, device: str) -> list[str]:
    return [name for name, variant in manifest.variants.items() if provider_of(device) in variant.providers]


def _choose_variant(folder: Path, manifest: Manifest, variant: str, device: str) -> str:
    fitting, preferred = _fitting(manifest, device), PREFERENCE[device.partition(":")[0]]
    if variant == "auto":
        for name in (*preferred, *fitting):
            if name in fitting:
                return name
    elif variant in fitting:
        return variant
    wanted = preferred[-1] if variant == "auto" else variant
    if wanted in manifest.variants:
        others = f", only {', '.join(fitting)} does" if fitting else ""
        raise ArtifactError(f"{folder}: its {wanted} doesn't run on {device}{others}; pass another variant or device")
    raise ArtifactError(
        f"{folder}: no variant {variant!r} for {device}, only {', '.join(manifest.variants)}; "
        f"export it with --variants {wanted}"
    )
