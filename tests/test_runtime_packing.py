"""Packed batches hold every token once, know where each belongs, and give each text what is its own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.packing import by_length, pack, plan_packed

TEXTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=20)


@given(TEXTS)
def test_every_token_has_its_place_in_its_text(texts):
    feeds = pack(texts)
    assert {value.dtype for value in feeds.values()} == {np.dtype(np.int32)}
    ends = feeds["cumulative_lengths"]
    for i, text in enumerate(texts):
        rows = slice(ends[i], ends[i + 1])
        assert feeds["input_ids"][rows].tolist() == text
        assert feeds["positions"][rows].tolist() == list(range(len(text)))
        assert set(feeds["text_starts"][rows].tolist()) == {ends[i]}
    assert ends[-1] == len(feeds["input_ids"]) == sum(map(len, texts))
    assert not feeds["token_type_ids"].any()


@given(TEXTS)
def test_token_offset_names_each_place_of_a_padded_batch_once_the_tokens_first(texts):
    feeds = pack(texts)
    offset, longest = feeds["token_offset"], -(-max(map(len, texts)) // 8) * 8
    assert offset.shape == (len(texts), longest)
    assert sorted(offset.ravel().tolist()) == list(range(offset.size))
    padded = np.full(offset.size, -1)
    padded[offset.ravel()[: len(feeds["input_ids"])]] = feeds["input_ids"]
    expected = [text + [-1] * (longest - len(text)) for text in texts]
    assert padded.reshape(offset.shape).tolist() == expected


@given(TEXTS)
def test_a_padding_token_takes_no_place(texts):
    """As transformers' ``create_position_ids_from_input_ids``, less the padding id itself."""
    feeds = pack(texts, padding_id=1)
    expected = []
    for text in texts:
        counted = np.array(text) != 1
        expected += (np.cumsum(counted) * counted).tolist()
    assert feeds["positions"].tolist() == expected


@given(TEXTS)
def test_token_types_go_along(texts):
    types = [[i % 2] * len(text) for i, text in enumerate(texts)]
    assert pack(texts, types)["token_type_ids"].tolist() == sum(types, [])


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 400))
def test_a_plan_holds_every_text_once_within_the_bound_longest_first(lengths, bound):
    batches = plan_packed(lengths, bound)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= bound
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= 4 * bound
    for batch, following in zip(batches, batches[1:], strict=False):  # a text that fits isn't left for the next run
        padded = (len(batch) + 1) * lengths[batch[0]]
        assert sum(lengths[i] for i in batch) + lengths[following[0]] > bound or padded > 4 * bound


@given(TEXTS)
def test_outputs_of_tokens_come_back_text_by_text(texts):
    texts = sorted(texts, key=len, reverse=True)
    places = np.arange(len(texts)) + 7
    of_tokens = np.array(sum(texts, []), np.float32)[:, None] * [1, 10]
    of_texts = np.array([[sum(text)] for text in texts], np.float32)
    seen = []
    for some, ids, (vectors, sums) in by_length(
        ["token_vectors", "sentence_embedding"], [of_tokens, of_texts], places, texts
    ):
        assert vectors.shape == (*ids.shape, 2)
        np.testing.assert_array_equal(vectors[:, :, 0], ids)
        np.testing.assert_array_equal(sums[:, 0], ids.sum(1))
        assert ids.tolist() == [texts[place - 7] for place in some]
        seen += some.tolist()
    assert seen == places.tolist()


@pytest.mark.parametrize("output", ["sentence_embedding", "logits"])
def test_outputs_of_texts_stay_together(output):
    places, found = np.array([3, 1]), np.ones((2, 4), np.float32)
    ((some, ids, (values,)),) = by_length([output], [found], places, [[1, 2, 3], [4]])
    assert some is places
    assert values is found
    assert ids.shape == (2, 0)
