"""Architectures without a family are traced, then quantised and verified like the others."""

import json

import pytest
from conftest import make_checkpoint, sizes, tiny_bert_config

from export.errors import ExportError
from export.graph import load_graph
from export.pipeline import export_model
from export.quantize import find_linears

LAYERS = 2


def tiny_config(name: str):
    """A configuration of two layers and 32 dimensions."""
    import transformers

    if name == "relative-bert":
        return tiny_bert_config(position_embedding_type="relative_key")
    if name == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=1200, dim=32, n_layers=LAYERS, n_heads=4, hidden_dim=64, max_position_embeddings=64
        )
    assert name == "mpnet"
    sizes = dict(hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=64)
    return transformers.MPNetConfig(vocab_size=1200, max_position_embeddings=66, **sizes)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_linear_whose_input_has_other_rows_than_the_texts_tokens_becomes_int8(tmp_path):
    """DeBERTa's projects its table of relative positions, whatever the text."""
    import transformers

    config = transformers.DebertaV2Config(
        **sizes(max_position_embeddings=64, type_vocab_size=0, position_buckets=16, max_relative_positions=-1),
        **dict(relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=False, norm_rel_ebd="layer_norm"),
    )
    artifact = export_model(str(make_checkpoint(tmp_path / "deberta", config)), tmp_path / "out", ["int8"])
    assert artifact.manifest.variants["int8"].parity.cosine_mean > 0.99


@pytest.fixture(scope="module", params=["distilbert", "mpnet", "relative-bert"])
def traced(request, tmp_path_factory):
    """A traced artifact, fp32 and int8; of families that are built, too."""
    folder = tmp_path_factory.mktemp("traced")
    checkpoint = make_checkpoint(folder / request.param, tiny_config(request.param), pooling="cls")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.pipeline.find_family", lambda model_type: None)
        return export_model(str(checkpoint), folder / "artifact")


def test_a_traced_model_is_as_true_as_a_built_one(traced):
    parity = {name: variant.parity for name, variant in traced.manifest.variants.items()}
    assert parity["fp32"].cosine_min > 0.99999
    assert parity["int8"].cosine_mean > 0.99


def test_it_was_traced_and_gives_token_vectors_alone(traced):
    graph = load_graph(traced.path / "model.fp32.onnx")
    assert "attention_mask" in {entry.name for entry in graph.inputs}
    assert [entry.name for entry in graph.outputs] == ["last_hidden_state"]


def test_its_linears_are_found_with_their_bias_and_all_become_int8(traced):
    linears = find_linears(load_graph(traced.path / "model.fp32.onnx"))
    assert len(linears) == 6 * LAYERS
    assert all(linear.bias for linear in linears)
    int8 = load_graph(traced.path / "model.int8.onnx")
    assert find_linears(int8) == []
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in int8.nodes) == len(linears)


def test_a_traced_graph_that_wants_more_than_the_runtime_gives_is_refused(tmp_path):
    import transformers

    config = transformers.LlamaConfig(**sizes(num_key_value_heads=2, max_position_embeddings=64))
    checkpoint = make_checkpoint(tmp_path / "llama", config, pooling="last_token")
    with pytest.raises(ExportError, match="'llama' takes position_ids beside input_ids, .* which the runtime doesn't"):
        export_model(str(checkpoint), tmp_path / "out", ["fp32"])


def test_an_architecture_that_nobody_knows_is_an_error_with_the_cause(tiny_checkpoint, copied, tmp_path):
    config = copied(tiny_checkpoint) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "perceptron-9"}))
    with pytest.raises(ExportError, match=r"(?s)no family builds 'perceptron-9' .*perceptron.*docs/families.md"):
        export_model(str(config.parent), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_optimum_doesnt_know_is_an_error_with_the_cause(tmp_path):
    import transformers

    config = transformers.FNetConfig(hidden_size=32, num_hidden_layers=1, intermediate_size=64, vocab_size=1000)
    checkpoint = make_checkpoint(tmp_path / "fnet", config)
    with pytest.raises(ExportError, match="no family builds 'fnet' and optimum can't trace it .*fnet"):
        export_model(str(checkpoint), tmp_path / "out", ["fp32"])
