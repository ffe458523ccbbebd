"""Retrieve, then rerank: texts found by vector, the best of them sorted by a reranker."""

import ctypes
import dataclasses
import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from runtime.checks import check_count, check_iterable, check_texts
from runtime.embedder import Embedder
from runtime.errors import ArtifactError, BgeOnnxError, InputError
from runtime.manifest import real_folder
from runtime.pooling import normalize
from runtime.reranker import Reranker, _best

logger = logging.getLogger(__name__)

TEXTS = "texts.sqlite"
VECTORS = "vectors.{}.usearch"
CHUNK = 1024
"""Texts that are embedded and added at once."""
SCHEMA = """
PRAGMA journal_mode = WAL;  -- others may read while one adds
CREATE TABLE IF NOT EXISTS texts (key INTEGER PRIMARY KEY, id TEXT UNIQUE, text TEXT, vector INTEGER);
CREATE INDEX IF NOT EXISTS texts_of_a_vector ON texts (vector);
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT);
"""
NEXT = """
SELECT MAX((SELECT COALESCE(MAX(key), -1) + 1 FROM texts),
           COALESCE((SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'next'), 0))
"""
"""The first key that never was a text's; by default, its text is called after it."""
NEAREST = """
SELECT vector, texts.id, text FROM json_each(?) AS found JOIN texts ON vector = found.value
ORDER BY found.key, texts.key LIMIT ?
"""
"""Of vectors, nearest first, the first texts; none of a vector that a change which failed has left without its text."""
MOST = 10_000
"""Most results of a search."""
PATIENCE = 5.0
"""Seconds for which a change waits until another process has saved its own, and a save for those that read."""
OPEN: "weakref.WeakSet[Retriever]" = weakref.WeakSet()
"""All that are open in this process."""
INHERITED: set[Path] = set()
"""Folders that were open when this process was forked."""
FORKED = (
    "{}: opened before a fork; open the retriever in each process, after the fork, and close it before (or start the "
    "process with multiprocessing's spawn)"
)


def _leave() -> None:
    """Keep a forked child from ever closing its parent's connections, which SQLite forbids: changes may be undone."""
    for retriever in list(OPEN):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(retriever._texts))
        INHERITED.add(retriever.folder)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave)


@dataclass(frozen=True, slots=True)
class Hit:
    """A text that was found."""

    id: str
    text: str
    score: float
    """Cosine of its vector with the query's."""
    rerank_score: float | None = None
    """The reranker's raw logit; None before, or without, reranking."""


