"""The embedder: texts in, dense, sparse or multi-vector representations out."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from runtime.checks import check_count, check_iterable, check_pairs, check_texts, check_weights
from runtime.errors import InputError
from runtime.hybrid import (
    colbert_score,
    colbert_vectors,
    compute_lexical_matching_score,
    token_lexical_weights,
    vocabulary_lexical_weights,
)
from runtime.model import Model, Piece
from runtime.pooling import POOLED, Floats, normalize, pool

if TYPE_CHECKING:
    from runtime.microbatch import MicroBatcher

VOCABULARY_TOKENS_PER_RUN = 512
"""Bounds memory where each token gets a float per word of the vocabulary (SPLADE): some 60 MB with BERT's."""

OUTPUTS = {
    "last_hidden_state": "dense_vecs",
    "token_weights": "lexical_weights",
    "vocabulary_weights": "lexical_weights",
    "token_vectors": "colbert_vecs",
}
"""What FlagEmbedding calls the representation that is made of each output of a graph."""


class Embedder(Model):
    """An exported embedder. Safe to use from many threads at once.

    The names and results are those of FlagEmbedding's ``FlagModel``, and ``BGEM3FlagModel`` where the model has further
    outputs.

    Attributes:
        manifest: What the export recorded about the model.
        variant: The variant that was loaded, such as ``int8``.
    """

    compute_lexical_matching_score = staticmethod(compute_lexical_matching_score)
    colbert_score = staticmethod(colbert_score)

    KIND = "embedder"

    @property
    def dim(self) -> int:
        """Length of a dense vector."""
        return self.manifest.dim

    @functools.cached_property
    def _together(self) -> "MicroBatcher[str]":
        from runtime.microbatch import MicroBatcher  # asyncio, a quarter of the time that the import would take

        return MicroBatcher(self._embed, self._hook)

    @overload
    def encode(
        self,
        texts: str | Sequence[str],
        *,
        truncate_dim: int | None = None,
        truncate: bool = True,
        chunk: bool = False,
    ) -> Floats: ...

    @overload
    def encode(
        self,
        texts: str | Sequence[str],
        *,
        truncate: bool = True,
        return_dense: bool | None = None,
        return_sparse: bool = False,
        return_colbert_vecs: bool = False,
    ) -> dict[str, Any]: ...

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        truncate_dim: int | None = None,
        truncate: bool = True,
        chunk: bool = False,
        return_dense: bool | None = None,
        return_sparse: bool = False,
        return_colbert_vecs: bool = False,
    ) -> Floats | dict[str, Any]:
        """Embed texts as they are, without a prompt.

        On a CPU a text's vector is the same to the bit whatever it is batched with, on a GPU within its precision.

        Args:
            texts: One text or several.
            truncate_dim: Keep this many leading dimensions (Matryoshka models), normalised again if the model is.
            truncate: Cut texts beyond ``max_length`` (logged as a warning, visible with ``count_tokens``); False raises
                instead.
            chunk: Read texts beyond ``max_length`` whole, in pieces whose dense vectors are averaged by their number of
                tokens. A prompt stands before the first only.
            return_dense: Dense vectors: by default, and by default they alone are no dict.
            return_sparse: Lexical weights, of a model that has them (BGE-M3, SPLADE).
            return_colbert_vecs: A vector per token, of a model that has them (BGE-M3).

        Returns:
            Unless a ``return_…`` is given, float32 ``(dim,)`` for a str, ``(n, dim)`` for a list, ``(0, dim)`` for an
            empty one; of unit length if the model normalises. Else, as of ``BGEM3FlagModel``, a dict of ``dense_vecs``,
            ``lexical_weights`` (for each text a dict from token id, as a str, to weight) and ``colbert_vecs`` (for each
            text float32 ``(tokens - 1, dim)``, all but the first token's); what wasn't asked for is None.

        Raises:
            InputError: Something that isn't a valid text, too long with ``truncate=False``, a bad ``truncate_dim``, or
                an output that the model hasn't.
        """
        if return_sparse or return_colbert_vecs or return_dense is not None:
            return_dense = return_dense is None or return_dense
            if truncate_dim is not None or chunk:
                raise InputError("truncate_dim and chunk are for dense vectors alone; encode twice, or leave them out")
            checked = check_texts(texts, limits=self._limits)
            ways = self._represent(checked, truncate, return_dense, return_sparse, return_colbert_vecs)
            return {
                way: found[0] if found is not None and isinstance(texts, str) else found for way, found in ways.items()
            }
        return self._encode(texts, None, truncate_dim, truncate, chunk)

    def encode_queries(
        self, texts: str | Sequence[str], *, truncate_dim: int | None = None, truncate: bool = True
    ) -> Floats:
        """``encode`` with the model's query instruction before each text."""
        return self._encode(texts, "query", truncate_dim, truncate)

    def encode_corpus(
        self,
        texts: str | Sequence[str],
        *,
        truncate_dim: int | None = None,
        truncate: bool = True,
        chunk: bool = False,
    ) -> Floats:
        """``encode`` with the model's passage prompt (mostly none) before each text."""
        return self._encode(texts, "passage", truncate_dim, truncate, chunk)

    encode_query = encode_queries
    """sentence-transformers' name."""
    encode_document = encode_corpus
    """sentence-transformers' name."""

    def encode_iter(
        self,
        texts: Iterable[str],
        *,
        chunk_size: int = 1024,
        prompt_name: Literal["query", "passage"] | None = None,
        truncate_dim: int | None = None,
        truncate: bool = True,
    ) -> Iterator[Floats]:
        """Embed a stream of any length in constant memory.

        Args:
            texts: Texts, read ``chunk_size`` at a time.
            chunk_size: Texts that are held and grouped by length at once. A GPU waits for each one's first tokens, so
                give it more.
            prompt_name: Which of the model's prompts goes before each text: ``passage`` is as ``encode_corpus``,
                ``query`` as ``encode_queries``, none as ``encode``.
            truncate_dim: As in ``encode``.
            truncate: As in ``encode``.

        Yields:
            float32 ``(dim,)`` for each text, in the order of the input.

        Raises:
            InputError: As ``encode``; or ``texts`` is a single str, ``chunk_size`` is below 1, or there is no such
                ``prompt_name``. What is wrong with a text is raised when it comes.
        """
        if isinstance(texts, str):
            raise InputError("encode_iter takes an iterable of texts, not one str; pass [text] or use encode")
        if prompt_name not in (None, "query", "passage"):
            raise InputError(f"prompt_name is {prompt_name!r}; pass 'query', 'passage' or None")
        chunk_size = check_count("chunk_size", chunk_size, sys.maxsize)
        stream, limits = check_iterable(texts), dataclasses.replace(self._limits, texts=None)

        def vectors() -> Iterator[Floats]:
            done = 0
            while chunk := list(itertools.islice(stream, chunk_size)):
                checked = self._prompted(prompt_name, check_texts(chunk, done, limits))
                yield from self._embed(checked, truncate_dim, truncate, first=done)
                done += len(chunk)

        return vectors()

    async def aencode(
        self, texts: str | Sequence[str], *, truncate_dim: int | None = None, truncate: bool = True
    ) -> Floats:
        """``encode`` for dense vectors in asyncio: the loop stays free, and concurrent calls run together.

        The vectors are those of ``encode``. At most 1,024 calls are queued, further ones wait for room;
        bound the wait with ``asyncio.timeout``. For other outputs, use ``asyncio.to_thread(embedder.encode, …)``.
        """
        return await self._aencode(texts, None, truncate_dim, truncate)

    async def aencode_queries(
        self, texts: str | Sequence[str], *, truncate_dim: int | None = None, truncate: bool = True
    ) -> Floats:
        """``aencode`` with the model's query instruction before each text."""
        return await self._aencode(texts, "query", truncate_dim, truncate)

    async def aencode_corpus(
        self, texts: str | Sequence[str], *, truncate_dim: int | None = None, truncate: bool = True
    ) -> Floats:
        """``aencode`` with the model's passage prompt (mostly none) before each text."""
        return await self._aencode(texts, "passage", truncate_dim, truncate)

    def compute_score(
        self,
        pairs: Sequence[tuple[str, str]] | tuple[str, str],
        weights_for_different_modes: Sequence[float] | None = None,
    ) -> dict[str, Any]:
        """Score queries with passages in every way that ``BGEM3FlagModel`` does.

        Args:
            pairs: One (query, passage), or several.
            weights_for_different_modes: Of dense, sparse and multi-vector scores in their weighted means; equal by
                default.

        Returns:
            ``dense``, ``sparse``, ``colbert``, ``sparse+dense`` and ``colbert+sparse+dense``: a float each for one
            pair, a list of floats for several.

        Raises:
            InputError: Something that isn't a pair of valid texts, weights that aren't three with a positive sum, or a
                model that hasn't all three ways.
        """
        modes = (1.0, 1.0, 1.0) if weights_for_different_modes is None else weights_for_different_modes
        weights = check_weights("weights_for_different_modes", modes)
        checked, single = check_pairs(pairs, self._limits)
        texts = list(dict.fromkeys(text for pair in checked for text in pair))
        ways = self._represent(texts, True, True, True, True)
        place = {text: i for i, text in enumerate(texts)}
        scores = np.empty((len(checked), 3))
        for i, (query, passage) in enumerate(checked):
            (q, q_weights, q_vectors), (p, p_weights, p_vectors) = (
                [found[place[text]] for found in ways.values()] for text in (query, passage)
            )
            scores[i] = q @ p, compute_lexical_matching_score(q_weights, p_weights), colbert_score(q_vectors, p_vectors)
        result = {
            "colbert": scores[:, 2],
            "sparse": scores[:, 1],
            "dense": scores[:, 0],
            "sparse+dense": scores[:, :2] @ weights[:2] / max(weights[:2].sum(), 1e-12),
            "colbert+sparse+dense": scores @ weights / weights.sum(),
        }
        return {name: float(values[0]) if single else values.tolist() for name, values in result.items()}

    def count_tokens(self, texts: str | Sequence[str]) -> int | list[int]:
        """Tokens of a text (int) or of each of several (list), special tokens included, before any truncation.

        Of the text as it is: what a prompt has comes on top.

        Raises:
            InputError: Something that isn't a valid text.
        """
        counts = self._tokenizer.count(check_texts(texts, limits=self._limits))
        return counts[0] if isinstance(texts, str) else counts

    def _encode(
        self,
        texts: str | Sequence[str],
        prompt_name: str | None,
        truncate_dim: int | None,
        truncate: bool,
        chunk: bool = False,
    ) -> Floats:
        """Dense vectors of one text or several."""
        checked = self._prompted(prompt_name, check_texts(texts, limits=self._limits))
        vectors = self._embed(checked, truncate_dim, truncate, chunk)
        return vectors[0] if isinstance(texts, str) else vectors

    async def _aencode(
        self, texts: str | Sequence[str], prompt_name: str | None, truncate_dim: int | None, truncate: bool
    ) -> Floats:
        """``_encode``, together with what else is called meanwhile."""
        checked = self._prompted(prompt_name, check_texts(texts, limits=self._limits))
        dim = None if truncate_dim is None else check_count("truncate_dim", truncate_dim, self.dim)
        found = await self._together(checked, truncate_dim=dim, truncate=bool(truncate))
        return found[0] if isinstance(texts, str) else found

    def _prompted(self, prompt_name: str | None, texts: Sequence[str]) -> Sequence[str]:
        """Texts with the model's prompt of that name before each, if it has one."""
        prompt = self.manifest.prompts.get(prompt_name, "") if prompt_name else ""
        return [prompt + text for text in texts] if prompt else texts

    def _embed(
        self,
        texts: Sequence[str],
        truncate_dim: int | None = None,
        truncate: bool = True,
        chunk: bool = False,
        first: int = 0,
    ) -> Floats:
        """Dense vectors of checked texts, float32 ``(n, dim)``."""
        self._output("dense_vecs")
        if truncate_dim is not None:
            truncate_dim = check_count("truncate_dim", truncate_dim, self.dim)
        if chunk:
            pieces = self._tokenizer.encode_chunks(texts, first)
            flat = [ids for text in pieces for ids in text]
            vectors = self._dense(len(flat), [Piece(flat)], truncate_dim)
            return self._join(vectors, [[len(ids) for ids in text] for text in pieces])

        def encode(some: Sequence[str], start: int, cut: list[int] | None) -> Piece:
            return Piece(self._tokenizer.encode(some, truncate, first + start, cut), start=start)

        return self._dense(len(texts), self._ahead(texts, encode), truncate_dim)

    def _dense(self, texts: int, pieces: Iterable[Piece], truncate_dim: int | None) -> Floats:
        """float32 ``(n, dim)``; zeros for a text without tokens, which only tokenizers without special tokens give."""
        vectors = np.zeros((texts, truncate_dim or self.dim), np.float32)
        for places, _, (values,) in self._run([self._output("dense_vecs")], pieces):
            vectors[places] = self._pool(values, truncate_dim)
        return vectors

    def _pool(self, values: Floats, truncate_dim: int | None = None) -> Floats:
        """Of hidden states ``(n, tokens, dim)``, or what a graph has pooled of them, float32 ``(n, dim)``."""
        assert self.manifest.pooling  # an embedder with dense vectors has one
        pooled = (values if self._pools else pool(values, self.manifest.pooling))[:, :truncate_dim]
        return normalize(pooled) if self.manifest.normalize else pooled

    def _join(self, vectors: Floats, lengths: list[list[int]]) -> Floats:
        """The mean vector of each text's pieces, weighted by their tokens, float32 ``(n, dim)``."""
        joined = np.empty((len(lengths), vectors.shape[1]), np.float32)
        start = 0
        for i, tokens in enumerate(lengths):
            pieces = vectors[start : start + len(tokens)]
            start += len(tokens)
            if len(tokens) == 1:  # as without chunks, to the bit
                joined[i] = pieces[0]
                continue
            joined[i] = np.average(pieces, axis=0, weights=tokens)
            if self.manifest.normalize:
                joined[i] = normalize(joined[i])
        return joined

    def _represent(
        self, texts: Sequence[str], truncate: bool, dense: bool, sparse: bool, colbert: bool
    ) -> dict[str, Any]:
        """All that was asked for of checked texts, from one pass of the graph."""
        asked = {"dense_vecs": dense, "lexical_weights": sparse, "colbert_vecs": colbert}
        outputs = {way: self._output(way) for way, wanted in asked.items() if wanted}
        if not outputs:
            raise InputError("nothing to return; pass return_dense, return_sparse or return_colbert_vecs")
        ids = self._tokenizer.encode(texts, truncate)
        tokens = VOCABULARY_TOKENS_PER_RUN if "vocabulary_weights" in outputs.values() else None
        # What a text without tokens has; only tokenizers without special tokens give such.
        nothing = {"dense_vecs": np.zeros(self.dim), "lexical_weights": {}, "colbert_vecs": np.zeros((0, self.dim))}
        results: dict[str, Any] = {way: [nothing[way]] * len(ids) if wanted else None for way, wanted in asked.items()}
        for places, rows, found in self._run(list(outputs.values()), [Piece(ids)], tokens):
            for (way, output), values in zip(outputs.items(), found, strict=True):
                for i, value in zip(places, self._finish(output, rows, values), strict=True):
                    results[way][i] = value
        if dense:
            results["dense_vecs"] = np.array(results["dense_vecs"], np.float32).reshape(-1, self.dim)
        return results

    def _finish(self, output: str, ids: NDArray[np.int64], values: Floats) -> Sequence[Any]:
        """What a text gets of an output of the graph, for each text of a batch."""
        match output:
            case "token_weights":
                return token_lexical_weights(ids, values, self.manifest.skipped_ids)
            case "vocabulary_weights":
                return vocabulary_lexical_weights(values)
            case "token_vectors":
                return colbert_vectors(values)
            case _:  # last_hidden_state, or POOLED of it
                return list(self._pool(values))

    def _output(self, way: str) -> str:
        """The output of the graph that a representation comes from.

        Raises:
            InputError: The model hasn't that representation.
        """
        for output in self.manifest.outputs:
            if OUTPUTS[output] == way:
                return POOLED if self._pools and output == "last_hidden_state" else output
        has = ", ".join(OUTPUTS[output] for output in self.manifest.outputs)
        raise InputError(f"{self.manifest.name} has no {way}, only {has}; set the return_… arguments to what it has")
