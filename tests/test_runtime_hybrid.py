"""Lexical weights and token vectors: converted without loss, and compared as FlagEmbedding compares them."""

import math
import random
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from runtime import (
    BgeOnnxError,
    Embedder,
    InputError,
    colbert_score,
    compute_lexical_matching_score,
    sparse_arrays,
    sparse_matrix,
)
from runtime.hybrid import token_lexical_weights, vocabulary_lexical_weights

TEXTS = ["a river of light", "", "bread and bread", "the light of the river", "a river of light"]
PAIRS = [("a river of light", "the light of the river"), ("bread", "a river"), ("", "a river"), ("", "")]
VOCABULARY = 50

positive = st.floats(2**-7, 8, width=32)
lexical = st.dictionaries(st.integers(0, VOCABULARY - 1).map(str), positive, max_size=12)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def m3(request, tiny_m3):
    """A model of dense, sparse and token vectors, in each variant."""
    return Embedder(tiny_m3.path, request.param, device="cpu")


@pytest.fixture(scope="module")
def fp32(tiny_m3):
    """One variant of it, for what isn't about numbers."""
    return Embedder(tiny_m3.path, "fp32", device="cpu")


@pytest.fixture(scope="module")
def dense(tiny_artifact):
    """A model that has dense vectors alone."""
    return Embedder(tiny_artifact, "fp32", device="cpu")


@pytest.fixture(scope="module")
def splade(tiny_splade):
    """A model that has lexical weights alone."""
    return Embedder(tiny_splade, "fp32", device="cpu")


@given(
    ids=arrays.arrays(np.int64, (2, 9), elements=st.integers(0, 6)),
    weights=arrays.arrays(np.float32, (2, 9), elements=st.floats(0, 4, width=32)),
)
def test_a_tokens_weight_is_the_greatest_that_it_has_and_special_tokens_have_none(ids, weights):
    expected = [{}, {}]
    for row, values, best in zip(ids.tolist(), weights.tolist(), expected, strict=True):
        for token, value in zip(row, values, strict=True):
            if token not in (0, 2) and value > best.get(str(token), 0):
                best[str(token)] = value
    assert token_lexical_weights(ids, weights, (0, 2)) == expected


@given(weights=arrays.arrays(np.float32, (2, 7), elements=st.sampled_from([0, 0.5, 3])))
def test_a_words_weight_is_kept_if_it_is_positive(weights):
    expected = [{str(i): value for i, value in enumerate(row) if value > 0} for row in weights.tolist()]
    assert vocabulary_lexical_weights(weights) == expected


@given(weights=lexical)
def test_sparse_arrays_are_ascending_and_lose_nothing(weights):
    indices, values = sparse_arrays(weights)
    assert (indices.dtype, values.dtype) == (np.int64, np.float32)
    assert (np.diff(indices) > 0).all()
    assert dict(zip(map(str, indices.tolist()), values.tolist(), strict=True)) == weights


@given(weights=st.lists(lexical, max_size=5))
def test_a_sparse_matrix_loses_nothing(weights):
    matrix = sparse_matrix(weights, VOCABULARY)
    assert (matrix.shape, matrix.dtype) == ((len(weights), VOCABULARY), np.float32)
    assert matrix.has_canonical_format
    table = matrix.toarray()
    assert [{str(i): row[i] for i in np.flatnonzero(row).tolist()} for row in table] == weights


@given(a=lexical, b=lexical)
def test_a_lexical_score_is_the_sum_over_shared_tokens_either_way_round(a, b):
    score = compute_lexical_matching_score(a, b)
    assert type(score) is float
    assert score == pytest.approx(math.fsum(a[token] * b[token] for token in a.keys() & b.keys()))
    assert score == pytest.approx(compute_lexical_matching_score(b, a))


@given(left=st.lists(lexical, max_size=4), right=st.lists(lexical, max_size=4))
def test_lexical_scores_of_lists_are_the_product_of_sparse_matrices(left, right):
    scores = compute_lexical_matching_score(left, right)
    assert (scores.shape, scores.dtype) == ((len(left), len(right)), np.float32)
    product = sparse_matrix(left, VOCABULARY) @ sparse_matrix(right, VOCABULARY).T
    np.testing.assert_allclose(scores, product.toarray(), rtol=1e-5)


