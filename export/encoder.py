"""The post-norm encoder that BERT and its kin share, built from its configuration and weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import TensorProto

from export.graph import MICROSOFT, Graph, Loader, float_value, int_value
from export.layers import (
    Activation,
    Weights,
    activate,
    check_shape,
    checked,
    give_states,
    linear,
    norm,
    of_texts,
    parameter,
    reads_first,
    states_at,
    token_graph,
    vocabulary_weights,
)
from runtime.manifest import Output, Pooling


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
    """0 for a model that has none."""
    activation: Activation
    norm_eps: float
    pad: int | None = None
    """RoBERTa's way to count: places start behind this padding id, which itself takes none. None counts from 0."""
    relative_buckets: int = 0
    """MPNet's (T5's) distance buckets, each with an attention bias per head; 0 for none."""
    head_activation: Literal["tanh", "relu"] = "tanh"
    """Between the two linears of a score head."""
    mlm_activation: Activation | None = None
    """Of a masked language model's head; None is that of the layers."""

    def __post_init__(self) -> None:
        """Check what a spoilt ``config.json`` may hold.

        Raises:
            ValueError: As ``check_shape``.
        """
        check_shape(self, token_types=0, relative_buckets=0, **({} if self.pad is None else {"pad": 0}))


def build_encoder(
    config: EncoderConfig,
    weight: Weights,
    outputs: Sequence[Output] = ("last_hidden_state",),
    pooling: Pooling | None = None,
) -> Graph:
    """The encoder in fp32, from ``input_ids`` int64 (batch, tokens) to each of the outputs.

    There is no mask, since the runtime never pads: ONNX Runtime's CPU ``MultiHeadAttention`` takes its flash path only
    without one. Linears are ``Gemm`` over flat tokens, which takes the bias along. ``SkipLayerNormalization`` is
    avoided, being several times slower on CPU than ``Add`` and ``LayerNormalization``. Where nothing but the first
    states is read, the last layer makes no others.

    Args:
        config: The encoder's shape.
        weight: The checkpoint's, by our names.
        outputs: What the graph gives; a reranker's ``logits`` also take ``token_type_ids``, if the model has them.
        pooling: How it pools. By ``cls`` it gives ``sentence_embedding`` (batch, hidden) for ``last_hidden_state``,
            unless there are other outputs.
    """
    graph = token_graph(config.hidden)
    pairs = "logits" in outputs and config.token_types > 1
    if pairs:
        graph.inputs.append(int_value("token_type_ids", "batch", "tokens"))
    x = _embeddings(graph, config, weight, pairs)
    bias = attention_bias(graph, config, weight) if config.relative_buckets else ""
    first = reads_first(outputs, pooling)
    for i in range(config.layers):
        x = _layer(graph, config, weight, f"layer.{i}", x, bias, first=first and i == config.layers - 1)
    for output in outputs:
        _output(graph, config, weight, output, x, first)
    return graph


def _embeddings(graph: Graph, config: EncoderConfig, weight: Weights, pairs: bool) -> str:
    """Flat embedded tokens, (batch · tokens, hidden); names ``tokens``, their number in a text, on the way."""
    x = graph.add("Gather", parameter(graph, weight, "embeddings.word", config.vocab, config.hidden), "input_ids")
    graph.add("Gather", "shape", graph.weight("one", np.array([1], np.int64)), name="tokens")
    table = graph.weight("embeddings.position", position_table(config, weight, pairs))
    if config.pad is None:
        places = graph.add("Slice", table, graph.weight("zero", np.array([0], np.int64)), "tokens")
    else:  # transformers' create_position_ids_from_input_ids: a padding token written in a text takes no place
        pad = graph.weight("pad", np.array(config.pad, np.int64))
        counted = graph.add("Cast", graph.add("Not", graph.add("Equal", "input_ids", pad)), to=TensorProto.INT64)
        running = graph.add("CumSum", counted, graph.weight("tokens_axis", np.array(1, np.int64)))
        places = graph.add("Gather", table, graph.add("Add", graph.add("Mul", running, counted), pad))
    x = graph.add("Add", x, places)
    if pairs:
        types = parameter(graph, weight, "embeddings.token_type", config.token_types, config.hidden)
        x = graph.add("Add", x, graph.add("Gather", types, "token_type_ids"))
    return graph.add("Reshape", norm(graph, weight, "embeddings.norm", x, config.hidden, config.norm_eps), "flat_shape")


def position_table(config: EncoderConfig, weight: Weights, pairs: bool) -> Loader:
    """The loader of the positions' embeddings, to which the token type's is added where it is always 0."""
    rows = config.positions + (0 if config.pad is None else config.pad + 1)

    def load() -> np.ndarray:
        table = checked(weight, "embeddings.position", rows, config.hidden)()
        if pairs or not config.token_types:
            return table
        return table + checked(weight, "embeddings.token_type", config.token_types, config.hidden)()[0]

    return load


