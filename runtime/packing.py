"""Many texts in one row of tokens: what a packed graph takes instead of padding and a mask."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int32]
Run = tuple[NDArray[np.intp], NDArray[np.int64], list[Any]]
"""Places of texts among those of a call, their ids, ``(n, tokens)``, and a graph's outputs."""

EIGHT = 8
"""The longest text counts as a multiple of it: other lengths of an attention bias (MPNet) have no fused kernel."""
PADDED = 4
"""How many times a run's tokens it would have if it were padded, at most: ``token_offset`` has them all."""
TOKEN_OUTPUTS = ("token_weights", "token_vectors")
"""Outputs that a packed graph gives for all tokens in one row."""


def pack(
    ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None, padding_id: int | None = None
) -> dict[str, Integers]:
    """The inputs of a packed graph.

    Args:
        ids: Token ids of each text, which has at least one.
        types: Their token types; all 0 by default.
        padding_id: A token that takes no place of its own, where the model has one (RoBERTa and its kin).

    Returns:
        ``input_ids``, ``token_type_ids``, ``positions`` (places in the text, from 0; from 1 with a ``padding_id``,
        whose own is 0) and ``text_starts`` (the row of the text's first token), each int32 ``(tokens,)``;
        ``cumulative_lengths``, int32 ``(texts + 1,)``; and ``token_offset``, int32 ``(texts, longest)``: where in
        a padded batch all tokens are, then where its padding is (as ``PackedMultiHeadAttention`` takes them).
    """
    lengths = np.array([len(row) for row in ids], np.int32)
    cumulative = np.zeros(len(ids) + 1, np.int32)
    np.cumsum(lengths, out=cumulative[1:])
    tokens = int(cumulative[-1])
    flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, tokens)
    if types is None:
        flat_types = np.zeros(tokens, np.int32)
    else:
        flat_types = np.fromiter(itertools.chain.from_iterable(types), np.int32, tokens)
    starts = np.repeat(cumulative[:-1], lengths)
    if padding_id is None:
        positions = np.arange(tokens, dtype=np.int32) - starts
    else:
        counted = (flat != padding_id).astype(np.int32)
        before = np.cumsum(counted, dtype=np.int32) - counted
        positions = (before - before[starts] + 1) * counted
    longest = -(-int(lengths.max()) // EIGHT) * EIGHT
    places = np.arange(len(ids) * longest, dtype=np.int32).reshape(len(ids), -1)
    filled = np.arange(places.shape[1]) < lengths[:, None]
    return {
        "input_ids": flat,
        "token_type_ids": flat_types,
        "positions": positions,
        "text_starts": starts,
        "token_offset": np.concatenate([places[filled], places[~filled]]).reshape(places.shape),
        "cumulative_lengths": cumulative,
    }


def plan_packed(lengths: Sequence[int] | NDArray[np.intp], max_tokens: int) -> list[NDArray[np.intp]]:
    """Group texts into runs of many tokens, those of similar length together.

    Args:
        lengths: Tokens of each text.
        max_tokens: Most tokens in a run, and a ``PADDED``-th of those in a padded one; a longer text runs alone.

    Returns:
        Index arrays that together hold each of ``range(len(lengths))`` once, longest texts first, so that memory peaks
        at the start.
    """
    array = np.asarray(lengths, np.intp)
    order = np.argsort(-array, kind="stable")
    batches, start, total, longest = [], 0, 0, 0
    for end, length in enumerate(array[order].tolist()):
        padded = (end - start + 1) * longest
        if end > start and (total + length > max_tokens or padded > PADDED * max_tokens):
            batches.append(order[start:end])
            start, total = end, 0
        longest = length if start == end else longest
        total += length
    return [*batches, order[start:]] if order.size else []


def by_length(
    outputs: Sequence[str], found: Sequence[NDArray[Any]], places: NDArray[np.intp], ids: Sequence[Sequence[int]]
) -> list[Run]:
    """What a packed graph gave, in the form that a graph for texts of equal length gives it.

    Args:
        outputs: Names of the outputs.
        found: Their values.
        places: Which texts they are of, those of equal length side by side.
        ids: These texts' token ids.

    Returns:
        For each length the texts' places, their ids and the outputs, ``(n, tokens, …)`` where they are of tokens. Where
        none is, all texts are together, without ids.
    """
    if not set(outputs) & set(TOKEN_OUTPUTS):
        return [(places, np.empty((len(ids), 0), np.int64), list(found))]
    lengths = np.array([len(row) for row in ids])
    edges = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(ids)]
    rows = [0, *np.cumsum(lengths).tolist()]
    runs = []
    for start, end in itertools.pairwise(edges):
        values = [
            value[rows[start] : rows[end]].reshape(end - start, -1, *value.shape[1:])
            if output in TOKEN_OUTPUTS
            else value[start:end]
            for output, value in zip(outputs, found, strict=True)
        ]
        runs.append((places[start:end], np.array(ids[start:end], np.int64), values))
    return runs
