"""Scores are FlagEmbedding's, don't depend on anything but their own pair, and bad input is refused by name."""

import csv
import functools
import logging
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import torch
import transformers
from conftest import SHARED, flag_embedding_pair, reseal
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from runtime import ArtifactError, Embedder, InputError, Reranker

LONG = "the river runs down to the sea and the horse stands by the tower " * 12
PAIRS = [
    ("a river of light", "The light of the river, seen from the tower."),
    ("what is bread?", "Bread is baked of flour, water and salt."),
    ("", "a passage without a query"),
    ("a query without a passage", ""),
    ("", ""),
    ("short", LONG),
    (LONG, "short"),
    (LONG, ""),
    ("", LONG),
    (LONG, LONG),
    ("the horse stands by the tower and the river runs down to the sea " * 2, "fits beside a query that is cut"),
    ("naïve café, 3.14%", "zwölf Boxkämpfer\tjagen 山 🙈 \0"),
]


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def paths(request, tiny_reranker):
    """The artifact and the checkpoint of a tiny reranker of each family."""
    return tiny_reranker(request.param)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def reranker(request, paths):
    return Reranker(paths[0], request.param, device="cpu")


@pytest.fixture(scope="module")
def tiny(tiny_reranker):
    """One reranker, for what isn't about numbers."""
    return Reranker(tiny_reranker("bert")[0], "fp32", device="cpu")


@pytest.fixture(scope="module")
def alone(reranker):
    """A function that scores a pair all by itself, and remembers the score."""
    return functools.cache(reranker.compute_score)


@pytest.fixture(scope="module")
def original(paths):
    """A function of a pair: what FlagEmbedding's reranker feeds to transformers, and the logit it gets."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(paths[1])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(paths[1]).eval()

    def ask(query: str, passage: str):
        inputs = flag_embedding_pair(tokenizer, query, passage, 64)
        with torch.inference_mode():
            return inputs, float(model(**{name: torch.tensor([row]) for name, row in inputs.items()}).logits[0, 0])

    return ask


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0][:12]}-{pair[1][:12]}")
def test_a_logit_is_that_of_transformers(paths, original, pair):
    inputs, expected = original(*pair)
    assert Reranker(paths[0], "fp32").compute_score(pair) == pytest.approx(expected, abs=1e-4)
    assert len(inputs["input_ids"]) <= 64


def test_int8_scores_order_pairs_as_transformers_do(paths, original):
    from export.verify import verification_pairs, verification_texts

    pairs = verification_pairs(verification_texts())
    scores = Reranker(paths[0], "int8").compute_score(pairs)
    assert spearmanr(scores, [original(*pair)[1] for pair in pairs]).statistic > 0.97


def test_a_bert_tells_the_passage_by_its_token_types(tiny_reranker):
    artifact, checkpoint = tiny_reranker("bert")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    reranker = Reranker(artifact, "fp32")
    ((ids, types),) = reranker._tokenizer.encode_pairs([PAIRS[0]])
    border = ids.index(3) + 1
    assert types == [0] * border + [1] * (len(ids) - border)
    with torch.inference_mode():
        with_types = float(model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits)
        without = float(model(torch.tensor([ids])).logits)
    assert reranker.compute_score(PAIRS[0]) == pytest.approx(with_types, abs=1e-4)
    assert abs(with_types - without) > 0.01  # or the test would show nothing


@given(batch=st.lists(st.sampled_from(PAIRS), min_size=1, max_size=16))
@settings(deadline=None, max_examples=30)
def test_a_score_is_the_same_to_the_bit_alone_and_in_any_batch(reranker, alone, batch):
    assert reranker.compute_score(batch) == [alone(pair) for pair in batch]


def pairs_of_one_length(count: int) -> list[tuple[str, str]]:
    """Different pairs of as many tokens, which run together."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrst"
    return [(" ".join(draw.choices(letters, k=5)), " ".join(draw.choices(letters, k=20))) for _ in range(count)]


