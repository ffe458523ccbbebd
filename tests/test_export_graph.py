"""The graphs that are built: valid, of the operators that are fast, true to transformers, and written in a stream."""

import json
import weakref
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from export.families import find_family
from export.graph import Graph, float_value, load_graph


@pytest.fixture(scope="module")
def fp32(tiny_artifact):
    """The tiny BERT's fp32 file."""
    return tiny_artifact / "model.fp32.onnx"


@pytest.fixture(scope="module")
def session(fp32):
    return onnxruntime.InferenceSession(fp32, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_the_file_is_valid_onnx(tiny_artifact, variant):
    onnx.checker.check_model(str(tiny_artifact / f"model.{variant}.onnx"))


def test_a_layer_is_six_gemms_one_attention_and_two_norms(fp32):
    ops = Counter(node.op_type for node in load_graph(fp32).nodes)
    layers = 2
    assert ops["Gemm"] == 6 * layers
    assert ops["MultiHeadAttention"] == layers
    assert ops["LayerNormalization"] == 2 * layers + 1
    assert not ops.keys() & {"MatMul", "SkipLayerNormalization", "Transpose", "Softmax", "Where"}


def test_attention_takes_no_mask_and_no_text_is_told_apart_by_types(fp32):
    graph = load_graph(fp32)
    assert [entry.name for entry in graph.inputs] == ["input_ids"]
    assert all(len(node.input) == 3 for node in graph.nodes if node.op_type == "MultiHeadAttention")


def test_every_value_that_a_node_reads_exists_before_it(fp32):
    graph = load_graph(fp32)
    known = {entry.name for entry in graph.inputs} | graph.weights.keys()
    for node in graph.nodes:
        assert set(node.input) <= known
        assert not set(node.output) & known
        known |= set(node.output)
    assert {entry.name for entry in graph.outputs} <= known
    assert graph.weights.keys() == {value for node in graph.nodes for value in node.input} & graph.weights.keys()


@pytest.fixture(scope="module")
def original(tiny_checkpoint):
    """transformers' own model."""
    import transformers

    return transformers.AutoModel.from_pretrained(tiny_checkpoint).eval()


@settings(max_examples=25, deadline=None)
@given(ids=arrays.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 64)), elements=st.integers(0, 999)))
def test_the_graph_gives_the_hidden_states_of_transformers(session, original, ids):
    import torch

    with torch.inference_mode():
        expected = original(torch.from_numpy(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(session.run(None, {"input_ids": ids})[0], expected, atol=2e-5)


tensors = st.sampled_from([np.float32, np.int64, np.uint8, np.int8, np.float16]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


@settings(deadline=None)
@given(values=st.lists(tensors, max_size=5))
def test_saved_weights_are_read_back_to_the_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    graph = Graph(outputs=[float_value("y")])
    for i, value in enumerate(values):
        graph.weight(f"w{i}", value.T)  # not contiguous
    graph.save(path)
    read = load_graph(path)
    assert (list(read.weights), read.opsets) == (list(graph.weights), graph.opsets)
    for value, load in zip(values, read.weights.values(), strict=True):
        assert load().dtype == value.dtype
        np.testing.assert_array_equal(load(), value.T)


def test_saving_holds_one_weight_at_a_time(tmp_path):
    alive, most, reads = 0, 0, Counter()
    graph = Graph(outputs=[float_value("y", 4)])

    def released():
        nonlocal alive
        alive -= 1

    def load(name):
        nonlocal alive, most
        alive, reads[name] = alive + 1, reads[name] + 1
        most = max(most, alive)
        value = np.full(1000, 7, np.float32)
        weakref.finalize(value, released)
        return value

    for i in range(5):
        graph.weight(f"w{i}", lambda name=f"w{i}": load(name))
    graph.save(tmp_path / "model.onnx")
    assert most == 1
    assert max(reads.values()) <= 2  # once for its size


def test_a_graph_survives_being_saved_again(fp32, session, tmp_path):
    load_graph(fp32).save(tmp_path / "again.onnx")
    again = onnxruntime.InferenceSession(tmp_path / "again.onnx", providers=["CPUExecutionProvider"])
    ids = {"input_ids": np.arange(20, dtype=np.int64).reshape(2, 10)}
    np.testing.assert_array_equal(again.run(None, ids)[0], session.run(None, ids)[0])


@pytest.mark.parametrize("model_type", ["", "gpt-9", "os", "bert.config", "../bert", "a b"])
def test_an_unknown_model_type_has_no_family(model_type):
    assert find_family(model_type) is None


@pytest.mark.parametrize(
    "setting", [{"position_embedding_type": "relative_key"}, {"is_decoder": True}, {"hidden_act": "silu"}]
)
def test_what_the_bert_family_cant_express_is_left_to_tracing(tiny_checkpoint, setting):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert find_family("bert").config(config)
    assert find_family("bert").config(config | setting) is None
