"""The causal decoder with rotary positions, RMS norms and gated linears that Qwen and Mistral share, as an embedder."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from export.errors import ExportError
from export.graph import MICROSOFT, Graph
from export.layers import (
    Activation,
    Weights,
    activate,
    check_shape,
    check_theta,
    give_states,
    linear,
    parameter,
    rotary_tables,
    states_at,
    token_graph,
)
from runtime.manifest import Output, Pooling


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The shape of a causal decoder with rotary positions and grouped-query attention (Qwen, Mistral)."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    """Of keys and of values; so many groups of the other heads share one each."""
    head: int
    """Dimensions of a head."""
    intermediate: int
    vocab: int
    positions: int
    """Longest text, in tokens."""
    theta: float
    """Base of the rotary positions."""
    window: int | None = None
    """How many tokens one sees, with itself; None is all before it."""
    activation: Activation
    norm_eps: float
    head_norm: bool = False
    """Whether each head's query and key have a norm of their own (Qwen3)."""
    bias: bool = False
    """Whether the linears for queries, keys and values have one."""
    output_bias: bool = False
    """Whether the linear behind attention has one."""

    def __post_init__(self) -> None:
        """Check what a spoilt ``config.json`` may hold.

        Raises:
            ValueError: As ``check_shape`` and ``check_theta``, or the heads don't share the keys evenly.
        """
        check_shape(self, key_heads=1, head=1, **({} if self.window is None else {"window": 1}))
        if self.heads % self.key_heads:
            raise ValueError(f"{self.heads} attention heads can't share {self.key_heads} keys evenly")
        check_theta(self.theta)


def build_decoder(
    config: DecoderConfig,
    weight: Weights,
    outputs: Sequence[Output] = ("last_hidden_state",),
    pooling: Pooling | None = None,
) -> Graph:
    """The decoder in fp32, from ``input_ids`` int64 (batch, tokens) to its last states.

    There is no mask but the causal one, since the runtime never pads. ``GroupQueryAttention`` turns queries and keys by
    their positions itself. On long texts it takes half the time of ONNX Runtime 1.32's other operators for attention,
    and memory that grows with the tokens; before its flash path came (1.24 hasn't it), with their square.

    Args:
        config: The decoder's shape.
        weight: The checkpoint's, by our names.
        outputs: What the graph gives: ``last_hidden_state``.
        pooling: How it pools; by ``last_token`` it gives ``sentence_embedding`` (batch, hidden), and its last layer
            makes no other states behind its attention.

    Raises:
        ExportError: Other outputs.
    """
    if tuple(outputs) != ("last_hidden_state",):
        other = next(output for output in outputs if output != "last_hidden_state")
        raise ExportError(f"{other} can't be built of a decoder; see docs/families.md")
    graph = token_graph(config.hidden)
    for part, count in _parts(config):
        graph.add("Concat", "shape", graph.integers([count * config.head]), name=f"{part}_shape", axis=0)
    _lengths(graph)
    rotary_tables(graph, "rotary", config.positions, config.head, config.theta)
    x = graph.add("Gather", parameter(graph, weight, "embeddings.word", config.vocab, config.hidden), "input_ids")
    x = graph.add("Reshape", x, "flat_shape")
    last = pooling == "last_token"
    for i in range(config.layers):
        x = _layer(graph, config, weight, f"layer.{i}", x, last=last and i == config.layers - 1)
    give_states(graph, _norm(graph, config, weight, "norm", x, config.hidden), config.hidden, last)
    return graph


def _lengths(graph: Graph) -> None:
    """Name what ``GroupQueryAttention`` asks of texts, all of one length: ``last_places``, (batch,), and ``total``."""
    tokens = graph.add("Gather", "shape", graph.integers(1))
    graph.add("Cast", tokens, name="total", to=TensorProto.INT32)
    last = graph.add("Cast", graph.add("Sub", tokens, graph.integers(1)), to=TensorProto.INT32)
    graph.add("Expand", last, graph.add("Slice", "shape", graph.integers([0]), graph.integers([1])), name="last_places")