def test_a_score_is_the_same_to_the_bit_in_runs_of_every_size(reranker):
    pairs = pairs_of_one_length(300)
    whole = reranker.compute_score(pairs)
    assert len(set(whole)) > 250
    for size in (1, 2, 3, 7, 64):
        assert reranker.compute_score(pairs[:size]) == whole[:size]
    mixed = random.Random(1).sample(range(300), k=300)
    assert reranker.compute_score([pairs[i] for i in mixed]) == [whole[i] for i in mixed]


def test_a_score_is_the_same_to_the_bit_from_eight_threads(reranker):
    pairs = PAIRS + pairs_of_one_length(12)
    expected = dict(zip(pairs, reranker.compute_score(pairs), strict=True))
    shuffled = [random.Random(seed).sample(pairs, k=1 + seed % len(pairs)) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for batch, scores in zip(shuffled, pool.map(reranker.compute_score, shuffled), strict=True):
            assert scores == [expected[pair] for pair in batch]


def test_one_pair_gives_a_float_and_several_a_list_of_floats(tiny):
    score = tiny.compute_score(("a query", "a passage"))
    assert type(score) is float
    assert tiny.compute_score(["a query", "a passage"]) == score  # FlagEmbedding takes a pair as a list
    several = tiny.compute_score([("a query", "a passage"), ["another", "one"]])
    assert [type(value) for value in several] == [float, float]
    assert several[0] == score
    assert tiny.compute_score([("a query", "a passage")]) == [score]
    assert tiny.compute_score(pair for pair in [("a query", "a passage")]) == [score]
    assert tiny.compute_score(np.array([["a query", "a passage"]])) == [score]


def test_no_pairs_have_no_scores(tiny):
    assert tiny.compute_score([]) == tiny.compute_score(()) == tiny.compute_score([], normalize=True) == []


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.array(logits, np.float64)))


@pytest.fixture
def amplified(tiny_reranker, copied):
    """A function that opens a reranker whose logits are multiplied, once they lie around 0."""

    def open_(factor: float) -> Reranker:
        folder = copied(tiny_reranker("bert")[0])
        middle = np.median(Reranker(folder, "fp32", "cpu").compute_score(PAIRS))
        model = onnx.load(folder / "model.fp32.onnx")
        for name, value in (("middle", middle), ("factor", factor)):
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.float32), name))
        (head,) = [node for node in model.graph.node if "logits" in node.output]
        head.output[0] = "given"
        model.graph.node.append(onnx.helper.make_node("Sub", ["given", "middle"], ["small"]))
        model.graph.node.append(onnx.helper.make_node("Mul", ["small", "factor"], ["logits"]))
        onnx.save(model, folder / "model.fp32.onnx")
        return Reranker(reseal(folder), "fp32")

    return open_


def test_normalized_scores_are_the_sigmoid_of_the_logits(amplified):
    small = amplified(1)
    logits, scores = small.compute_score(PAIRS), small.compute_score(PAIRS, normalize=True)
    assert min(logits) < 0 < max(logits)
    np.testing.assert_allclose(scores, sigmoid(logits), rtol=1e-6)
    one = small.compute_score(PAIRS[0], normalize=True)
    assert (type(one), one) == (float, scores[0])


def test_extreme_logits_are_normalized_without_overflow(amplified):
    extreme = amplified(1e6)
    logits, scores = extreme.compute_score(PAIRS), extreme.compute_score(PAIRS, normalize=True)  # warnings are errors
    assert min(logits) < -1000 and max(logits) > 1000
    for logit, score in zip(logits, scores, strict=True):
        assert score == (0 if logit < -1000 else 1 if logit > 1000 else pytest.approx(sigmoid(logit), rel=1e-5))


def test_normalizing_does_not_change_the_order_of_large_logits(amplified):
    """A sigmoid in float32 is 1 from 17 on, where many a reranker's good passages are."""
    large = amplified(20)
    passages = [passage for _, passage in pairs_of_one_length(40)]
    order = [i for i, _ in large.rank("a query", passages)]
    assert [i for i, _ in large.rank("a query", passages, normalize=True)] == order


