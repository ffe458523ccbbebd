"""Every family that is built gives what transformers gives, in each of its outputs, and int8 stays close."""

import dataclasses
import json
import math
import shutil

import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
import torch
import transformers
from conftest import graph_of, make_checkpoint, make_splade, save_unigram, sizes, tiny_bert_config, tiny_xlmr_config

from export.calibrate import collect
from export.errors import ExportError
from export.families import find_family
from export.graph import float_value, load_graph
from export.pipeline import export_model
from export.quantize import find_linears, quantize_graph, quantize_linears
from export.verify import cosines
from runtime import Embedder, Reranker
from runtime.session import create_session

VARIANTS = ["fp32", "int8"]
pytestmark = pytest.mark.usefixtures("few_texts")

CONFIGS = {
    "bert": tiny_bert_config,
    "roberta": lambda **changes: transformers.RobertaConfig(**sizes(max_position_embeddings=66) | changes),
    "xlm-roberta": tiny_xlmr_config,
    "camembert": lambda **changes: transformers.CamembertConfig(**sizes(max_position_embeddings=66) | changes),
    "distilbert": lambda **changes: transformers.DistilBertConfig(
        vocab_size=1000, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64, **changes
    ),
    "mpnet": lambda **changes: transformers.MPNetConfig(**sizes(max_position_embeddings=66) | changes),
    "modernbert": lambda **changes: transformers.ModernBertConfig(
        **sizes(num_hidden_layers=4, local_attention=8, max_position_embeddings=512),
        **dict(pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3),
        **changes,
    ),
}
UNIGRAM = ("xlm-roberta", "camembert")
LAST_LAYERS = [*((family, {}) for family in CONFIGS), ("modernbert", {"layers": 3})]
"""Every family's, and ModernBERT's third layer, which is local."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function that makes a checkpoint of a family, once for each."""
    made = {}

    def make(family: str, head: str = "", spread: float = 0.1, **changes):
        key = family, head, spread, *changes.items()
        if key not in made:
            folder = tmp_path_factory.mktemp(family) / f"{family}{head}"
            tokenizer = {"tokenizer": save_unigram} if family in UNIGRAM else {}
            made[key] = make_checkpoint(
                folder,
                CONFIGS[family](**changes),
                None if head else "mean",
                head=head or "Model",
                spread=spread,
                **tokenizer,
            )
        return made[key]

    return make


@pytest.mark.parametrize("family", CONFIGS)
def test_an_embedder_is_built_and_has_the_vectors_of_transformers(checkpoint, tmp_path, family):
    assert find_family(family)
    artifact = export_model(str(checkpoint(family)), tmp_path / "out")
    parity = {name: variant.parity for name, variant in artifact.manifest.variants.items()}
    assert parity["fp32"].cosine_min > 0.99999
    assert parity["int8"].cosine_mean > 0.99
    assert [entry.name for entry in load_graph(artifact.path / "model.fp32.onnx").inputs] == ["input_ids"]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_reranker_has_the_logits_of_transformers(checkpoint, tmp_path, family):
    folder = checkpoint(family, "ForSequenceClassification", num_labels=1)
    artifact = export_model(str(folder), tmp_path / "out", ["fp32"])
    parity = artifact.manifest.variants["fp32"].parity
    assert parity.score_max_diff < 1e-4
    assert parity.score_spearman > 0.9999
    assert (artifact.manifest.kind, artifact.manifest.outputs, artifact.manifest.dim) == ("reranker", ("logits",), 1)


