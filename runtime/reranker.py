"""The reranker: a query and its passages in, scores out."""

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.checks import check_count, check_pairs, check_texts
from runtime.errors import InputError
from runtime.model import Model, Piece

if TYPE_CHECKING:
    from runtime.microbatch import MicroBatcher


class Reranker(Model):
    """An exported reranker (cross-encoder). Safe to use from many threads at once.

    The names and results are those of FlagEmbedding's ``FlagReranker``.

    Attributes:
        manifest: What the export recorded about the model.
        variant: The variant that was loaded, such as ``int8``.
    """

    KIND = "reranker"

    @functools.cached_property
    def _together(self) -> "MicroBatcher[tuple[str, str]]":
        from runtime.microbatch import MicroBatcher  # asyncio, a quarter of the time that the import would take

        return MicroBatcher(self._logits, self._hook)

    def compute_score(
        self, pairs: Sequence[tuple[str, str]] | tuple[str, str], normalize: bool = False, *, truncate: bool = True
    ) -> list[float] | float:
        """Score queries with passages, as FlagEmbedding does.

        A query keeps at most three quarters of ``max_length``, and its passage what is left. On a CPU a pair's score is
        the same to the bit whatever it is batched with. A query that comes several times is tokenised once.

        Args:
            pairs: One (query, passage), or several.
            normalize: Map the raw logits to 0…1 with a sigmoid.
            truncate: Cut what is too long (logged as a warning); False raises instead.

        Returns:
            A float for one pair, a list of floats for several.

        Raises:
            InputError: Something that isn't a pair of valid texts, or too long with ``truncate=False``.
        """
        checked, single = check_pairs(pairs, self._limits)
        return _scores(self._logits(checked, truncate), normalize, single)

    def rank(
        self, query: str, passages: Sequence[str], top_k: int | None = None, *, normalize: bool = False
    ) -> list[tuple[int, float]]:
        """Sort passages by how well they answer a query.

        Args:
            query: The query.
            passages: The passages.
            top_k: Keep this many; all by default.
            normalize: Map the raw logits to 0…1 with a sigmoid.

        Returns:
            (index in ``passages``, score), best first; equal scores in the order of the passages.

        Raises:
            InputError: Something that isn't a valid text, no passage, or ``top_k`` below 1.
        """
        pairs = self._pairs(query, passages, top_k)
        return _best(self._logits(pairs), top_k, normalize)

    async def acompute_score(
        self, pairs: Sequence[tuple[str, str]] | tuple[str, str], normalize: bool = False, *, truncate: bool = True
    ) -> list[float] | float:
        """``compute_score`` in asyncio: the loop stays free, and concurrent calls run together."""
        checked, single = check_pairs(pairs, self._limits)
        return _scores(await self._together(checked, truncate=bool(truncate)), normalize, single)

    async def arank(
        self, query: str, passages: Sequence[str], top_k: int | None = None, *, normalize: bool = False
    ) -> list[tuple[int, float]]:
        """``rank`` in asyncio: the loop stays free, and concurrent calls run together."""
        pairs = self._pairs(query, passages, top_k)
        return _best(await self._together(pairs, truncate=True), top_k, normalize)

    def _pairs(self, query: str, passages: Sequence[str], top_k: int | None) -> list[tuple[str, str]]:
        """What there is to score, checked."""
        if not isinstance(query, str):
            raise InputError(f"query is {type(query).__name__}; pass a str")
        if isinstance(passages, str):
            raise InputError("passages is one str; pass a list of str")
        if top_k is not None:
            check_count("top_k", top_k, sys.maxsize)
        pairs = [(query, passage) for passage in check_texts(passages, limits=self._limits)]
        if not pairs:
            raise InputError("passages is empty, so there is nothing to rank; pass at least one")
        return check_pairs(pairs, self._limits)[0]

    def _logits(self, pairs: Sequence[tuple[str, str]], truncate: bool = True, first: int = 0) -> NDArray[np.float32]:
        """Raw logits, float32 ``(n,)``; 0 of a pair without tokens (if its tokenizer has no special ones)."""
        logits = np.zeros(len(pairs), np.float32)

        def encode(some: Sequence[tuple[str, str]], start: int, cut: list[int] | None) -> Piece:
            encoded = self._tokenizer.encode_pairs(some, truncate, first + start, cut)
            return Piece([ids for ids, _ in encoded], [types for _, types in encoded], start)

        for places, _, (found,) in self._run(["logits"], self._ahead(pairs, encode)):
            logits[places] = found[:, 0]
        return logits


def _scores(logits: NDArray[np.float32], normalize: bool, single: bool) -> list[float] | float:
    scores: list[float] = (_sigmoid(logits) if normalize else logits).tolist()
    return scores[0] if single else scores


def _best(logits: NDArray[np.float32], top_k: int | None, normalize: bool) -> list[tuple[int, float]]:
    """By the logits, since scores beyond a sigmoid's reach are all 1."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    scores = _sigmoid(logits) if normalize else logits
    return list(zip(order.tolist(), scores[order].tolist(), strict=True))


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """In double precision, as FlagEmbedding's; a single would be 1 from a logit of 17 on."""
    decay = np.exp(-np.abs(logits.astype(np.float64)))
    scores: NDArray[np.float64] = np.where(logits < 0, decay, 1) / (1 + decay)
    return scores
