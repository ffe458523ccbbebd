"""Attention by length: either operator gives what the graph gave, and a text's vector doesn't depend on its batch."""

import numpy as np
import onnxruntime
import pytest

from export.attention import OPSET, attend_by_length
from export.encoder import EncoderConfig, build_encoder
from export.graph import Graph

HIDDEN, SHORT = 32, 6


def encoder(outputs=("last_hidden_state",), **changes) -> Graph:
    """A random encoder of two layers."""
    settings = {"activation": "gelu", "norm_eps": 1e-12, "token_types": 0} | changes
    config = EncoderConfig(layers=2, hidden=HIDDEN, heads=4, intermediate=HIDDEN, vocab=50, positions=20, **settings)
    tables = {"embeddings.word": (50, HIDDEN), "embeddings.position": (20, HIDDEN), "attention_bias": (8, 4)}

    def weight(name):
        shape = tables.get(name) or ((50,) if name == "mlm.bias" else (HIDDEN,) * (1 + ("norm" not in name)))
        if name.endswith("bias") and name not in tables:
            shape = shape[:1]
        return lambda: np.random.default_rng(sum(name.encode())).normal(scale=0.5, size=shape).astype(np.float32)

    return build_encoder(config, weight, outputs)


def session(graph: Graph, path) -> onnxruntime.InferenceSession:
    graph.save(path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """So that tiny texts are long ones, too."""
    monkeypatch.setattr("export.attention.SHORT", SHORT)


@pytest.mark.parametrize("tokens", [1, SHORT - 1, SHORT, SHORT + 1, 20])
def test_texts_of_any_length_get_what_they_got(tmp_path, capfd, tokens):
    graph = encoder()
    changed = attend_by_length(graph)
    assert [node.op_type for node in changed.nodes].count("If") == 2
    assert (graph.opsets[""], changed.opsets[""]) == (17, OPSET)
    ids = np.random.default_rng(tokens).integers(0, 50, (3, tokens))
    expected, found = (
        session(g, tmp_path / f"{i}.onnx").run(None, {"input_ids": ids})[0] for i, g in enumerate((graph, changed))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert capfd.readouterr().err == ""  # no warning of shapes, which would come with every run


@pytest.mark.parametrize("tokens", [SHORT, SHORT + 1])
def test_a_text_gets_the_same_bits_alone_and_in_a_batch(tmp_path, tokens):
    run = session(attend_by_length(encoder()), tmp_path / "model.onnx").run
    ids = np.random.default_rng(0).integers(0, 50, (33, tokens))
    (together,) = run(None, {"input_ids": ids})
    alone = [run(None, {"input_ids": ids[i : i + 1]})[0][0] for i in range(33)]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    "graph",
    [encoder(relative_buckets=8), encoder(("vocabulary_weights",)), Graph()],
    ids=["a bias", "operators of an older opset", "no attention"],
)
def test_what_has_no_such_operator_stays_as_it_is(graph):
    assert attend_by_length(graph) is graph