@pytest.mark.parametrize("family", ["modernbert", "bert"])
@pytest.mark.parametrize("types", [True, False])
def test_a_reranker_whose_tokenizer_transformers_has_no_class_for_gets_its_special_tokens(
    checkpoint, tmp_path, family, types
):
    folder = shutil.copytree(checkpoint(family, "ForSequenceClassification", num_labels=1), tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = ["input_ids", "attention_mask"] + ["token_type_ids"] * types
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    artifact = export_model(str(folder), tmp_path / "out", ["fp32"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)("bread", "a wheel", return_tensors="pt")
    accepted = {name: value for name, value in inputs.items() if family == "bert" or name != "token_type_ids"}
    with torch.inference_mode():
        expected = model(**accepted).logits.item()
    assert inputs["input_ids"][0, 0] == 2  # [CLS]
    assert Reranker(artifact.path, "fp32").compute_score(("bread", "a wheel")) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["roberta", "mpnet", "bert"])
def test_the_words_head_of_a_splade_has_the_activation_of_transformers(checkpoint, tmp_path, family):
    folder = make_splade(checkpoint(family, "ForMaskedLM", 0.3, hidden_act="relu"))
    artifact = export_model(str(folder), tmp_path / "out", ["fp32"])
    assert artifact.manifest.variants["fp32"].parity.sparse_max_diff < 1e-4


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "modernbert"])
def test_a_splade_has_the_weights_of_transformers(checkpoint, tmp_path, family):
    folder = make_splade(checkpoint(family, "ForMaskedLM"))
    artifact = export_model(str(folder), tmp_path / "out")
    parity = {name: variant.parity for name, variant in artifact.manifest.variants.items()}
    assert parity["fp32"].sparse_max_diff < 1e-4
    assert artifact.manifest.outputs == ("vocabulary_weights",)
    weights = Embedder(artifact.path, "fp32").encode("a text", return_dense=False, return_sparse=True)[
        "lexical_weights"
    ]
    assert all(value > 0 for value in weights.values())
    assert all(0 <= int(token) < 1000 for token in weights)


@pytest.mark.parametrize(("family", "changes"), LAST_LAYERS)
def test_with_cls_pooling_the_last_layer_makes_first_states_alone(checkpoint, tmp_path, family, changes):
    folder = checkpoint(family, spread=0.3)
    pooled, config = graph_of(folder, "cls", **changes)
    last = [node.output[0] for node in pooled.nodes if node.op_type == "Gemm"][-1]
    pooled.outputs.append(float_value(last, None, None))
    for name, graph in (("pooled", pooled), ("whole", graph_of(folder, **changes)[0])):
        graph.save(tmp_path / f"{name}.onnx")
    pooled, whole = (
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("pooled", "whole")
    )
    for texts, tokens in ((1, 1), (3, 2), (5, 7), (2, 60)):
        ids = np.random.default_rng(tokens).integers(5, 900, (texts, tokens))
        vectors, rows = pooled.run(None, {"input_ids": ids})
        assert (vectors.shape, rows.shape) == ((texts, config.hidden), (texts, config.hidden))
        np.testing.assert_allclose(vectors, whole.run(None, {"input_ids": ids})[0][:, 0], atol=2e-5)
        alone = [pooled.run(None, {"input_ids": ids[i : i + 1]})[0][0] for i in range(texts)]
        np.testing.assert_array_equal(vectors, alone)


@pytest.mark.parametrize(("family", "changes"), LAST_LAYERS)
def test_so_it_does_in_int8_with_the_same_bits_in_any_batch(checkpoint, tmp_path, monkeypatch, family, changes):
    fp32, _ = graph_of(checkpoint(family), "cls", **changes)
    draw = np.random.default_rng(0)
    texts = [(draw.integers(5, 900, 30).tolist(), [0] * 30) for _ in range(60)]
    inputs = dict.fromkeys(linear.input for linear in find_linears(fp32))
    quantized = quantize_linears(fp32, collect(fp32, list(inputs), texts))
    quantize_graph(fp32, quantized).save(tmp_path / "int8.onnx")
    monkeypatch.setattr("export.quantize.unfold_rows", lambda graph: graph)
    quantize_graph(fp32, quantized).save(tmp_path / "in-rows.onnx")
    fp32.save(tmp_path / "fp32.onnx")
    fp32, int8, in_rows = (create_session(tmp_path / f"{name}.onnx", "cpu", 2) for name in ("fp32", "int8", "in-rows"))
    for count, tokens in ((1, 1), (5, 7), (2, 60)):
        ids = draw.integers(5, 900, (count, tokens))
        (vectors,) = int8.run(None, {"input_ids": ids})
        np.testing.assert_array_equal(vectors, in_rows.run(None, {"input_ids": ids})[0])
        alone = [int8.run(None, {"input_ids": ids[i : i + 1]})[0][0] for i in range(count)]
        np.testing.assert_array_equal(vectors, alone)
        if tokens > 1:  # calibration has seen no text of a single token
            assert cosines(vectors, fp32.run(None, {"input_ids": ids})[0]).min() > 0.99


