"""The transformer encoder that the model families share, built from its configuration and weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import TensorProto

from export.errors import ExportError
from export.graph import MICROSOFT, Graph, Loader, float_value, int_value
from runtime.manifest import Output


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
    activation: Literal["gelu", "gelu_new", "relu"]
    norm_eps: float
    pad: int | None = None
    """RoBERTa's way to count: places start behind this padding id, which itself takes none. None counts from 0."""
    relative_buckets: int = 0
    """MPNet's (T5's) distance buckets, each with an attention bias per head; 0 for none."""
    head_activation: Literal["tanh", "relu"] = "tanh"
    """Between the two linears of a score head."""

    def __post_init__(self) -> None:
        """Check what a spoilt ``config.json`` may hold.

        Raises:
            ValueError: A size isn't a whole number or is too small, or the heads don't share the width evenly.
        """
        least = {"token_types": 0, "pad": 0, "relative_buckets": 0}
        for name in (*("layers", "hidden", "heads", "intermediate", "vocab", "positions"), *least):
            value = getattr(self, name)
            if (type(value) is not int or value < least.get(name, 1)) and (name, value) != ("pad", None):
                raise ValueError(f"{name} is {value!r:.60}, not a whole number from {least.get(name, 1)} up")
        if self.hidden % self.heads:
            raise ValueError(f"{self.heads} attention heads can't share {self.hidden} dimensions evenly")
        if not isinstance(self.norm_eps, float | int):
            raise ValueError(f"the norms' epsilon is {self.norm_eps!r:.60}, not a number")


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


def build_encoder(
    config: EncoderConfig, weight: Callable[[str], Loader], outputs: Sequence[Output] = ("last_hidden_state",)
) -> Graph:
    """The encoder in fp32, from ``input_ids`` int64 (batch, tokens) to each of the outputs.

    There is no mask, since the runtime never pads: ONNX Runtime's CPU ``MultiHeadAttention`` takes its flash path only
    without one. Linears are ``Gemm`` over flat tokens, which takes the bias along. ``SkipLayerNormalization`` is
    avoided, being several times slower on CPU than ``Add`` and ``LayerNormalization``.

    Args:
        config: The encoder's shape.
        weight: Gives the loader of a weight by our name (see ``Family``), such as ``layer.0.query.weight``.
        outputs: What the graph gives; a reranker's ``logits`` also take ``token_type_ids``, if the model has them.
    """
    graph = Graph(inputs=[int_value("input_ids", "batch", "tokens")])
    pairs = "logits" in outputs and config.token_types > 1
    if pairs:
        graph.inputs.append(int_value("token_type_ids", "batch", "tokens"))
    x = _embeddings(graph, config, weight, pairs)
    bias = _attention_bias(graph, config, weight) if config.relative_buckets else ""
    for i in range(config.layers):
        x = _layer(graph, config, weight, f"layer.{i}", x, bias)
    for output in outputs:
        _output(graph, config, weight, output, x)
    return graph


def _embeddings(graph: Graph, config: EncoderConfig, weight: Callable[[str], Loader], pairs: bool) -> str:
    """Flat embedded tokens, (batch · tokens, hidden); names ``hidden_shape`` on the way."""
    first = 0 if config.pad is None else config.pad + 1

    def positions() -> np.ndarray:  # where the token type is always 0, its embedding joins the position's
        table = _checked(weight, "embeddings.position", first + config.positions, config.hidden)()
        if pairs or not config.token_types:
            return table
        return table + _checked(weight, "embeddings.token_type", config.token_types, config.hidden)()[0]

    graph.weight("hidden", np.array([config.hidden], np.int64))
    graph.weight("flat_shape", np.array([-1, config.hidden], np.int64))
    shape = graph.add("Shape", "input_ids", name="shape")
    graph.add("Concat", shape, "hidden", name="hidden_shape", axis=0)
    x = graph.add("Gather", _weight(graph, weight, "embeddings.word", config.vocab, config.hidden), "input_ids")
    graph.add("Gather", shape, graph.weight("one", np.array([1], np.int64)), name="tokens")
    table = graph.weight("embeddings.position", positions)
    if config.pad is None:
        places = graph.add("Slice", table, graph.weight("zero", np.array([0], np.int64)), "tokens")
    else:  # transformers' create_position_ids_from_input_ids: a padding token written in a text takes no place
        pad = graph.weight("pad", np.array(config.pad, np.int64))
        counted = graph.add("Cast", graph.add("Not", graph.add("Equal", "input_ids", pad)), to=TensorProto.INT64)
        running = graph.add("CumSum", counted, graph.weight("tokens_axis", np.array(1, np.int64)))
        places = graph.add("Gather", table, graph.add("Add", graph.add("Mul", running, counted), pad))
    x = graph.add("Add", x, places)
    if pairs:
        types = _weight(graph, weight, "embeddings.token_type", config.token_types, config.hidden)
        x = graph.add("Add", x, graph.add("Gather", types, "token_type_ids"))
    return graph.add("Reshape", _norm(graph, config, weight, "embeddings.norm", x), "flat_shape")


