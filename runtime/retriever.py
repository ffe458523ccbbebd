"""Retrieve, then rerank: texts found by vector, the best of them sorted by a reranker."""

import dataclasses
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from uuid import uuid4

from runtime.checks import check_count, check_iterable
from runtime.embedder import Embedder
from runtime.errors import ArtifactError, BgeOnnxError, InputError
from runtime.reranker import Reranker
from runtime.session import usable_cpus

TEXTS = "texts.sqlite"
VECTORS = "vectors.{}.usearch"
CHUNK = 1024
"""Texts that are embedded and added at once."""
MOST = 10_000
"""Most results of a search."""


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

    Vectors are held by usearch (an HNSW graph, float16), texts by SQLite. What was added is lost unless ``save`` is
    called; a crash at any moment leaves what the last ``save`` left. Of several processes that have the folder open,
    one may add at a time; the others go on with the vectors that they loaded. A folder that can't be written to can be
    searched.
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
        """
        if not isinstance(embedder, Embedder) or not isinstance(reranker, Reranker | None):
            given = f"{type(embedder).__name__} and {type(reranker).__name__}"
            raise InputError(f"a Retriever takes an Embedder and a Reranker, not {given}; open them first")
        try:
            from usearch.index import Index
        except ImportError as error:
            raise BgeOnnxError(f"usearch can't be imported ({error}); run: pip install 'bge-onnx[retrieve]'") from None
        self.folder = Path(folder)
        self._embedder, self._reranker = embedder, reranker
        self._lock = threading.RLock()
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._texts = _connect(self.folder / TEXTS)
            meta = self._meta()
            (last,) = self._texts.execute("SELECT COALESCE(MAX(key), -1) FROM texts").fetchone()
        self._next = last + 1
        self._model = json.dumps(embedder.manifest.source.checksums, sort_keys=True)
        if meta.get("model", self._model) != self._model:
            raise ArtifactError(f"{self.folder}: made with another model than {embedder.manifest.name}; index it again")
        self._index = Index(ndim=embedder.dim, metric="cos", dtype="f16")
        self._file = meta.get("index")
        if self._file is not None:
            if not fnmatch(self._file, VECTORS.format("*")) or Path(self._file).name != self._file:
                raise ArtifactError(f"{self.folder / TEXTS}: names {self._file!r} as its index; index it again")
            try:
                self._index.load(self.folder / self._file)
            except (RuntimeError, OSError) as error:
                raise ArtifactError(f"{self.folder / self._file}: can't be read ({error}); index it again") from None

    def __len__(self) -> int:
        """How many texts there are."""
        with self._lock, self._explained():
            return int(self._texts.execute("SELECT COUNT(*) FROM texts").fetchone()[0])

    def add(self, texts: Iterable[str], ids: Iterable[str] | None = None) -> int:
        """Embed texts and add them, as a stream in constant memory beside the index.

        Args:
            texts: The passages.
            ids: A name for each; one that is there already is replaced. By default, numbers in the order of adding.

        Returns:
            How many were added.

        Raises:
            ArtifactError: Another process is adding to the folder, or has changed it since it was opened.
            InputError: Something that isn't a valid text or name, or not as many names as texts; what came before it in
                the stream, in whole chunks, has been added.
        """
        stream, names = _stream("texts", texts), None if ids is None else _stream("ids", ids)
        added = 0
        while chunk := list(islice(stream, CHUNK)):
            named = None if names is None else _names(islice(names, len(chunk)), added)
            if named is not None and len(named) < len(chunk):
                raise InputError(f"there are {added + len(named)} ids for more texts; pass one for each")
            vectors = self._embedder.encode_corpus(chunk)
            with self._lock, self._explained():
                self._begin()
                keys = range(self._next, self._next + len(chunk))
                if named is None:
                    named = [str(key) for key in keys]
                    if taken := self._held("id", named):
                        raise InputError(f"{next(iter(taken.values()))[0]!r} is somebody's id already; pass ids")
                last = {name: key for key, name in zip(keys, named, strict=True)}  # of equal names the last counts
                self._remove(list(last))
                kept = [i for i, key in enumerate(keys) if last[named[i]] == key]
                rows = [(keys[i], named[i], chunk[i]) for i in kept]
                self._texts.executemany("INSERT INTO texts VALUES (?, ?, ?)", rows)
                self._index.add([keys[i] for i in kept], vectors[kept], threads=usable_cpus())
                self._next += len(chunk)
            added += len(chunk)
        if names is not None and next(names, None) is not None:
            raise InputError(f"there are more ids than the {added} texts; pass one for each")
        return added

    def remove(self, ids: Iterable[str]) -> int:
        """Take texts out.

        Returns:
            How many of the names were there.

        Raises:
            ArtifactError: Another process is adding to the folder, or has changed it since it was opened.
            InputError: Something that isn't a list of names.
        """
        names = _names(_stream("ids", ids))
        with self._lock, self._explained():
            self._begin()
            return self._remove(names)

    def _remove(self, ids: Sequence[str]) -> int:
        removed = 0
        for name in ids:
            for (key,) in self._texts.execute("DELETE FROM texts WHERE id = ? RETURNING key", (name,)).fetchall():
                self._index.remove(key)
                removed += 1
        return removed

    def _begin(self) -> None:
        """Be the only writer until ``save``, of a folder that is still as it was opened."""
        if not self._texts.in_transaction:
            self._texts.execute("BEGIN IMMEDIATE")
            if self._meta().get("index") != self._file:
                self._texts.rollback()
                raise ArtifactError(f"{self.folder}: another process changed it since it was opened; open it again")

    def _meta(self) -> dict[str, str]:
        return dict(self._texts.execute("SELECT name, value FROM meta"))

    def _held(self, column: Literal["key", "id"], wanted: Sequence[int] | Sequence[str]) -> dict[int, tuple[str, str]]:
        """Id and text by key, of those wanted that are there."""
        marks = ",".join("?" * len(wanted))
        rows = self._texts.execute(f"SELECT key, id, text FROM texts WHERE {column} IN ({marks})", list(wanted))
        return {key: (name, text) for key, name, text in rows}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what SQLite and the system raise into our errors."""
        try:
            yield
        except sqlite3.ProgrammingError as error:
            raise InputError(f"{self.folder}: the retriever is closed ({error}); open it again") from None
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise ArtifactError(f"{self.folder / TEXTS}: can't be used ({error}); mend the folder") from None
            raise ArtifactError(f"{self.folder}: another process is adding to it; wait until it has saved") from None
        except sqlite3.Error as error:
            raise ArtifactError(f"{self.folder / TEXTS}: not a retriever's texts ({error}); index them again") from None
        except OSError as error:
            raise ArtifactError(f"{self.folder}: {error.strerror or error}; pass another folder") from None

    def retrieve(self, query: str, top_k: int = 100) -> list[Hit]:
        """The texts whose vectors are nearest to the query's, best first.

        Raises:
            InputError: The query isn't a valid text, or ``top_k`` isn't 1 to 10,000.
        """
        if not isinstance(query, str):
            raise InputError(f"query is {type(query).__name__}; pass a str")
        top_k = check_count("top_k", top_k, MOST)
        vector = self._embedder.encode_queries(query)
        with self._lock, self._explained():
            if not len(self._index):
                return []
            found = self._index.search(vector, top_k, threads=1)
            scores = {int(key): 1 - float(distance) for key, distance in zip(found.keys, found.distances, strict=True)}
            held = self._held("key", list(scores))
        # another process may have removed what this one's index still has
        return [Hit(*held[key], score) for key, score in scores.items() if key in held]

    def search(self, query: str, top_k: int = 10, *, candidates: int = 100) -> list[Hit]:
        """The best texts for a query, best first: the nearest by vector, sorted by the reranker.

        Args:
            query: The query.
            top_k: How many to return.
            candidates: How many are reranked.

        Raises:
            InputError: The query isn't a valid text, or a number isn't 1 to 10,000.
        """
        top_k = check_count("top_k", top_k, MOST)
        hits = self.retrieve(query, max(top_k, check_count("candidates", candidates, MOST)))
        if self._reranker is None or not hits:
            return hits[:top_k]
        ranked = self._reranker.rank(query, [hit.text for hit in hits], top_k)
        return [dataclasses.replace(hits[i], rerank_score=score) for i, score in ranked]

    def save(self) -> None:
        """Write all that was added; what the folder held before is kept until the very last step.

        Raises:
            ArtifactError: The disk is full or can't be written, or another process has changed the folder.
        """
        with self._lock:
            with self._explained():
                self._begin()
            before, self._file = self._file, VECTORS.format(uuid4().hex[:8])
            try:
                self._index.save(self.folder / self._file)
                _to_disk(self.folder / self._file)
                meta = [("index", self._file), ("model", self._model)]
                self._texts.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta)
                self._texts.commit()
                self._texts.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # so that the folder can be copied
            except (sqlite3.Error, RuntimeError, OSError) as error:
                (self.folder / self._file).unlink(missing_ok=True)
                self._file = before
                raise ArtifactError(f"{self.folder}: can't be saved ({error}); free some space, save again") from None
            for old in self.folder.glob(VECTORS.format("*")):  # of a crash, too
                if old.name != self._file:
                    old.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the folder's files; what wasn't saved is lost."""
        self._texts.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def _connect(path: Path) -> sqlite3.Connection:
    """The texts; where the folder can't be written to, without the files that SQLite needs for locking."""
    if not os.access(path.parent, os.W_OK):
        return sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True, check_same_thread=False)
    texts = sqlite3.connect(path, check_same_thread=False)
    texts.execute("PRAGMA journal_mode = WAL")  # others may read while one adds
    texts.execute("CREATE TABLE IF NOT EXISTS texts (key INTEGER PRIMARY KEY, id TEXT UNIQUE, text TEXT)")
    texts.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT)")
    return texts


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
    for place in (path, path.parent):
        held = os.open(place, os.O_RDONLY)
        try:
            os.fsync(held)
        finally:
            os.close(held)