class Retriever:
    """A folder of texts and their vectors, searched in two stages. Safe to use from many threads at once.

    Vectors are held by usearch (an HNSW graph, float16), texts by SQLite. Texts of equal vectors, as equal texts have
    them on a CPU, share one, since several, nearest to each other, would leave others without a way there. What was
    added is lost unless ``save`` is called; a crash at any moment leaves what the last ``save`` left. Of several
    processes that have the folder open, one may add at a time, until it saves; the others then load anew what it saved,
    with their next call. Open the folder after a fork, in each process: SQLite's locks don't outlive one, so a folder
    that was open before it can be opened in no child. A folder that can't be written to can be searched while nobody
    else writes there.

    Who uses usearch as well imports it after ``runtime``: onnxruntime can't be imported after it.
    """

    def __init__(self, folder: str | Path, embedder: Embedder, reranker: Reranker | None = None) -> None:
        """Open a folder, or start a new one.

        Args:
            folder: Where ``save`` writes.
            embedder: Turns texts and queries into vectors; the same model each time the folder is opened.
            reranker: Sorts what was found; without one, the order is the vectors'.

        Raises:
            ArtifactError: The folder's files are damaged, or were made with another model.
            BgeOnnxError: usearch isn't installed.
            InputError: The folder was open when this process was forked.
        """
        if not isinstance(embedder, Embedder) or not isinstance(reranker, Reranker | None):
            given = f"{type(embedder).__name__} and {type(reranker).__name__}"
            raise InputError(f"a Retriever takes an Embedder and a Reranker, not {given}; open them first")
        try:
            from usearch.index import Index
        except ImportError as error:
            raise BgeOnnxError(f"usearch can't be imported ({error}); run: pip install 'bge-onnx[retrieve]'") from None
        self.folder = real_folder(folder)
        self._embedder, self._reranker = embedder, reranker
        self._model = json.dumps(embedder.manifest.source.checksums, sort_keys=True)
        self._new_index = partial(Index, ndim=embedder.dim, metric="cos", dtype="f16")
        self._writing, self._lock = threading.Lock(), threading.Lock()  # taken in this order
        self._searches = threading.Condition(self._lock)  # never notified: who waits a while lets them through
        self._dirty = False
        """Whether there is something to save."""
        self._saving = ""
        """The index that the last ``save`` names, until something else is changed."""
        self._file: str | None = ""
        """The index that is held, of the folder's; None of an empty folder."""
        self._process = os.getpid()
        if self.folder in INHERITED:
            raise InputError(FORKED.format(self.folder))
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._texts = _connect(self.folder / TEXTS)
            try:
                if os.access(self.folder, os.W_OK):
                    self._prepare()
                self._load()
                self._texts.execute("PRAGMA busy_timeout = 20")  # ms, in which searches wait, too
            except BaseException:
                self._texts.close()
                raise
        if os.access(self.folder, os.W_OK):  # what is never written to has no locks
            OPEN.add(self)

    def _prepare(self) -> None:
        """Make the tables, unless they are there; others may be doing so, whom SQLite doesn't wait for itself."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                self._texts.executescript(SCHEMA)
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(0.01)

    def _load(self) -> None:
        """Hold what the last ``save`` left, this process's or another's."""
        while (meta := self._meta()).get("index") != self._file:
            file = meta.get("index")
            if meta.get("model", self._model) != self._model:
                made = f"made with another model than {self._embedder.manifest.name}"
                raise ArtifactError(f"{self.folder}: {made}; index it again")
            if file is not None and (not fnmatch(file, VECTORS.format("*")) or Path(file).name != file):
                raise ArtifactError(f"{self.folder / TEXTS}: names {file!r} as its index; index it again")
            self._index, self._file = self._new_index(), ""
            try:
                if file is not None:
                    self._index.load(self.folder / file)
            except (RuntimeError, OSError) as error:
                if self._meta().get("index") != file:  # another process has saved, and removed this one
                    continue
                raise ArtifactError(f"{self.folder}/{file}: can't be read ({error}); index it again") from None
            (self._next,) = self._texts.execute(NEXT).fetchone()
            self._file = file

    def __len__(self) -> int:
        """How many texts there are."""
        with self._explained(), self._lock:
            return int(self._texts.execute("SELECT COUNT(*) FROM texts").fetchone()[0])

    def add(self, texts: Iterable[str], ids: Iterable[str] | None = None) -> int:
        """Embed texts and add them, as a stream in constant memory beside the index.

        Args:
            texts: The passages.
            ids: A name for each; one that is there already is replaced. By default, numbers in the order of adding.

        Returns:
            How many were added.

        Raises:
            ArtifactError: Another process is adding to the folder, or the disk is full.
            InputError: Something that isn't a valid text or name, or not as many names as texts; what came before it in
                the stream, in whole chunks, has been added.
        """
        stream, names = _stream("texts", texts), None if ids is None else _stream("ids", ids)
        limits = dataclasses.replace(self._embedder._limits, texts=None)  # a stream is bounded by its chunks
        added = 0
        while chunk := list(islice(stream, CHUNK)):
            named = None if names is None else _names(islice(names, len(chunk)), added)
            if named is not None and len(named) < len(chunk):
                raise InputError(f"there are {added + len(named)} ids for more texts; pass one for each")
            checked = self._embedder._prompted("passage", check_texts(chunk, added, limits))
            embedded = self._embedder._embed(checked, first=added)
            vectors = normalize(embedded).astype(np.float16)  # which holds nothing beyond 65,504, or below 6e-8
            places = [_place(vector) for vector in vectors]
            with self._change() as gone:
                keys = range(self._next, self._next + len(chunk))
                self._next += len(chunk)  # at once, so that no key is ever used again
                if named is None:
                    named = [str(key) for key in keys]
                    if taken := next(self._vectors_of(named), None):
                        raise InputError(f"{taken[0]!r} is somebody's id already; pass ids")
                last = {name: key for key, name in zip(keys, named, strict=True)}  # of equal names the last counts
                replaced = self._take_out(last)
                kept = [i for i, key in enumerate(keys) if last[named[i]] == key]
                rows = [(keys[i], named[i], chunk[i], places[i]) for i in kept]
                self._texts.executemany("INSERT INTO texts VALUES (?, ?, ?, ?)", rows)
                new = {places[i]: i for i in kept if places[i] not in self._index}
                self._index.add(list(new), vectors[list(new.values())], threads=1)  # several leave some unreachable
                gone += self._without_text(replaced)
            added += len(chunk)
        if names is not None and next(names, None) is not None:
            raise InputError(f"there are more ids than the {added} texts; pass one for each")
        return added

    def remove(self, ids: Iterable[str]) -> int:
        """Take texts out.

        Returns:
            How many of the names were there.

        Raises:
            ArtifactError: Another process is adding to the folder, or the disk is full.
            InputError: Something that isn't a list of names.
        """
        names = _names(_stream("ids", ids))
        with self._change() as gone:
            taken = self._take_out(dict.fromkeys(names))
            gone += self._without_text(taken)
        return len(taken)

    def _take_out(self, ids: Iterable[str]) -> list[int]:
        """Take texts out, and return the vector of each, which is still there."""
        found = list(self._vectors_of(ids))
        self._texts.executemany("DELETE FROM texts WHERE id = ?", ((name,) for name, _ in found))
        return [vector for _, vector in found]

    def _vectors_of(self, ids: Iterable[str]) -> Iterator[tuple[str, int]]:
        """Those of the names that are there, each with its text's vector."""
        for name in ids:
            yield from self._texts.execute("SELECT id, vector FROM texts WHERE id = ?", (name,))

    def _without_text(self, vectors: Iterable[int]) -> list[int]:
        """Those of the vectors that no text has any more."""
        find = "SELECT 1 FROM texts WHERE vector = ? LIMIT 1"
        return [vector for vector in dict.fromkeys(vectors) if not self._texts.execute(find, (vector,)).fetchone()]

    @contextmanager
    def _change(self) -> Iterator[list[int]]:
        """Be the only writer until ``save``, and make a change wholly or not at all.

        Yields:
            For the vectors that go when all else is done; one without a text harms nobody, the reverse does.
        """
        gone: list[int] = []
        with self._explained(), self._writing, self._begun():
            before, self._saving = self._texts.total_changes, ""
            self._texts.execute("SAVEPOINT change")
            try:
                self._load()
                yield gone
                self._dirty = self._dirty or self._texts.total_changes > before
            except BaseException:
                if self._dirty and self._texts.in_transaction:
                    self._texts.execute("ROLLBACK TO change")
                self._check_kept()
                raise
            if gone:
                self._index.remove(gone, threads=1)
            if self._dirty:
                self._texts.execute("RELEASE change")

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """Holds the lock within a transaction, which one process is in at a time; searches go on while this waits."""
        until = time.monotonic() + PATIENCE
        with self._lock:
            try:
                while not self._begin(time.monotonic() > until):
                    self._searches.wait(0.01)
                yield
            finally:
                if not self._dirty:
                    self._texts.rollback()  # or others would wait for nothing

    def _begin(self, last: bool) -> bool:
        """Begin a transaction, unless one goes on; False if another process is in one, the last time an error."""
        self._check_kept()
        if self._dirty:
            return True
        self._texts.rollback()  # of what an interrupt may have left begun
        try:
            self._texts.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if last or "locked" not in str(error):
                raise
            return False
        return True

    def _check_kept(self) -> None:
        """Raise if SQLite has rolled back all that was added, as it does when the disk is full."""
        if self._dirty and not self._texts.in_transaction:
            if self._meta().get("index") == self._saving:  # it was committed, even if an interrupt came right after it
                self._file, self._dirty = self._saving, False
                return
            self._file = ""  # searches go on with the last save
            raise ArtifactError(
                f"{self.folder}: the disk is full or fails, and what was added since the last save is lost; "
                "open the folder again and add it again"
            ) from None

    def _meta(self) -> dict[str, str]:
        return dict(self._texts.execute("SELECT name, value FROM meta"))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what SQLite, usearch and the system raise into our errors; before any lock, which a fork may hold."""
        if os.getpid() != self._process:
            raise InputError(FORKED.format(self.folder))
        try:
            yield
        except BgeOnnxError:
            raise
        except sqlite3.ProgrammingError as error:
            raise InputError(f"{self.folder}: the retriever is closed ({error}); open it again") from None
        except sqlite3.OperationalError as error:
            if "no such column" in str(error):
                raise ArtifactError(f"{self.folder}: made by an older version; index its texts again") from None
            if "locked" not in str(error):
                raise ArtifactError(f"{self.folder / TEXTS}: can't be used ({error}); mend the folder") from None
            raise ArtifactError(f"{self.folder}: another process is adding to it; wait until it has saved") from None
        except sqlite3.Error as error:
            raise ArtifactError(f"{self.folder / TEXTS}: not a retriever's texts ({error}); index them again") from None
        except OSError as error:
            raise ArtifactError(f"{self.folder}: {error.strerror or error}; pass another folder") from None
        except (RuntimeError, ValueError, MemoryError) as error:
            # What usearch makes of an interrupt, or of what else a signal's handler raised.
            if "terminated" in str(error):
                raise KeyboardInterrupt from None
            raise BgeOnnxError(f"{self.folder}: usearch failed ({error}); open the folder again") from None

    def retrieve(self, query: str, top_k: int = 100) -> list[Hit]:
        """The texts whose vectors are nearest to the query's, best first.

        Raises:
            InputError: The query isn't a valid text, or ``top_k`` isn't 1 to 10,000.
        """
        if not isinstance(query, str):
            raise InputError(f"query is {type(query).__name__}; pass a str")
        top_k = check_count("top_k", top_k, MOST)
        vector = normalize(self._embedder.encode_queries(query))
        with self._explained(), self._lock:
            while True:
                self._load()
                scores: dict[int, float] = {}
                if len(self._index):
                    found = self._index.search(vector, top_k, threads=1)
                    pairs = zip(found.keys, found.distances, strict=True)
                    scores = {int(place): 1 - float(distance) for place, distance in pairs}
                rows = self._texts.execute(NEAREST, (json.dumps(list(scores)), top_k)).fetchall()
                if self._meta().get("index") == self._file:  # or another process has saved meanwhile
                    return [Hit(name, text, scores[place]) for place, name, text in rows]

    def search(self, query: str, top_k: int = 10, *, candidates: int = 100) -> list[Hit]:
        """The best texts for a query, best first: the nearest by vector, sorted by the reranker.

        Args:
            query: The query.
            top_k: How many to return.
            candidates: How many are reranked; at least ``top_k``.

        Raises:
            InputError: The query isn't a valid text, or a number isn't 1 to 10,000.
        """
        top_k = check_count("top_k", top_k, MOST)
        hits = self.retrieve(query, max(top_k, check_count("candidates", candidates, MOST)))
        if self._reranker is None or not hits:
            return hits[:top_k]
        check_texts([query], limits=self._reranker._limits)  # the texts are nobody's request
        logits = self._reranker._logits([(query, hit.text) for hit in hits])
        return [dataclasses.replace(hits[i], rerank_score=score) for i, score in _best(logits, top_k, False)]

    def save(self) -> None:
        """Write all that was added, and the whole index; what the folder held is kept until the very last step.

        ``add`` and ``remove`` wait; searches, and the whole process, until usearch has handed the index to the system,
        since it holds Python's lock: about a second for each GB, as when a process loads what another has saved.

        Raises:
            ArtifactError: The disk is full or can't be written, or another process is adding to the folder.
        """
        path = self.folder / VECTORS.format(uuid4().hex[:8])
        with self._explained(), self._writing:
            with self._lock:
                self._check_kept()
                if not self._texts.in_transaction:  # nothing was changed
                    return
                old = list(self.folder.glob(VECTORS.format("*")))  # of a crash, too, and nobody's yet to be named
            try:
                self._index.save(path)
                _to_disk(path)
            except (RuntimeError, OSError) as error:
                path.unlink(missing_ok=True)
                raise ArtifactError(f"{self.folder}: can't be saved ({error}); free some space, save again") from None
            with self._lock:
                meta = [("index", path.name), ("model", self._model), ("next", str(self._next))]
                self._texts.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta)
                self._saving = path.name
                try:
                    self._texts.commit()
                finally:
                    self._check_kept()
            until = time.monotonic() + PATIENCE
            while not self._settle(old) and time.monotonic() < until:
                time.sleep(0.01)

    def _settle(self, old: list[Path]) -> bool:
        """Move what was committed into the database, and remove the old indexes; False while another process reads.

        The folder can then be copied, or opened where it can't be written.
        """
        with self._lock, suppress(sqlite3.Error):
            ((busy, _, _),) = self._texts.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            if busy:
                return False
            for file in old:
                file.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Close the folder's files; what wasn't saved is lost, with a warning."""
        if os.getpid() != self._process:
            return
        with self._writing, self._lock:
            if self._dirty:
                logger.warning("%s: closed with texts added or removed that weren't saved, and are lost", self.folder)
            self._texts.close()
            self._dirty = False
            OPEN.discard(self)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def _place(vector: NDArray[np.float16]) -> int:
    """Where a vector is in the index: 63 bits of its hash. Two of ten million share one by a chance of 1 in 180,000."""
    return int.from_bytes(hashlib.blake2b(vector.tobytes(), digest_size=8).digest()) >> 1


def _connect(path: Path) -> sqlite3.Connection:
    """The texts; where the folder can't be written to, without the files that SQLite needs for locking."""
    if os.access(path.parent, os.W_OK):
        return sqlite3.connect(path, check_same_thread=False)
    return sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True, check_same_thread=False)


def _stream(what: str, items: Iterable[str]) -> Iterator[str]:
    if isinstance(items, str):
        raise InputError(f"{what} is one str; pass a list of str")
    return check_iterable(items)


def _names(ids: Iterable[str], first: int = 0) -> list[str]:
    names = list(ids)
    for i, name in enumerate(names, first):
        if not isinstance(name, str) or name != name.encode("utf-8", "replace").decode():
            raise InputError(f"id {i} is {str(name)[:60]!a}; pass a str of valid Unicode for each text")
    return names


def _to_disk(path: Path) -> None:
    """Outlast a power cut, file and name."""
    for place, mode in ((path, os.O_RDWR), (path.parent, os.O_RDONLY)):
        if os.name == "nt" and place != path:  # Windows syncs no folders
            continue
        held = os.open(place, mode)
        try:
            os.fsync(held)
        finally:
            os.close(held)