def _attention_bias(graph: Graph, config: EncoderConfig, weight: Callable[[str], Loader]) -> str:
    """A bias for each head and pair of places, (1, heads, tokens, tokens), by the bucket of their distance (T5)."""
    longest, buckets = config.positions - 1, config.relative_buckets // 2
    near, reach = buckets // 2, 128

    def table() -> np.ndarray:  # row d holds the bias of a key that stands d - longest places behind its query
        distance = np.arange(-longest, longest + 1)
        away = np.maximum(np.abs(distance), 1).astype(np.float32)
        far = near + (np.log(away / near) / math.log(reach / near) * (buckets - near)).astype(np.int64)
        bucket = np.where(np.abs(distance) < near, np.abs(distance), np.minimum(far, buckets - 1))
        load = _checked(weight, "attention_bias", config.relative_buckets, config.heads)
        return load()[bucket + np.where(distance > 0, buckets, 0)]

    zero, one = graph.weight("first", np.array(0, np.int64)), graph.weight("step", np.array(1, np.int64))
    count = graph.add("Squeeze", "tokens")
    keys = graph.add("Range", zero, count, one)
    queries = graph.add("Unsqueeze", keys, graph.weight("column", np.array([1], np.int64)))
    distance = graph.add("Add", graph.add("Sub", keys, queries), graph.weight("longest", np.array(longest, np.int64)))
    biases = graph.add("Gather", graph.weight("attention_bias", table), distance)
    biases = graph.add("Transpose", biases, perm=[2, 0, 1])
    return graph.add("Unsqueeze", biases, graph.weight("front", np.array([0], np.int64)))


def _layer(graph: Graph, config: EncoderConfig, weight: Callable[[str], Loader], layer: str, x: str, bias: str) -> str:
    hidden, wide = config.hidden, config.intermediate
    heads = [
        graph.add("Reshape", _linear(graph, weight, f"{layer}.{part}", x, hidden, hidden), "hidden_shape")
        for part in ("query", "key", "value")
    ]
    inputs = [*heads, "", "", bias] if bias else heads
    attended = graph.add("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=config.heads)
    attended = graph.add("Reshape", attended, "flat_shape")
    attended = _linear(graph, weight, f"{layer}.attention", attended, hidden, hidden)
    x = _norm(graph, config, weight, f"{layer}.attention_norm", graph.add("Add", attended, x))
    up = _activate(graph, config, _linear(graph, weight, f"{layer}.up", x, hidden, wide))
    down = _linear(graph, weight, f"{layer}.down", up, wide, hidden)
    return _norm(graph, config, weight, f"{layer}.norm", graph.add("Add", down, x))


def _activate(graph: Graph, config: EncoderConfig, x: str) -> str:
    match config.activation:
        case "gelu":
            return graph.add("Gelu", x, domain=MICROSOFT)
        case "gelu_new":
            return graph.add("FastGelu", x, domain=MICROSOFT)
        case "relu":
            return graph.add("Relu", x)


def _output(graph: Graph, config: EncoderConfig, weight: Callable[[str], Loader], output: Output, x: str) -> None:
    """Emit what makes an output of the flat last hidden states ``x``.

    ``token_weights`` and ``token_vectors`` are BGE-M3's (arXiv:2402.03216), ``vocabulary_weights`` SPLADE's
    (arXiv:2109.10086).
    """
    hidden = config.hidden
    match output:
        case "last_hidden_state":
            graph.add("Reshape", x, "hidden_shape", name=output)
            graph.outputs.append(float_value(output, "batch", "tokens", hidden))
        case "logits":
            first = graph.add(
                "Gather", graph.add("Reshape", x, "hidden_shape"), graph.weight("cls", np.array(0)), axis=1
            )
            dense = _linear(graph, weight, "head.dense", first, hidden, hidden)
            dense = graph.add({"tanh": "Tanh", "relu": "Relu"}[config.head_activation], dense)
            _linear(graph, weight, "head.out", dense, hidden, 1, output)
            graph.outputs.append(float_value(output, "batch", 1))
        case "token_weights":
            relu = graph.add("Relu", _linear(graph, weight, "head.sparse", x, hidden, 1))
            graph.add("Reshape", relu, "shape", name=output)
            graph.outputs.append(float_value(output, "batch", "tokens"))
        case "token_vectors":
            graph.add("Reshape", _linear(graph, weight, "colbert", x, hidden, hidden), "hidden_shape", name=output)
            graph.outputs.append(float_value(output, "batch", "tokens", hidden))
        case "vocabulary_weights":
            x = _activate(graph, config, _linear(graph, weight, "mlm.dense", x, hidden, hidden))
            x = _norm(graph, config, weight, "mlm.norm", x)
            words = _weight(graph, weight, "embeddings.word", config.vocab, hidden)
            x = graph.add("Gemm", x, words, _weight(graph, weight, "mlm.bias", config.vocab), name="mlm.out", transB=1)
            graph.weight("vocabulary", np.array([config.vocab], np.int64))
            x = graph.add("Reshape", x, graph.add("Concat", "shape", "vocabulary", axis=0))
            x = graph.add("Relu", graph.add("ReduceMax", x, axes=[1], keepdims=0))
            graph.add("Log", graph.add("Add", x, graph.weight("1.0", np.array(1, np.float32))), name=output)
            graph.outputs.append(float_value(output, "batch", config.vocab))


def _linear(
    graph: Graph,
    weight: Callable[[str], Loader],
    name: str,
    x: str,
    width_in: int,
    width_out: int,
    output: str = "",
) -> str:
    matrix = _weight(graph, weight, f"{name}.weight", width_out, width_in)
    return graph.add(
        "Gemm", x, matrix, _weight(graph, weight, f"{name}.bias", width_out), name=output or name, transB=1
    )


def _norm(graph: Graph, config: EncoderConfig, weight: Callable[[str], Loader], name: str, x: str) -> str:
    parts = [_weight(graph, weight, f"{name}.{part}", config.hidden) for part in ("weight", "bias")]
    return graph.add("LayerNormalization", x, *parts, axis=-1, epsilon=config.norm_eps)


def _weight(graph: Graph, weight: Callable[[str], Loader], name: str, *shape: int) -> str:
    return graph.weight(name, _checked(weight, name, *shape))


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