def _layer(graph: Graph, config: DecoderConfig, weight: Weights, layer: str, x: str, *, last: bool = False) -> str:
    """All states from those before; or, from all of those, the last of each text."""
    hidden, wide, width = config.hidden, config.intermediate, config.heads * config.head
    seen = _norm(graph, config, weight, f"{layer}.attention_norm", x, hidden)
    heads = [_heads(graph, config, weight, f"{layer}.{part}", seen, count) for part, count in _parts(config)]
    attended = _attention(graph, config, heads)
    if last:
        x = states_at(graph, x, -1)
        attended = graph.add("Gather", attended, graph.integers([-1]), axis=1)
    attended = graph.add("Reshape", attended, graph.integers([-1, width]))
    attended = linear(graph, weight, f"{layer}.attention", attended, width, hidden, bias=config.output_bias)
    x = graph.add("Add", x, attended)
    seen = _norm(graph, config, weight, f"{layer}.norm", x, hidden)
    gate = activate(graph, config.activation, linear(graph, weight, f"{layer}.gate", seen, hidden, wide, bias=False))
    gated = graph.add("Mul", gate, linear(graph, weight, f"{layer}.up", seen, hidden, wide, bias=False))
    return graph.add("Add", x, _down(graph, config, weight, f"{layer}.down", gated))


def _down(graph: Graph, config: DecoderConfig, weight: Weights, name: str, gated: str) -> str:
    """The linear behind the gate, of tokens brought to one size, and what it gives brought back.

    A trained decoder's first token may be hundreds of times as large there as any other (arXiv:2402.17762), and one
    scale of int8 for both would leave little of the others.
    """
    hidden, wide = config.hidden, config.intermediate
    ones = graph.weight("size.ones", np.ones(wide, np.float32))
    even = graph.add("SimplifiedLayerNormalization", gated, ones, further=("inverse",), axis=-1, epsilon=1e-12)
    return graph.add("Div", linear(graph, weight, name, even, wide, hidden, bias=False), f"{even}.inverse")


def _parts(config: DecoderConfig) -> list[tuple[str, int]]:
    """What attention takes, and how many heads each has."""
    return [("query", config.heads), ("key", config.key_heads), ("value", config.key_heads)]


def _heads(graph: Graph, config: DecoderConfig, weight: Weights, name: str, x: str, count: int) -> str:
    """The heads of queries, keys or values side by side, (batch, tokens, width)."""
    part = name.rpartition(".")[2]
    heads = linear(graph, weight, name, x, config.hidden, count * config.head, bias=config.bias)
    if config.head_norm and part != "value":
        heads = graph.add("Reshape", heads, graph.integers([-1, config.head]))
        heads = _norm(graph, config, weight, f"{name}_norm", heads, config.head)
    return graph.add("Reshape", heads, f"{part}_shape")


def _attention(graph: Graph, config: DecoderConfig, heads: Sequence[str]) -> str:
    """What tokens get of those before them, of queries, keys and values; (batch, tokens, width)."""
    attended = graph.add(
        "GroupQueryAttention",
        *heads,
        *("", "", "last_places", "total", "rotary.cos", "rotary.sin"),
        domain=MICROSOFT,
        further=("keys", "values"),  # without its cache it doesn't take the flash path
        num_heads=config.heads,
        kv_num_heads=config.key_heads,
        do_rotary=1,
        local_window_size=-1 if config.window is None else config.window,
    )
    # The shape is read from the cache, since what nobody reads is held until the run ends, of every layer.
    batch = graph.add("Shape", f"{attended}.keys", start=0, end=1)
    tokens = graph.add("Shape", f"{attended}.values", start=2, end=3)
    shape = graph.add("Concat", batch, tokens, graph.integers([config.heads * config.head]), axis=0)
    return graph.add("Reshape", attended, shape)


def _norm(graph: Graph, config: DecoderConfig, weight: Weights, name: str, x: str, width: int) -> str:
    """RMS normalisation (arXiv:1910.07467), by ONNX Runtime's operator, which it has in ONNX's own domain."""
    scale = parameter(graph, weight, f"{name}.weight", width)
    return graph.add("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=config.norm_eps)