def test_a_text_and_a_list_are_scored_as_two_lists():
    a, others = {"3": 2.0, "5": 1.0}, [{"3": 4.0}, {"7": 1.0}, {}]
    np.testing.assert_array_equal(compute_lexical_matching_score(a, others), [[8, 0, 0]])
    np.testing.assert_array_equal(compute_lexical_matching_score(others, a), [[8], [0], [0]])


vectors = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.just(4)), elements=st.floats(-1, 1, width=32, allow_subnormal=False)
)


@given(query=vectors, passage=vectors)
def test_a_colbert_score_is_the_mean_of_each_query_tokens_best_match(query, passage):
    score = colbert_score(query, passage)
    best = [max(math.fsum(a * b for a, b in zip(q, p, strict=True)) for p in passage.tolist()) for q in query.tolist()]
    assert type(score) is float
    assert score == pytest.approx(math.fsum(best) / len(best), abs=1e-5)


def test_the_functions_are_found_on_the_embedder_as_in_flag_embedding(fp32):
    found = fp32.encode(TEXTS[:2], return_sparse=True, return_colbert_vecs=True)
    for function, way in ((compute_lexical_matching_score, "lexical_weights"), (colbert_score, "colbert_vecs")):
        assert getattr(fp32, function.__name__)(*found[way]) == function(*found[way])


def test_a_list_gives_lists_and_what_wasnt_asked_for_is_none(m3):
    found = m3.encode(TEXTS, return_sparse=True)
    assert found.keys() == {"dense_vecs", "lexical_weights", "colbert_vecs"}
    assert (found["dense_vecs"].shape, found["dense_vecs"].dtype) == ((5, 32), np.float32)
    assert [type(weights) for weights in found["lexical_weights"]] == [dict] * 5
    assert found["colbert_vecs"] is None
    found = m3.encode(TEXTS, return_dense=False, return_colbert_vecs=True)
    assert found["dense_vecs"] is found["lexical_weights"] is None
    assert [rows.shape for rows in found["colbert_vecs"]] == [(count - 1, 32) for count in m3.count_tokens(TEXTS)]
    assert {rows.dtype for rows in found["colbert_vecs"]} == {np.dtype(np.float32)}


def test_a_str_gives_what_it_has_in_a_list(m3):
    every = dict(return_sparse=True, return_colbert_vecs=True)
    one, several = m3.encode(TEXTS[0], **every), m3.encode(TEXTS, **every)
    assert one["dense_vecs"].shape == (32,)
    assert one["lexical_weights"] == several["lexical_weights"][0]
    for way in ("dense_vecs", "colbert_vecs"):
        np.testing.assert_array_equal(one[way], several[way][0])


def test_no_texts_give_empty_results(fp32):
    found = fp32.encode([], return_sparse=True, return_colbert_vecs=True)
    assert (found["dense_vecs"].shape, found["lexical_weights"], found["colbert_vecs"]) == ((0, 32), [], [])


def test_lexical_weights_are_of_the_texts_own_tokens_and_no_special_ones(m3):
    for text, weights in zip(TEXTS, m3.encode(TEXTS, return_sparse=True)["lexical_weights"], strict=True):
        (ids,) = m3._tokenizer.encode([text])
        assert weights.keys() <= {str(token) for token in set(ids) - set(m3.manifest.skipped_ids)}
        assert all(type(weight) is float and weight > 0 for weight in weights.values())
        assert bool(weights) == bool(text)


def test_every_way_is_the_same_to_the_bit_in_any_batch(m3):
    every = dict(return_sparse=True, return_colbert_vecs=True)
    texts = TEXTS + [f"{' '.join(random.Random(i).choices('abcdef', k=12))}" for i in range(40)]
    whole = m3.encode(texts, **every)
    mixed = random.Random(0).sample(range(len(texts)), k=25)
    some = m3.encode([texts[i] for i in mixed], **every)
    for place, i in enumerate(mixed):
        assert some["lexical_weights"][place] == whole["lexical_weights"][i]
        for way in ("dense_vecs", "colbert_vecs"):
            np.testing.assert_array_equal(some[way][place], whole[way][i])