def attention_bias(graph: Graph, config: EncoderConfig, weight: Weights) -> str:
    """A bias for each head and pair of places, (1, heads, tokens, tokens), by the bucket of their distance (T5).

    The graph has their number as ``tokens``, of shape (1,).
    """
    longest, buckets = config.positions + 6, config.relative_buckets // 2  # packed texts count as multiples of 8
    near, reach = buckets // 2, 128

    def table() -> np.ndarray:  # row d holds the bias of a key that stands d - longest places behind its query
        distance = np.arange(-longest, longest + 1)
        away = np.maximum(np.abs(distance), 1).astype(np.float32)
        far = near + (np.log(away / near) / math.log(reach / near) * (buckets - near)).astype(np.int64)
        bucket = np.where(np.abs(distance) < near, np.abs(distance), np.minimum(far, buckets - 1))
        load = checked(weight, "attention_bias", config.relative_buckets, config.heads)
        return load()[bucket + np.where(distance > 0, buckets, 0)]

    zero, one = graph.weight("first", np.array(0, np.int64)), graph.weight("step", np.array(1, np.int64))
    count = graph.add("Squeeze", "tokens")
    keys = graph.add("Range", zero, count, one)
    queries = graph.add("Unsqueeze", keys, graph.weight("column", np.array([1], np.int64)))
    distance = graph.add("Add", graph.add("Sub", keys, queries), graph.weight("longest", np.array(longest, np.int64)))
    biases = graph.add("Gather", graph.weight("attention_bias", table), distance)
    biases = graph.add("Transpose", biases, perm=[2, 0, 1])
    return graph.add("Unsqueeze", biases, graph.weight("front", np.array([0], np.int64)))


def _layer(
    graph: Graph, config: EncoderConfig, weight: Weights, layer: str, x: str, bias: str, *, first: bool = False
) -> str:
    """All states from those before; or, from all of those, the first of each text."""
    hidden, wide = config.hidden, config.intermediate
    seen, shape = x, "hidden_shape"
    if first:
        x, shape = states_at(graph, x, 0), graph.weight("first_shape", np.array([-1, 1, hidden], np.int64))
        bias = bias and graph.add("Gather", bias, graph.integers([0]), axis=2)
    heads = [
        graph.add("Reshape", linear(graph, weight, f"{layer}.{part}", states, hidden, hidden), by_text)
        for part, states, by_text in (
            ("query", x, shape),
            ("key", seen, "hidden_shape"),
            ("value", seen, "hidden_shape"),
        )
    ]
    inputs = [*heads, "", "", bias] if bias else heads
    attended = graph.add("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=config.heads)
    attended = graph.add("Reshape", attended, "flat_shape")
    attended = linear(graph, weight, f"{layer}.attention", attended, hidden, hidden)
    x = norm(graph, weight, f"{layer}.attention_norm", graph.add("Add", attended, x), hidden, config.norm_eps)
    up = activate(graph, config.activation, linear(graph, weight, f"{layer}.up", x, hidden, wide))
    down = linear(graph, weight, f"{layer}.down", up, wide, hidden)
    return norm(graph, weight, f"{layer}.norm", graph.add("Add", down, x), hidden, config.norm_eps)


def _output(graph: Graph, config: EncoderConfig, weight: Weights, output: Output, x: str, first: bool) -> None:
    """Emit what makes an output of the flat last hidden states ``x``, or with ``first`` of each text's first.

    ``token_weights`` and ``token_vectors`` are BGE-M3's (arXiv:2402.03216), ``vocabulary_weights`` SPLADE's
    (arXiv:2109.10086).
    """
    hidden = config.hidden
    match output:
        case "last_hidden_state":
            give_states(graph, x, hidden, first)
        case "logits":
            score_head(graph, config, weight, of_texts(graph, x if first else states_at(graph, x, 0), hidden))
        case "token_weights":
            relu = graph.add("Relu", linear(graph, weight, "head.sparse", x, hidden, 1))
            graph.add("Reshape", relu, "shape", name=output)
            graph.outputs.append(float_value(output, "batch", "tokens"))
        case "token_vectors":
            width = colbert_width(weight)
            shape = graph.add("Concat", "shape", graph.integers([width]), axis=0)
            graph.add("Reshape", linear(graph, weight, "colbert", x, hidden, width), shape, name=output)
            graph.outputs.append(float_value(output, "batch", "tokens", width))
        case "vocabulary_weights":
            dense = linear(graph, weight, "mlm.dense", x, hidden, hidden)
            x = activate(graph, config.mlm_activation or config.activation, dense)
            x = norm(graph, weight, "mlm.norm", x, hidden, config.norm_eps)
            vocabulary_weights(graph, weight, x, config.vocab, hidden)


def colbert_width(weight: Weights) -> int:
    """Dimensions of a token's vector, which FlagEmbedding's trainer sets with ``--colbert_dim``."""
    return int(weight("colbert.weight")().shape[0])


def score_head(graph: Graph, config: EncoderConfig, weight: Weights, first: str) -> None:
    """Emit a reranker's ``logits`` of its texts' first states, (batch, hidden)."""
    dense = linear(graph, weight, "head.dense", first, config.hidden, config.hidden)
    dense = graph.add({"tanh": "Tanh", "relu": "Relu"}[config.head_activation], dense)
    linear(graph, weight, "head.out", dense, config.hidden, 1, output="logits")
    graph.outputs.append(float_value("logits", "batch", 1))