def test_passages_are_ranked_best_first_and_equal_ones_in_their_order(tiny):
    passages = [passage for _, passage in pairs_of_one_length(20)] * 2
    ranked = tiny.rank("a query", passages)
    scores = tiny.compute_score([("a query", passage) for passage in passages])
    assert ranked == sorted(enumerate(scores), key=lambda entry: (-entry[1], entry[0]))
    assert [type(value) for value in ranked[0]] == [int, float]
    order = [i for i, _ in ranked]
    assert all(order.index(i) + 1 == order.index(i + 20) for i in range(20))


@pytest.mark.parametrize("top_k", [1, 3, 12, 99])
def test_top_k_keeps_the_best(tiny, top_k):
    passages = [passage for _, passage in PAIRS]
    assert tiny.rank("a query", passages, top_k) == tiny.rank("a query", passages)[:top_k]


def test_no_passages_are_ranked_as_none(tiny):
    with pytest.raises(InputError, match="passages is empty"):
        tiny.rank("a query", [])


def test_ranked_scores_are_normalized_on_request(tiny):
    passages = [passage for _, passage in PAIRS[:4]]
    raw, normalized = tiny.rank("a query", passages), tiny.rank("a query", passages, normalize=True)
    assert [i for i, _ in normalized] == [i for i, _ in raw]
    np.testing.assert_allclose([score for _, score in normalized], sigmoid([score for _, score in raw]), rtol=1e-6)


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ("a text", "pair 0 is 'a'"),
        (("one text",), "pair 0 is 'one text'"),
        (("a", "b", "c"), "pair 0 is 'a'"),
        ([("a", "b"), ("a", "b", "c")], "pair 1 is"),
        ([("a", "b"), ("a",)], "pair 1 is"),
        ([("a", "b"), ()], "pair 1 is"),
        ([("a", "b"), "ab"], "pair 1 is 'ab'"),
        ([("a", "b"), b"ab"], "pair 1 is"),
        ([("a", "b"), ("a", 7)], "pair 1 is"),
        ([("a", None)], "pair 0 is"),
        ([(b"a", "b")], "pair 0 is"),
        (("a", None), "pair 0 is 'a'"),
        ([("a\nb", 7)], "pair 0 is"),
        ([7], "pair 0 is '7'"),
        ([np.array("a")], "pair 0 is"),
        ([None], "pair 0 is 'None'"),
        (7, "is int"),
        (None, "is NoneType"),
        (b"bytes", "is bytes"),
        ([{"query": "a", "passage": "b"}], "pair 0 is"),
        ([{"a", "b"}], "pair 0 is"),
        ([("a", "b"), ("a", "\ud800")], "pair 1 .*lone surrogate"),
        ([("a", "b"), ("a", "b"), ("c\udfff", "b")], "pair 2 .*lone surrogate"),
        ([("a", "b"), (LONG, LONG)], "pair 1 has [0-9]+ tokens where the model takes 64"),
        ([("a", LONG)], "pair 0 has [0-9]+ tokens"),
        (("a " * 49, "b"), "pair 0 has 53 tokens where the model takes 64 .a query 48 of them"),
    ],
    ids=ascii,
)
def test_what_cant_be_scored_is_refused_by_name(tiny, pairs, says):
    with pytest.raises(InputError, match=says) as caught:
        tiny.compute_score(pairs, truncate=False)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 250


def test_what_just_fits_is_not_refused(tiny, caplog):
    assert isinstance(tiny.compute_score(("a " * 48, "b " * 13), truncate=False), float)
    assert not caplog.records