def hidden_states(folder, ids, tmp_path, **changes):
    """What our graph and transformers give for token ids, none of them masked; ``changes`` are of our configuration."""
    graph_of(folder, **changes)[0].save(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        theirs = model(torch.tensor(ids), attention_mask=torch.ones(*ids.shape)).last_hidden_state.numpy()
    return session.run(None, {"input_ids": ids})[0], theirs


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "mpnet"])
def test_a_padding_token_written_in_a_text_takes_no_place(checkpoint, tmp_path, family):
    ids = np.array([[5, 9, 1, 77, 1, 1, 13], [8, 8, 8, 1, 500, 4, 3]], np.int64)
    ours, theirs = hidden_states(checkpoint(family), ids, tmp_path)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_mpnets_buckets_are_those_of_transformers_at_every_distance(checkpoint, tmp_path):
    folder = checkpoint("mpnet", max_position_embeddings=514)
    ids = np.random.default_rng(0).integers(5, 1000, (1, 512))
    ours, theirs = hidden_states(folder, ids, tmp_path)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


BIASES = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)


@pytest.mark.parametrize(
    "changes",
    [{"classifier_pooling": "mean"}, BIASES, {"hidden_activation": "silu", "classifier_activation": "relu"}],
    ids=["mean", "biases", "activations"],
)
def test_a_modernbert_of_another_shape_has_the_logits_of_transformers(checkpoint, tmp_path, changes):
    folder = checkpoint("modernbert", "ForSequenceClassification", 0.3, num_labels=1, **changes)
    artifact = export_model(str(folder), tmp_path / "out", ["fp32"])
    assert artifact.manifest.variants["fp32"].parity.score_max_diff < 1e-4


@pytest.mark.parametrize("block", [1, 8, 128])
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 15, 16, 17, 63, 255, 256, 257, 300, 512])
def test_modernberts_blocks_see_what_its_tokens_see(checkpoint, tmp_path, monkeypatch, block, tokens):
    monkeypatch.setattr("export.prenorm.BLOCK", block)
    ids = np.random.default_rng(tokens).integers(5, 1000, (3, tokens))
    ours, theirs = hidden_states(checkpoint("modernbert", spread=0.2), ids, tmp_path)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for i in range(3):
        np.testing.assert_array_equal(session.run(None, {"input_ids": ids[i : i + 1]})[0][0], ours[i])


@pytest.mark.parametrize(
    "mistake", [{"window": 6}, {"window": 10}, {"local_theta": 9e3}, {"global_theta": 1e5}, {"global_every": 2}]
)
def test_a_mistaken_window_or_theta_would_be_seen(checkpoint, tmp_path, mistake):
    ids = np.random.default_rng(0).integers(5, 1000, (1, 64))
    ours, theirs = hidden_states(checkpoint("modernbert", spread=0.2), ids, tmp_path, **mistake)
    assert np.abs(ours - theirs).max() > 1e-2


def test_all_linears_of_a_modernbert_become_int8_though_they_have_no_bias(checkpoint, tmp_path):
    artifact = export_model(str(checkpoint("modernbert")), tmp_path / "out", ["int8"])
    nodes = load_graph(artifact.path / "model.int8.onnx").nodes
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in nodes) == 7 * 4
    assert not any(node.op_type == "Gemm" for node in nodes)


def test_modernberts_thetas_are_read_as_transformers_5_writes_them_too():
    read, old = find_family("modernbert").config, CONFIGS["modernbert"]().to_dict()
    new = {key: value for key, value in old.items() if not key.endswith("rope_theta")}
    rope = {"full_attention": {"rope_theta": 5e4}, "sliding_attention": {"rope_theta": 3e3, "rope_type": "default"}}
    assert (read(old).global_theta, read(old).local_theta) == (160_000, 10_000)
    assert (read(old | {"local_rope_theta": None})).local_theta == 160_000
    assert read(new | {"rope_parameters": rope}) == dataclasses.replace(read(old), global_theta=5e4, local_theta=3e3)
    with pytest.raises(ExportError, match="rope_parameters scale"):
        read(new | {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}})


