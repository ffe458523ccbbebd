"""The transformer encoder that the model families share, built from its configuration and weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from export.errors import ExportError
from export.graph import MICROSOFT, Graph, Loader, float_value, int_value


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """The shape of a post-norm encoder with learned absolute positions (BERT and its kin)."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab: int
    positions: int
    """Longest text, in tokens."""
    token_types: int
    activation: Literal["gelu", "gelu_new", "relu"]
    norm_eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model family: how to read its ``config.json``, and what it calls its weights.

    Attributes:
        config: From ``config.json`` to the encoder, or None where the encoder can't express it.
        weights: Our name of each weight → the checkpoint's, both with ``{i}`` for the layer.
        prefix: What a checkpoint with a head puts before the encoder's weight names.
    """

    config: Callable[[Mapping[str, object]], EncoderConfig | None]
    weights: Mapping[str, str]
    prefix: str


def build_encoder(config: EncoderConfig, weight: Callable[[str], Loader]) -> Graph:
    """The encoder in fp32: ``input_ids`` int64 (batch, tokens) → ``last_hidden_state`` (batch, tokens, hidden).

    There is no mask, since the runtime never pads: ONNX Runtime's CPU ``MultiHeadAttention`` takes its flash path only
    without one. Linears are ``Gemm`` over flat tokens, which takes the bias along. ``SkipLayerNormalization`` is
    avoided, being several times slower on CPU than ``Add`` and ``LayerNormalization``.

    Args:
        config: The encoder's shape.
        weight: Gives the loader of a weight by our name (see ``Family``), such as ``layer.0.query.weight``.
    """
    graph = Graph(
        inputs=[int_value("input_ids", "batch", "tokens")],
        outputs=[float_value("last_hidden_state", "batch", "tokens", config.hidden)],
    )
    x = _embeddings(graph, config, weight)
    for i in range(config.layers):
        x = _layer(graph, config, weight, f"layer.{i}", x)
    graph.add("Reshape", x, "hidden_shape", name="last_hidden_state")
    return graph


def _embeddings(graph: Graph, config: EncoderConfig, weight: Callable[[str], Loader]) -> str:
    """Flat embedded tokens, (batch · tokens, hidden); names ``hidden_shape`` on the way."""

    def positions() -> np.ndarray:  # an embedder's token type is always 0, so its embedding joins the position's
        table = _checked(weight, "embeddings.position", config.positions, config.hidden)()
        return table + _checked(weight, "embeddings.token_type", config.token_types, config.hidden)()[0]

    graph.weight("hidden", np.array([config.hidden], np.int64))
    graph.weight("flat_shape", np.array([-1, config.hidden], np.int64))
    shape = graph.add("Shape", "input_ids")
    graph.add("Concat", shape, "hidden", name="hidden_shape", axis=0)
    word = graph.weight("embeddings.word", _checked(weight, "embeddings.word", config.vocab, config.hidden))
    words = graph.add("Gather", word, "input_ids")
    tokens = graph.add("Gather", shape, graph.weight("one", np.array([1], np.int64)))
    start = graph.weight("zero", np.array([0], np.int64))
    places = graph.add("Slice", graph.weight("embeddings.position", positions), start, tokens)
    x = _norm(graph, config, weight, "embeddings.norm", graph.add("Add", words, places))
    return graph.add("Reshape", x, "flat_shape")


def _layer(graph: Graph, config: EncoderConfig, weight: Callable[[str], Loader], layer: str, x: str) -> str:
    hidden, wide = config.hidden, config.intermediate
    heads = [
        graph.add("Reshape", _linear(graph, weight, f"{layer}.{part}", x, hidden, hidden), "hidden_shape")
        for part in ("query", "key", "value")
    ]
    attended = graph.add("MultiHeadAttention", *heads, domain=MICROSOFT, num_heads=config.heads)
    attended = _linear(
        graph, weight, f"{layer}.attention", graph.add("Reshape", attended, "flat_shape"), hidden, hidden
    )
    x = _norm(graph, config, weight, f"{layer}.attention_norm", graph.add("Add", attended, x))
    up = _linear(graph, weight, f"{layer}.up", x, hidden, wide)
    match config.activation:
        case "gelu":
            up = graph.add("Gelu", up, domain=MICROSOFT)
        case "gelu_new":
            up = graph.add("FastGelu", up, domain=MICROSOFT)
        case "relu":
            up = graph.add("Relu", up)
    down = _linear(graph, weight, f"{layer}.down", up, wide, hidden)
    return _norm(graph, config, weight, f"{layer}.norm", graph.add("Add", down, x))


def _linear(graph: Graph, weight: Callable[[str], Loader], name: str, x: str, width_in: int, width_out: int) -> str:
    matrix = graph.weight(f"{name}.weight", _checked(weight, f"{name}.weight", width_out, width_in))
    bias = graph.weight(f"{name}.bias", _checked(weight, f"{name}.bias", width_out))
    return graph.add("Gemm", x, matrix, bias, name=name, transB=1)


def _norm(graph: Graph, config: EncoderConfig, weight: Callable[[str], Loader], name: str, x: str) -> str:
    parts = [f"{name}.weight", f"{name}.bias"]
    parts = [graph.weight(part, _checked(weight, part, config.hidden)) for part in parts]
    return graph.add("LayerNormalization", x, *parts, axis=-1, epsilon=config.norm_eps)


def _checked(weight: Callable[[str], Loader], name: str, *shape: int) -> Loader:
    """The loader of a weight as float32, which raises unless it has the shape that ``config.json`` makes expect."""
    load = weight(name)

    def checked() -> np.ndarray:
        array = load()
        if array.shape != shape:
            raise ExportError(
                f"weight {name} has shape {array.shape} where config.json makes it {shape}; the two don't "
                "belong together, download the checkpoint again"
            )
        return array.astype(np.float32, copy=False)

    return checked