def test_splade_has_lexical_weights_alone(splade):
    found = splade.encode(TEXTS, return_dense=False, return_sparse=True)
    assert found["dense_vecs"] is found["colbert_vecs"] is None
    assert found["lexical_weights"][0] == found["lexical_weights"][4]
    matrix = sparse_matrix(found["lexical_weights"], splade.dim)
    scores = compute_lexical_matching_score(found["lexical_weights"], found["lexical_weights"])
    np.testing.assert_allclose(scores, (matrix @ matrix.T).toarray(), rtol=1e-4)
    one = splade.encode(TEXTS[0], return_dense=False, return_sparse=True)["lexical_weights"]
    assert one == found["lexical_weights"][0]


weight = st.floats(0, 5)


@given(weights=st.tuples(weight, weight, weight).filter(lambda weights: weights[0] + weights[1] > 0.01))
@settings(deadline=None, max_examples=25)
def test_scores_are_weighted_as_flag_embedding_weights_them(m3, weights):
    scores = m3.compute_score(PAIRS, weights_for_different_modes=weights)
    dense, sparse, colbert = (np.array(scores[way]) for way in ("dense", "sparse", "colbert"))
    w = weights
    np.testing.assert_allclose(scores["sparse+dense"], (dense * w[0] + sparse * w[1]) / (w[0] + w[1]), rtol=1e-6)
    everything = (dense * w[0] + sparse * w[1] + colbert * w[2]) / sum(w)
    np.testing.assert_allclose(scores["colbert+sparse+dense"], everything, rtol=1e-6)


def test_scores_are_made_of_what_encode_gives(m3):
    scores = m3.compute_score(PAIRS)
    every = dict(return_sparse=True, return_colbert_vecs=True)
    for i, pair in enumerate(PAIRS):
        q, p = (m3.encode(text, **every) for text in pair)
        assert scores["dense"][i] == pytest.approx(float(q["dense_vecs"] @ p["dense_vecs"]), abs=1e-6)
        sparse = compute_lexical_matching_score(q["lexical_weights"], p["lexical_weights"])
        assert scores["sparse"][i] == pytest.approx(sparse, abs=1e-6)
        assert scores["colbert"][i] == pytest.approx(colbert_score(q["colbert_vecs"], p["colbert_vecs"]), abs=1e-6)
    assert all(type(score) is float for values in scores.values() for score in values)
    assert m3.compute_score(PAIRS) == m3.compute_score(PAIRS, weights_for_different_modes=[1, 1, 1])


def test_one_pair_gives_floats_and_no_pairs_empty_lists(fp32):
    one, several = fp32.compute_score(PAIRS[0]), fp32.compute_score(PAIRS)
    assert {way: type(score) for way, score in one.items()} == dict.fromkeys(several, float)
    assert one == pytest.approx({way: scores[0] for way, scores in several.items()})
    assert fp32.compute_score([]) == dict.fromkeys(several, [])


def test_weights_that_leave_dense_and_sparse_out_are_no_division_by_zero(m3):
    scores = m3.compute_score(PAIRS, weights_for_different_modes=(0, 0, 1))
    assert scores["sparse+dense"] == [0] * len(PAIRS)
    assert scores["colbert+sparse+dense"] == pytest.approx(scores["colbert"])


@pytest.mark.parametrize(
    "weights",
    [(), (1, 1), (1, 1, 1, 1), (0, 0, 0), (1, 1, -3), (math.nan, 1, 1), "abc", ["1", "1", "1"], 7, np.array(1.0)],
    ids=repr,
)
def test_bad_weights_are_refused_by_name(fp32, weights):
    with pytest.raises(InputError, match="weights_for_different_modes is"):
        fp32.compute_score(PAIRS, weights_for_different_modes=weights)


def test_weights_of_none_are_the_default_as_in_flag_embedding(fp32):
    assert fp32.compute_score(PAIRS, weights_for_different_modes=None) == fp32.compute_score(PAIRS)