def test_a_modernbert_that_transformers_5_saved_is_that_of_before(checkpoint, tmp_path):
    folder = checkpoint("modernbert", spread=0.2, global_rope_theta=5e3, local_rope_theta=7e2)
    settings = json.loads((folder / "config.json").read_text())
    kinds = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
    rope = {kind: {"rope_type": "default", "rope_theta": settings.pop(name)} for kind, name in kinds.items()}
    saved = shutil.copytree(folder, tmp_path / folder.name)
    (saved / "config.json").write_text(json.dumps(settings | {"rope_parameters": rope}))
    graphs = [
        export_model(str(x), tmp_path / f"{i}", ["fp32"]).path / "model.fp32.onnx"
        for i, x in enumerate((folder, saved))
    ]
    assert graphs[0].read_bytes() == graphs[1].read_bytes()


def test_a_modernbert_whose_layers_are_local_in_another_order_is_refused():
    read, old = find_family("modernbert").config, CONFIGS["modernbert"]().to_dict()
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert read(old | {"layer_types": types}) == read(old)
    with pytest.raises(ExportError, match="layer_types"):
        read(old | {"layer_types": types[1:] + types[:1]})


@pytest.mark.parametrize(("family", "width"), [("bert", 32), ("distilbert", 32), ("xlm-roberta", 8)])
def test_bge_m3s_heads_stand_beside_other_families_and_may_be_narrow(checkpoint, tmp_path, family, width):
    folder = shutil.copytree(checkpoint(family), tmp_path / "m")
    for name, dim in (("sparse_linear", 1), ("colbert_linear", width)):
        torch.save(torch.nn.Linear(32, dim).state_dict(), folder / f"{name}.pt")
    artifact = export_model(str(folder), tmp_path / "out", VARIANTS)
    parity = artifact.manifest.variants["fp32"].parity
    assert parity.sparse_max_diff < 1e-4
    assert parity.colbert_cosine_min > 0.99999
    for variant in VARIANTS:
        found = Embedder(artifact.path, variant, "cpu").encode(["a text", ""], return_colbert_vecs=True)
        assert [vectors.shape[1] for vectors in found["colbert_vecs"]] == [width, width]


@pytest.mark.parametrize(
    ("sparse", "says"),
    [
        (lambda: torch.nn.Linear(24, 1).state_dict(), "sparse_linear.pt: takes states of 24 dimensions .* has 32"),
        (lambda: torch.ones(1, 32), "sparse_linear.pt: not a plain checkpoint of tensors"),
        (lambda: {"weight": torch.full((1, 32), math.nan), "bias": torch.ones(1)}, "sparse_linear.pt: holds NaN"),
    ],
)
def test_bge_m3s_heads_of_another_model_are_an_error(checkpoint, tmp_path, sparse, says):
    folder = shutil.copytree(checkpoint("bert"), tmp_path / "m")
    for name, state in (("sparse_linear", sparse()), ("colbert_linear", torch.nn.Linear(32, 32).state_dict())):
        torch.save(state, folder / f"{name}.pt")
    with pytest.raises(ExportError, match=says):
        export_model(str(folder), tmp_path / "out", ["fp32"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("head", "changes"), [("", {}), ("ForSequenceClassification", {"num_labels": 1})])
def test_a_model_that_gives_no_numbers_is_an_error_before_anything_is_rounded(
    checkpoint, tmp_path, recwarn, head, changes
):
    folder = shutil.copytree(checkpoint("bert", head, **changes), tmp_path / "m")
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    next(weight for name, weight in weights.items() if "layer.1.output.dense.weight" in name)[0, 0] = np.nan
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match="transformers itself gives NaN or infinity"):
        export_model(str(folder), tmp_path / "out")
    assert [warning for warning in recwarn if warning.category is RuntimeWarning] == []


