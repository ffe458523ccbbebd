"""Retrieve, then rerank: texts found by vector, the best of them sorted by a reranker."""

import dataclasses
import json
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from uuid import uuid4

from runtime.checks import check_count, check_iterable
from runtime.embedder import Embedder
from runtime.errors import ArtifactError, BgeOnnxError, InputError
from runtime.reranker import Reranker
from runtime.session import usable_cpus

TEXTS = "texts.sqlite"
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
    called; a crash at any moment leaves what the last ``save`` left.
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
        self.folder = Path(folder)
        self._embedder, self._reranker = embedder, reranker
        self._lock = threading.RLock()
        try:
            from usearch.index import Index
        except ImportError as error:
            raise BgeOnnxError(f"usearch can't be imported ({error}); run: pip install 'bge-onnx[retrieve]'") from None
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._texts = sqlite3.connect(self.folder / TEXTS, check_same_thread=False)
            self._texts.execute("CREATE TABLE IF NOT EXISTS texts (key INTEGER PRIMARY KEY, id TEXT UNIQUE, text TEXT)")
            self._texts.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT)")
            meta = dict(self._texts.execute("SELECT name, value FROM meta"))
            (last,) = self._texts.execute("SELECT COALESCE(MAX(key), -1) FROM texts").fetchone()
        except sqlite3.Error as error:
            raise ArtifactError(f"{self.folder / TEXTS}: not a retriever's texts ({error}); index them again") from None
        self._next = last + 1
        self._model = json.dumps(embedder.manifest.source.checksums, sort_keys=True)
        if meta.get("model", self._model) != self._model:
            raise ArtifactError(f"{self.folder}: made with another model than {embedder.manifest.name}; index it again")
        self._index = Index(ndim=embedder.dim, metric="cos", dtype="f16")
        self._file = meta.get("index")
        if self._file is not None:
            try:
                self._index.load(self.folder / Path(self._file).name)
            except (RuntimeError, OSError) as error:
                raise ArtifactError(f"{self.folder / self._file}: can't be read ({error}); index it again") from None

    def __len__(self) -> int:
        """How many texts there are."""
        with self._lock:
            return int(self._texts.execute("SELECT COUNT(*) FROM texts").fetchone()[0])

    def add(self, texts: Iterable[str], ids: Iterable[str] | None = None) -> int:
        """Embed texts and add them, as a stream in constant memory beside the index.

        Args:
            texts: The passages.
            ids: A name for each; one that is there already is replaced. By default, numbers in the order of adding.

        Returns:
            How many were added.

        Raises:
            InputError: Something that isn't a valid text or name, or not as many names as texts; what came before it in
                the stream, in whole chunks, has been added.
        """
        stream, names = check_iterable(texts), None if ids is None else check_iterable(ids)
        added = 0
        while chunk := list(islice(stream, CHUNK)):
            named = None if names is None else list(islice(names, len(chunk)))
            if named is not None and (len(named) < len(chunk) or not all(isinstance(name, str) for name in named)):
                raise InputError(f"ids from {added} on: pass a str for each text")
            vectors = self._embedder.encode_corpus(chunk)
            with self._lock:
                keys = range(self._next, self._next + len(chunk))
                named = named or [str(key) for key in keys]
                last = {name: key for key, name in zip(keys, named, strict=True)}  # of equal names the last counts
                self._remove(list(last))
                kept = [i for i, key in enumerate(keys) if last[named[i]] == key]
                rows = [(keys[i], named[i], chunk[i]) for i in kept]
                self._texts.executemany("INSERT INTO texts VALUES (?, ?, ?)", rows)
                self._index.add([keys[i] for i in kept], vectors[kept], threads=usable_cpus())
                self._next += len(chunk)
            added += len(chunk)
        return added

    def remove(self, ids: Sequence[str]) -> int:
        """Take texts out.

        Returns:
            How many of the names were there.
        """
        with self._lock:
            return self._remove(ids)

    def _remove(self, ids: Sequence[str]) -> int:
        removed = 0
        for name in ids:
            for (key,) in self._texts.execute("DELETE FROM texts WHERE id = ? RETURNING key", (name,)).fetchall():
                self._index.remove(key)
                removed += 1
        return removed

    def retrieve(self, query: str, top_k: int = 100) -> list[Hit]:
        """The texts whose vectors are nearest to the query's, best first.

        Raises:
            InputError: The query isn't a valid text, or ``top_k`` isn't 1 to 10,000.
        """
        if not isinstance(query, str):
            raise InputError(f"query is {type(query).__name__}; pass a str")
        top_k = check_count("top_k", top_k, MOST)
        vector = self._embedder.encode_queries(query)
        with self._lock:
            if not len(self._index):
                return []
            found = self._index.search(vector, top_k, threads=1)
            scores = {int(key): 1 - float(distance) for key, distance in zip(found.keys, found.distances, strict=True)}
            marks = ",".join("?" * len(scores))
            rows = self._texts.execute(f"SELECT key, id, text FROM texts WHERE key IN ({marks})", list(scores))
            held = {key: (name, text) for key, name, text in rows}
        return [Hit(*held[key], score) for key, score in scores.items()]

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
        if self._reranker is None:
            return hits[:top_k]
        ranked = self._reranker.rank(query, [hit.text for hit in hits], top_k)
        return [dataclasses.replace(hits[i], rerank_score=score) for i, score in ranked]

    def save(self) -> None:
        """Write all that was added; what the folder held before is kept until the very last step.

        Raises:
            ArtifactError: The disk is full or can't be written.
        """
        with self._lock:
            before, self._file = self._file, f"vectors.{uuid4().hex[:8]}.usearch"
            try:
                self._index.save(self.folder / self._file)
                meta = [("index", self._file), ("model", self._model)]
                self._texts.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta)
                self._texts.commit()
            except (sqlite3.Error, RuntimeError, OSError) as error:
                (self.folder / self._file).unlink(missing_ok=True)
                self._file = before
                raise ArtifactError(f"{self.folder}: can't be saved ({error}); free some space, save again") from None
            if before is not None:
                (self.folder / before).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the folder's files; what wasn't saved is lost."""
        self._texts.close()