@pytest.mark.parametrize(
    ("pairs", "says"),
    [([("a", "b"), ("a", 7)], "pair 1 is"), ("a text", "pair 0 is"), (7, "is int"), ([("a", "\ud800")], "surrogate")],
    ids=ascii,
)
def test_what_isnt_a_pair_is_refused_by_name(fp32, pairs, says):
    with pytest.raises(InputError, match=says) as caught:
        fp32.compute_score(pairs)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("asked", "missing"),
    [(dict(return_sparse=True), "lexical_weights"), (dict(return_colbert_vecs=True), "colbert_vecs")],
    ids=["sparse", "token vectors"],
)
@pytest.mark.parametrize("alone", [True, False])
def test_an_output_that_a_dense_model_lacks_is_refused_by_name(dense, asked, missing, alone):
    with pytest.raises(InputError, match=f"^tiny-bert has no {missing}, only dense_vecs; "):
        dense.encode("a text", return_dense=not alone, **asked)


def test_scores_in_three_ways_are_refused_of_a_dense_model(dense):
    with pytest.raises(InputError, match="^tiny-bert has no lexical_weights, only dense_vecs; "):
        dense.compute_score(PAIRS)


def test_a_run_of_a_splade_has_a_quarter_of_the_tokens(tiny_splade):
    """Each of which takes as many floats as there are words."""
    runs = []
    splade = Embedder(tiny_splade, device="cpu", hook=lambda metric, value: metric == "tokens" and runs.append(value))
    splade.encode(["a " * 62] * 20, return_dense=False, return_sparse=True)
    assert runs == [512, 512, 256]


@pytest.mark.parametrize("method", ["encode", "encode_queries", "encode_corpus"])
def test_dense_vectors_are_refused_of_a_splade(splade, method):
    with pytest.raises(InputError, match="^splade has no dense_vecs, only lexical_weights; "):
        getattr(splade, method)(TEXTS)
    with pytest.raises(InputError, match="has no dense_vecs"):
        list(splade.encode_iter(TEXTS))


def test_asking_for_nothing_is_refused(fp32):
    with pytest.raises(InputError, match="nothing to return"):
        fp32.encode(TEXTS, return_dense=False)


@pytest.mark.parametrize("option", [dict(truncate_dim=8), dict(chunk=True)], ids=["truncate_dim", "chunk"])
def test_an_option_of_dense_vectors_alone_is_not_silently_dropped(fp32, option):
    (name,) = option
    with pytest.raises(InputError, match=name):
        fp32.encode(TEXTS, return_sparse=True, **option)


def test_a_text_too_long_is_refused_on_request_and_cut_otherwise(fp32):
    long = "a " * 99
    with pytest.raises(InputError, match="^text 1 has [0-9]+ tokens where the model takes 64"):
        fp32.encode(["a", long], return_sparse=True, truncate=False)
    assert fp32.encode(long, return_dense=False, return_colbert_vecs=True)["colbert_vecs"].shape == (63, 32)


def test_dense_vectors_that_are_asked_for_come_in_a_dict(fp32):
    """As ``BGEM3FlagModel``'s do; those that weren't come as ``FlagModel``'s."""
    found = fp32.encode(["a river", "bread"], return_dense=True)
    assert list(found) == ["dense_vecs", "lexical_weights", "colbert_vecs"]
    np.testing.assert_array_equal(found["dense_vecs"], fp32.encode(["a river", "bread"]))
    assert found["lexical_weights"] is found["colbert_vecs"] is None


def test_a_text_without_tokens_has_nothing_of_each_representation(fp32, monkeypatch):
    """Only tokenizers without special tokens give such."""
    monkeypatch.setattr(fp32._tokenizer, "encode", lambda texts, truncate: [[], [0, 5, 2]])
    found = fp32.encode(["", "a"], return_dense=True, return_sparse=True, return_colbert_vecs=True)
    assert not found["dense_vecs"][0].any()
    assert found["dense_vecs"][1].any()
    assert found["lexical_weights"][0] == {}
    assert found["colbert_vecs"][0].shape == (0, 32)


def test_scipy_that_is_missing_is_an_error_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(BgeOnnxError, match="pip install scipy"):
        sparse_matrix([], 10)