def test_only_words_are_rounded_to_int8_not_mpnets_biases_nor_positions(checkpoint, tmp_path):
    folder = checkpoint("mpnet", vocab_size=1200, max_position_embeddings=1100)
    graph = load_graph(export_model(str(folder), tmp_path / "out", ["int8"]).path / "model.int8.onnx")
    assert graph.weights["embeddings.word.int8"]().shape == (1200, 32)
    assert graph.weights["attention_bias"]().dtype == graph.weights["embeddings.position"]().dtype == np.float32


@pytest.mark.parametrize(
    "setting", [{"hidden_activation": "tanh"}, {"classifier_activation": "tanh"}, {"rope_scaling": {"factor": 2.0}}]
)
def test_what_the_modernbert_family_cant_express_is_left_to_tracing(setting):
    assert find_family("modernbert").config(CONFIGS["modernbert"]().to_dict() | setting) is None


def test_bge_m3_gives_dense_sparse_and_token_vectors(tiny_m3):
    artifact = tiny_m3
    parity = artifact.manifest.variants["fp32"].parity
    assert parity.cosine_min > 0.99999
    assert parity.colbert_cosine_min > 0.99999
    assert parity.sparse_max_diff < 1e-4
    assert artifact.manifest.skipped_ids == (0, 1, 2, 3)
    assert artifact.manifest.variants["int8"].parity.cosine_mean > 0.99


def test_the_ways_come_together_or_alone_with_the_same_values(tiny_m3):
    embedder = Embedder(tiny_m3.path, "fp32")
    texts = ["a text", "another, that is longer", "a text"]
    whole = embedder.encode(texts, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    np.testing.assert_array_equal(whole["dense_vecs"], embedder.encode(texts))
    sparse = embedder.encode(texts, return_dense=False, return_sparse=True)
    assert (sparse["dense_vecs"], sparse["colbert_vecs"]) == (None, None)
    assert sparse["lexical_weights"] == whole["lexical_weights"]
    assert whole["lexical_weights"][0] == whole["lexical_weights"][2]
    single = embedder.encode(texts[1], return_dense=False, return_colbert_vecs=True)["colbert_vecs"]
    np.testing.assert_array_equal(single, whole["colbert_vecs"][1])
    assert single.shape == (embedder.count_tokens(texts[1]) - 1, 32)
    np.testing.assert_allclose(np.linalg.norm(single, axis=1), 1, atol=1e-5)


def test_bge_m3s_scores_are_the_weighted_means_of_its_three_ways(tiny_m3):
    embedder = Embedder(tiny_m3.path, "fp32")
    pairs = [("a text", "another, that is longer"), ("a text", "a text")]
    scores = embedder.compute_score(pairs, weights_for_different_modes=[0.4, 0.2, 0.4])
    for i in range(2):
        dense, sparse, colbert = scores["dense"][i], scores["sparse"][i], scores["colbert"][i]
        assert scores["sparse+dense"][i] == pytest.approx((0.4 * dense + 0.2 * sparse) / 0.6)
        assert scores["colbert+sparse+dense"][i] == pytest.approx(0.4 * dense + 0.2 * sparse + 0.4 * colbert)
    assert scores["dense"][1] == pytest.approx(1, abs=1e-5) == scores["colbert"][1]
    assert embedder.compute_score(pairs[0])["dense"] == pytest.approx(scores["dense"][0])


def test_a_reranker_with_more_than_one_label_is_refused(checkpoint, tmp_path):
    folder = checkpoint("bert", "ForSequenceClassification", num_labels=3)
    with pytest.raises(ExportError, match="3 labels"):
        export_model(str(folder), tmp_path / "out", ["fp32"])


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_a_rerankers_int8_ranks_as_its_fp32(checkpoint, tmp_path, family):
    folder = checkpoint(family, "ForSequenceClassification", 0.3, num_labels=1)  # so that scores differ
    artifact = export_model(str(folder), tmp_path / "out")
    assert artifact.manifest.variants["int8"].parity.score_spearman > 0.98
    assert isinstance(Reranker(artifact.path).compute_score(("a query", "a passage")), float)