@pytest.mark.parametrize("piece", [2, 100])
def test_pairs_that_are_cut_are_logged_once_a_call(tiny, caplog, monkeypatch, piece):
    monkeypatch.setattr("runtime.model.PIECE", piece)
    with caplog.at_level(logging.WARNING, "runtime"):
        tiny.compute_score([("a", LONG), ("a", "b"), (LONG, "b")])
    assert [record.getMessage() for record in caplog.records] == ["2 of 3 pairs had more than 64 tokens and were cut"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((7, ["a"]), "query is int"),
        ((None, ["a"]), "query is NoneType"),
        ((["a query"], ["a"]), "query is list"),
        (("a query", "a passage"), "passages is one str"),
        (("a query", 7), "is int"),
        (("a query", None), "is NoneType"),
        (("a query", b"bytes"), "is bytes"),
        (("a query", ["a", 7]), "1 is int"),
        (("a query", ["a", ("b", "c")]), "1 is tuple"),
        (("a query", ["a"], 0), "top_k is 0"),
        (("a query", [], 0), "top_k is 0"),
        (("a query", ["a"], -1), "top_k is -1"),
        (("a query", ["a"], 1.5), "top_k is 1.5"),
        (("a query\ud800", ["a"]), "(query|pair 0) .*lone surrogate"),
        (("a query", ["a", "b", "\ud800"]), " 2 .*lone surrogate"),
    ],
    ids=ascii,
)
def test_what_cant_be_ranked_is_refused_by_name(tiny, arguments, says):
    with pytest.raises(InputError, match=says) as caught:
        tiny.rank(*arguments)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("open_", "right"), [(Embedder, "Reranker"), (Reranker, "Embedder")])
def test_the_wrong_class_is_an_error_that_names_the_right_one(tiny_artifact, tiny_reranker, open_, right):
    folder = tiny_artifact if open_ is Reranker else tiny_reranker("bert")[0]
    with pytest.raises(ArtifactError, match=f"open it with {right}$") as caught:
        open_(folder)
    assert str(caught.value).startswith(f"{folder}: ")


def test_auto_takes_int8_and_attributes_say_what_was_loaded(tiny_reranker):
    reranker = Reranker(str(tiny_reranker("bert")[0]), device="cpu", threads=1)
    assert (reranker.variant, reranker.max_length, reranker.manifest.kind) == ("int8", 64, "reranker")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The artifact of a small reranker that was really trained, fp32 and int8, and the Spearman its README gives."""
    from export.pipeline import export_model

    checkpoint = SHARED / "models" / "minilm-stsb-reranker"
    if not checkpoint.exists():
        pytest.skip(f"needs {checkpoint}")
    figure = re.search(r"Spearman on STS-B test is \*\*([\d.]+)", (checkpoint / "README.md").read_text("utf-8"))[1]
    return export_model(str(checkpoint), tmp_path_factory.mktemp("trained") / "out").path, float(figure)


@pytest.fixture(scope="module")
def stsb():
    """STS-B's test pairs and their human scores."""
    file = SHARED / "data" / "stsb" / "stsb-en-test.csv"
    if not file.exists():
        pytest.skip(f"needs {file}")
    with file.open(encoding="utf-8", newline="") as stream:
        left, right, gold = zip(*csv.reader(stream), strict=True)
    return list(zip(left, right, strict=True)), np.array(gold, float)


@pytest.mark.long
def test_a_trained_rerankers_quality_is_kept(trained, stsb):
    (artifact, figure), (pairs, gold) = trained, stsb
    fp32, int8 = (Reranker(artifact, variant).compute_score(pairs) for variant in ("fp32", "int8"))
    quality, quality_of_int8 = (100 * spearmanr(scores, gold).statistic for scores in (fp32, int8))
    assert quality == pytest.approx(figure, abs=0.02)
    assert quality_of_int8 == pytest.approx(quality, abs=0.3)
    assert spearmanr(int8, fp32).statistic >= 0.995


@pytest.mark.long
@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_trained_rerankers_scores_are_the_same_to_the_bit_in_any_batch(trained, stsb, variant):
    reranker, pairs = Reranker(trained[0], variant), stsb[0][:300]
    scores = reranker.compute_score(pairs)
    mixed = random.Random(0).sample(range(len(pairs)), k=150)
    assert reranker.compute_score([pairs[i] for i in mixed]) == [scores[i] for i in mixed]
    assert [reranker.compute_score(pair) for pair in pairs[:40]] == scores[:40]
