"""The reranker: a query and its passages in, scores out."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.batching import plan_batches
from runtime.checks import check_count, check_pairs, check_texts
from runtime.errors import InputError
from runtime.model import MAX_TOKENS_PER_RUN, open_model


class Reranker:
    """An exported reranker (cross-encoder). Safe to use from many threads at once.

    The names and results are those of FlagEmbedding's ``FlagReranker``.

    Attributes:
        manifest: What the export recorded about the model.
        variant: The variant that was loaded, such as ``int8``.
        max_length: Tokens that are read of a query and passage together, special tokens included.
    """

    def __init__(
        self, path: str | Path, variant: str = "auto", device: str = "auto", threads: int | None = None
    ) -> None:
        """Load an artifact folder.

        Args:
            path: The folder that ``python -m export`` wrote.
            variant: ``fp32``, ``int8``, … or ``auto``: the fastest that the artifact has for the device.
            device: ``cpu``, ``cuda`` or ``auto``.
            threads: CPU threads for a run; by default all that the process may use.

        Raises:
            ArtifactError: The folder is not a whole, unaltered artifact of a reranker, or lacks the variant.
            InputError: ``threads`` is no sensible number.
            ProviderError: The device can't be had.
        """
        self._model = open_model(path, "reranker", variant, device, threads)
        self.manifest = self._model.manifest
        self.variant = self._model.variant
        self.max_length = self.manifest.max_length

    def compute_score(
        self, pairs: Sequence[tuple[str, str]] | tuple[str, str], normalize: bool = False, *, truncate: bool = True
    ) -> list[float] | float:
        """Score queries with passages, as FlagEmbedding does.

        A query keeps at most three quarters of ``max_length``, and its passage what is left. A pair's score is the same
        to the bit whatever it is batched with. A query that comes several times is tokenised once.

        Args:
            pairs: One (query, passage), or several.
            normalize: Map the raw logits to 0…1 with a sigmoid.
            truncate: Cut what is too long (logged as one warning); False raises instead.

        Returns:
            A float for one pair, a list of floats for several.

        Raises:
            InputError: Something that isn't a pair of valid texts, or too long with ``truncate=False``.
        """
        checked, single = check_pairs(pairs)
        logits = self._logits(checked, truncate)
        scores = _sigmoid(logits) if normalize else logits
        return float(scores[0]) if single else scores.tolist()

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
            InputError: Something that isn't a valid text, or ``top_k`` below 1.
        """
        if not isinstance(query, str):
            raise InputError(f"query is {type(query).__name__}; pass a str")
        if isinstance(passages, str):
            raise InputError("passages is one str; pass a list of str")
        keep = None if top_k is None else check_count("top_k", top_k, sys.maxsize)
        logits = self._logits([(query, passage) for passage in check_texts(passages)], truncate=True)
        order = np.argsort(-logits, kind="stable")[:keep]
        scores = _sigmoid(logits) if normalize else logits
        return list(zip(order.tolist(), scores[order].tolist(), strict=True))

    def _logits(self, pairs: list[tuple[str, str]], truncate: bool) -> NDArray[np.float32]:
        """Raw logits, float32 ``(n,)``."""
        encoded = self._model.tokenizer.encode_pairs(pairs, truncate)
        logits = np.empty(len(pairs), np.float32)
        for batch in plan_batches([len(ids) for ids, _ in encoded], MAX_TOKENS_PER_RUN):
            ids = np.array([encoded[i][0] for i in batch], np.int64)
            token_types = np.array([encoded[i][1] for i in batch], np.int64)
            logits[batch] = self._model.run(["logits"], ids, token_types)[0][:, 0]
        return logits


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """In double precision, as FlagEmbedding's; a single would be 1 from a logit of 17 on."""
    decay = np.exp(-np.abs(logits.astype(np.float64)))
    scores: NDArray[np.float64] = np.where(logits < 0, decay, 1) / (1 + decay)
    return scores
