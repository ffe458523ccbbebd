"""Any text at all, however odd, gives a finite unit vector with the bits it has alone, or an error that names it.

The long test is the nightly profile: 10,000 batches and more.
"""

import math
import re
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from runtime import Embedder, InputError, Reranker

FEW = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=10_000)

SPECIAL = ["[SEP]", "[CLS]", "[PAD]", "[UNK]", "[MASK]", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "##ing", "\u2581"]
RIGHT_TO_LEFT = "שלום עולם مرحبا بالعالم \u202eabc\u202c \u200f\u200e\u2067x\u2069"
ODD = [
    "",
    " ",
    "\n\t\r",
    "\0",
    "\0" * 50,
    "\u0301" * 99,
    "e\u0301" * 50,
    "👨‍👩‍👧‍👦" * 20,
    "\U0010ffff",
    "\ufffe",
    "İıſß" * 9,
]
HUGE = ["x" * 100_000, "a " * 50_000, "🙈" * 30_000, "\0" * 30_000, "[SEP]" * 10_000, "\u0301" * 30_000, " " * 100_000]

plane = st.integers(0, 16).flatmap(  # each as likely as the first
    lambda number: st.text(
        st.characters(min_codepoint=number << 16, max_codepoint=(number << 16) + 0xFFFF), max_size=40
    )
)
valid = st.one_of(
    plane,
    st.lists(plane, max_size=5).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
    st.lists(st.sampled_from([*SPECIAL, " ", "a", "river"]), max_size=100).map("".join),
    st.lists(st.sampled_from([*RIGHT_TO_LEFT.split(), "mixed", "12.5"]), max_size=30).map(" ".join),
    st.sampled_from(ODD),
)
huge = st.integers(0, 99).flatmap(lambda number: valid if number else st.sampled_from(HUGE))  # they take their time
broken = st.tuples(valid, st.characters(categories=["Cs"]), valid).map("".join)
texts = st.lists(st.one_of(huge, huge, huge, huge, huge, broken), max_size=8)


def surrogate(text: str) -> str | None:
    """A text's first lone surrogate; a str of Python joins none."""
    found = re.search("[\ud800-\udfff]", text)
    return found.group() if found else None


@pytest.fixture(scope="module")
def embedder(tiny_artifact):
    return Embedder(tiny_artifact, device="cpu")


@pytest.fixture(scope="module")
def reranker(tiny_reranker):
    return Reranker(tiny_reranker("xlm-roberta")[0], device="cpu")


def check_texts(embedder: Embedder, batch: list[str]) -> None:
    bad = [i for i, text in enumerate(batch) if surrogate(text) is not None]
    if bad:
        says = re.escape(f"text {bad[0]} has a lone surrogate ({surrogate(batch[bad[0]])!a})")
        for call in (embedder.encode, embedder.count_tokens, lambda batch: list(embedder.encode_iter(batch))):
            with pytest.raises(InputError, match=says) as caught:
                call(batch)
            assert str(caught.value).isprintable()
        return
    vectors = embedder.encode(batch)
    assert vectors.shape == (len(batch), 32) and vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    counts = embedder.count_tokens(batch)
    for text, vector, tokens in zip(batch, vectors, counts, strict=True):
        np.testing.assert_array_equal(embedder.encode(text), vector)
        assert tokens >= 2
        pieces = embedder.encode(text, chunk=True)
        if tokens <= embedder.max_length:
            np.testing.assert_array_equal(pieces, vector)
        assert np.isfinite(pieces).all()


def check_pairs(reranker: Reranker, batch: list[str]) -> None:
    pairs = list(zip(batch, reversed(batch), strict=True))
    bad = [i for i, pair in enumerate(pairs) if any(surrogate(text) is not None for text in pair)]
    if bad:
        with pytest.raises(InputError, match=f"^pair {bad[0]} has a lone surrogate") as caught:
            reranker.compute_score(pairs)
        assert str(caught.value).isprintable()
        return
    scores = reranker.compute_score(pairs)
    assert all(map(math.isfinite, scores))
    assert scores == [reranker.compute_score(pair) for pair in pairs]


@given(batch=texts)
@example(batch=ODD)
@example(batch=HUGE)
@example(batch=SPECIAL)
@example(batch=[RIGHT_TO_LEFT, "a", "b\udfff", "\ud83d\ude48"])
@FEW
def test_any_text_gives_a_unit_vector_or_is_named(embedder, batch):
    check_texts(embedder, batch)


@given(batch=texts)
@example(batch=ODD)
@example(batch=SPECIAL)
@example(batch=["a", "b\udfff", "c"])
@FEW
def test_any_pair_gives_a_score_or_is_named(reranker, batch):
    check_pairs(reranker, batch)


@pytest.mark.long
@given(batch=texts)
@MANY
def test_ten_thousand_batches_of_any_text(embedder, batch):
    check_texts(embedder, batch)


@pytest.mark.long
@given(batch=texts)
@MANY
def test_ten_thousand_batches_of_any_pair(reranker, batch):
    check_pairs(reranker, batch)


def test_every_character_of_unicode_can_be_embedded(embedder):
    characters = [chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point <= 0xDFFF]
    lines = ["".join(characters[start : start + 4096]) for start in range(0, len(characters), 4096)]
    vectors = embedder.encode(lines, chunk=True)
    assert np.isfinite(vectors).all()
