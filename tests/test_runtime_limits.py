"""A service's limits hold for every way in, before any work is done."""

import asyncio
import dataclasses
import itertools

import numpy as np
import pytest

from runtime import Embedder, InputError, Limits, Reranker

LONG = "x" * 11
"""A character more than allowed."""


@pytest.fixture(scope="module")
def embedder(tiny_artifact):
    return Embedder(tiny_artifact, device="cpu", limits=Limits(texts=3, characters=10))


@pytest.fixture(scope="module")
def reranker(tiny_reranker):
    return Reranker(tiny_reranker("bert")[0], device="cpu", limits=Limits(texts=3, characters=10))


EMBEDDER = {
    "encode": lambda e, texts: e.encode(texts),
    "encode_queries": lambda e, texts: e.encode_queries(texts),
    "encode_query": lambda e, texts: e.encode_query(texts),
    "encode_corpus": lambda e, texts: e.encode_corpus(texts),
    "encode_document": lambda e, texts: e.encode_document(texts),
    "encode in pieces": lambda e, texts: e.encode(texts, chunk=True),
    "aencode": lambda e, texts: asyncio.run(e.aencode(texts)),
    "aencode_queries": lambda e, texts: asyncio.run(e.aencode_queries(texts)),
    "aencode_corpus": lambda e, texts: asyncio.run(e.aencode_corpus(texts)),
    "count_tokens": lambda e, texts: e.count_tokens(texts),
}
RERANKER = {
    "compute_score": lambda r, pairs: r.compute_score(pairs),
    "acompute_score": lambda r, pairs: asyncio.run(r.acompute_score(pairs)),
}
RANK = {
    "rank": lambda r, query, passages: r.rank(query, passages),
    "arank": lambda r, query, passages: asyncio.run(r.arank(query, passages)),
}
TOO_MANY = "^there are more than 3 {}, this service's limit; send them in several calls$"


@pytest.mark.parametrize("call", EMBEDDER.values(), ids=EMBEDDER)
def test_texts_are_bounded_in_number_and_length(embedder, call):
    assert len(call(embedder, ["x" * 10, "", "é" * 10])) == 3
    call(embedder, "x" * 10)
    with pytest.raises(InputError, match=TOO_MANY.format("texts")):
        call(embedder, ["a"] * 4)
    with pytest.raises(InputError, match="^text 1 has 11 characters where this service takes 10; split it$"):
        call(embedder, ["a", LONG, LONG])
    with pytest.raises(InputError, match="^text 0 has 11 characters"):
        call(embedder, LONG)


@pytest.mark.parametrize(
    "asked", [{"return_sparse": True}, {"return_colbert_vecs": True}, {"return_dense": False}], ids=str
)
def test_other_representations_are_bounded_too(embedder, asked):
    with pytest.raises(InputError, match=TOO_MANY.format("texts")):
        embedder.encode(["a"] * 4, **asked)
    with pytest.raises(InputError, match="^text 0 has 11 characters"):
        embedder.encode(LONG, **asked)


def test_scores_in_three_ways_are_bounded_too(embedder):
    with pytest.raises(InputError, match=TOO_MANY.format("pairs")):
        embedder.compute_score([("a", "b")] * 4)
    with pytest.raises(InputError, match="^pair 0 has 11 characters"):
        embedder.compute_score(("a", LONG))


@pytest.mark.parametrize("call", RERANKER.values(), ids=RERANKER)
def test_pairs_are_bounded_in_number_and_length(reranker, call):
    assert len(call(reranker, [("x" * 10, "y" * 10)] * 3)) == 3
    with pytest.raises(InputError, match=TOO_MANY.format("pairs")):
        call(reranker, [("a", "b")] * 4)
    for pair in (("a", LONG), (LONG, "a")):
        with pytest.raises(InputError, match="^pair 2 has 11 characters where this service takes 10; split it$"):
            call(reranker, [("a", "b"), ("a", "b"), pair])
        with pytest.raises(InputError, match="^pair 0 has 11 characters"):
            call(reranker, pair)


@pytest.mark.parametrize("call", RANK.values(), ids=RANK)
def test_passages_are_bounded_in_number_and_length(reranker, call):
    assert len(call(reranker, "x" * 10, ["y" * 10] * 3)) == 3
    with pytest.raises(InputError, match=TOO_MANY.format("texts")):
        call(reranker, "a", ["b"] * 4)
    with pytest.raises(InputError, match="^text 1 has 11 characters"):
        call(reranker, "a", ["b", LONG])
    with pytest.raises(InputError, match="^pair 0 has 11 characters"):
        call(reranker, LONG, ["b"])


def test_what_never_ends_is_read_no_further_than_the_limit(embedder, reranker):
    for call, item in ((embedder.encode, "a"), (embedder.count_tokens, "a"), (reranker.compute_score, ("a", "b"))):
        endless = itertools.count()
        with pytest.raises(InputError, match="^there are more than 3 "):
            call(item for _ in endless)
        assert next(endless) == 4


def test_a_stream_is_bounded_by_the_length_of_its_texts_alone(embedder):
    texts = ["a"] * 5000
    rows = list(embedder.encode_iter(iter(texts), chunk_size=7))
    np.testing.assert_array_equal(rows, [embedder.encode("a")] * 5000)
    stream = embedder.encode_iter(itertools.chain(texts, [LONG]))
    with pytest.raises(InputError, match="^text 5000 has 11 characters"):
        list(stream)


def test_a_prompt_does_not_count(tiny_artifact, edited):
    folder = edited(tiny_artifact, lambda data: data.update(prompts={"query": "a long instruction: "}))
    embedder = Embedder(folder, device="cpu", limits=Limits(characters=10))
    assert embedder.encode_queries("x" * 10).shape == asyncio.run(embedder.aencode_queries("x" * 10)).shape == (32,)


def test_without_limits_there_are_none(tiny_artifact):
    embedder = Embedder(tiny_artifact, device="cpu")
    assert embedder.encode([LONG * 1000] * 2000).shape == (2000, 32)


def test_a_limit_is_in_force_without_the_other(tiny_artifact):
    embedder = Embedder(tiny_artifact, device="cpu", limits=Limits(texts=1))
    assert embedder.encode([LONG * 1000]).shape == (1, 32)
    with pytest.raises(InputError, match="more than 1 texts"):
        embedder.encode(["a", "b"])


@pytest.mark.parametrize("name", ["texts", "characters"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", float("inf")])
def test_a_limit_that_is_none_is_refused(name, value):
    with pytest.raises(InputError, match=f"^limits.{name} is {value!r}; it must be a whole number from 1 to"):
        Limits(**{name: value})


def test_limits_cant_be_changed_later():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits(texts=1).texts = 2
