"""The post-norm encoder for CUDA: fp16, the tokens of all texts in one row without padding, pooled on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.encoder import EncoderConfig, attention_bias, colbert_width, position_table, score_head
from export.errors import ExportError
from export.graph import MICROSOFT, Graph, Loader, float_value, int_value
from export.layers import Weights, activate, checked, linear, parameter, reads_first
from runtime.manifest import Output, Pooling
from runtime.pooling import POOLED

HEADS = "head."
"""What the names of weights that stay fp32 begin with: score heads cost nothing and decide everything."""
EVERY = np.iinfo(np.int64).max


def build_packed(config: EncoderConfig, weight: Weights, outputs: Sequence[Output], pooling: Pooling | None) -> Graph:
    """The encoder in fp16, from the inputs that ``runtime.packing.pack`` makes to each of the outputs in float32.

    ``PackedMultiHeadAttention`` keeps texts apart by ``cumulative_lengths``. On CUDA ``Gemm`` takes a slow pass over
    the outputs for a bias, so a layer's get none where that can be: the keys' shifts all of a query's scores alike, so
    that the softmax takes no notice, and is left out; the values' passes through the softmax as it is, and goes into
    the next linear's; the queries' is carried by their weights (``Carrier``); the others go to what follows.

    Args:
        config: The encoder's shape.
        weight: The checkpoint's, by our names.
        outputs: What the graph gives. Of ``last_hidden_state`` it gives the pooled ``sentence_embedding`` instead,
            (texts, hidden); ``token_weights`` and ``token_vectors`` are of all tokens, (tokens, …).
        pooling: How it pools.

    Raises:
        ExportError: A pooling or output that can't be packed, or (of a weight's loader) a weight beyond fp16's range.
    """
    if pooling == "max" or "vocabulary_weights" in outputs:
        what = "max pooling" if pooling == "max" else "SPLADE"
        raise ExportError(f"fp16 doesn't do {what} yet; leave it out with --variants fp32,int8")
    pairs = "logits" in outputs and config.token_types > 1
    shapes = {
        "input_ids": ("tokens",),
        **({"token_type_ids": ("tokens",)} if pairs else {}),
        "positions": ("tokens",),
        "text_starts": ("tokens",),
        "token_offset": ("texts", "longest"),
        "cumulative_lengths": ("ends",),
    }
    graph = Graph(inputs=[int_value(name, *shape, kind=TensorProto.INT32) for name, shape in shapes.items()])
    norms = ["embeddings.norm", *(f"layer.{i}.norm" for i in range(config.layers - 1))]
    carriers = [find_carrier(config, weight, norm) for norm in norms]
    moved: dict[str, Loader] = {}
    for i, (norm, carrier) in enumerate(zip(norms, carriers, strict=True)):
        moved |= _moved_biases(config, weight, f"layer.{i}", norm, carrier)

    def changed(name: str) -> Loader:
        return moved.get(name) or weight(name)

    x = _embeddings(graph, config, changed, pairs)
    bias = _bias(graph, config, weight) if config.relative_buckets else ""
    starts = graph.add("Slice", "cumulative_lengths", graph.integers([0]), graph.integers([-1]), name="starts")
    first = reads_first(outputs, pooling)
    for i in range(config.layers):
        only = starts if first and i == config.layers - 1 else ""
        x = _layer(graph, config, changed, f"layer.{i}", x, bias, only, query_bias=carriers[i] is None)
    for output in outputs:
        _output(graph, config, weight, output, x, "" if first else starts, pooling)
    used = {value for node in graph.nodes for value in node.input}
    graph.inputs = [entry for entry in graph.inputs if entry.name in used]
    graph.weights = {n: load if n.startswith(HEADS) else _half(n, load) for n, load in graph.weights.items()}
    return graph


def _half(name: str, load: Loader) -> Loader:
    def half() -> np.ndarray:
        array = load()
        if array.dtype != np.float32:
            return array
        with np.errstate(over="ignore"):
            halved = array.astype(np.float16)
        if not np.isfinite(halved).all():
            raise ExportError(f"weight {name} is beyond fp16's range; leave fp16 out with --variants fp32,int8")
        return halved

    return half


@dataclass(frozen=True, slots=True)
class Carrier:
    """How a linear's weights can carry its bias, behind a layer normalisation.

    Normalised, a token's numbers add up to 0. So behind the scales ``g`` and shifts ``b``, all tokens' ``x / g`` add up
    to the same: to the sum of ``b / g``. A multiple of ``1 / g``, added to a row of the linear's weights, is therefore
    a bias. The shifts are raised for that sum to be far from 0; who reads ``x`` takes it into account.

    Attributes:
        raised: The normalisation's shifts, float32 (hidden,), which fp16 holds exactly.
        lift: By how much they were raised, float64 (hidden,).
        ones: What gives 1 when multiplied with any token's ``x`` and added up, float64 (hidden,).
    """

    raised: np.ndarray
    lift: np.ndarray
    ones: np.ndarray


LIFT = 0.125
"""How far the shifts are raised, in scales: the sum is then an eighth of the width or more, and ``x`` hardly larger."""
LARGEST = 2**6
"""What ``ones`` stays below, so that weights that carry a bias of a thousand are within fp16's range."""


def find_carrier(config: EncoderConfig, weight: Weights, norm: str) -> Carrier | None:
    """A layer normalisation's, or None where some scale is so near 0 that a bias would be less exact than fp16."""
    scale, shift = (checked(weight, f"{norm}.{part}", config.hidden)() for part in ("weight", "bias"))
    with np.errstate(all="ignore"):
        g, b = scale.astype(np.float16).astype(np.float64), shift.astype(np.float64)
        away = np.copysign(LIFT, (b / g).mean())
        raised = (b + away * g).astype(np.float16)
        ones = 1 / g / (raised / g).sum()
        rounding = np.spacing(np.hypot(g, raised).astype(np.float16)).astype(np.float64) / 2  # of a token's numbers
        exact = np.linalg.norm(rounding * ones) < 2**-11 and np.abs(ones).max() < LARGEST
    return Carrier(raised.astype(np.float32), raised - b, ones) if exact else None


def _moved_biases(
    config: EncoderConfig, weight: Weights, layer: str, norm: str, carrier: Carrier | None
) -> dict[str, Loader]:
    """What differs from the checkpoint's weights in a layer whose keys and values have no bias, nor, carried, queries.

    ``query.weight`` carries the queries' bias, and ``attention.bias`` has the values' in it. The shifts of the ``norm``
    before them are raised, which these two undo, for the states beside attention as well.
    """
    hidden = config.hidden

    def of(name: str, *shape: int) -> np.ndarray:
        return checked(weight, f"{layer}.{name}", *shape)().astype(np.float64)

    def query(carrier: Carrier) -> np.ndarray:
        matrix = of("query.weight", hidden, hidden)
        bias = of("query.bias", hidden) - matrix @ carrier.lift
        return (matrix + np.outer(bias, carrier.ones)).astype(np.float32)

    def attention() -> np.ndarray:
        lift = carrier.lift if carrier else np.zeros(hidden)
        value = of("value.bias", hidden) - of("value.weight", hidden, hidden) @ lift
        whole = of("attention.bias", hidden) + of("attention.weight", hidden, hidden) @ value - lift
        return whole.astype(np.float32)

    moved: dict[str, Loader] = {f"{layer}.attention.bias": attention}
    if carrier:
        moved |= {f"{layer}.query.weight": lambda: query(carrier), f"{norm}.bias": lambda: carrier.raised}
    return moved


def _embeddings(graph: Graph, config: EncoderConfig, weight: Weights, pairs: bool) -> str:
    """Embedded tokens, (tokens, hidden)."""
    table, first = position_table(config, weight, pairs), config.pad or 0  # what the padding token has is place 0
    x = graph.add("Gather", parameter(graph, weight, "embeddings.word", config.vocab, config.hidden), "input_ids")
    places = graph.add("Gather", graph.weight("embeddings.position", lambda: table()[first:]), "positions")
    if pairs:
        types = parameter(graph, weight, "embeddings.token_type", config.token_types, config.hidden)
        places = graph.add("Add", places, graph.add("Gather", types, "token_type_ids"))
    return _norm(graph, config, weight, "embeddings.norm", x, places)


def _bias(graph: Graph, config: EncoderConfig, weight: Weights) -> str:
    graph.add("Gather", graph.add("Shape", "token_offset"), graph.integers([1]), name="tokens")
    return attention_bias(graph, config, weight)


def _layer(
    graph: Graph, config: EncoderConfig, weight: Weights, layer: str, x: str, bias: str, only: str, *, query_bias: bool
) -> str:
    """All states from those before; or, since attention makes all, of what follows it ``only`` some."""
    hidden, wide = config.hidden, config.intermediate
    query, key, value = (
        linear(graph, weight, f"{layer}.{part}", x, hidden, hidden, bias=query_bias and part == "query")
        for part in ("query", "key", "value")
    )
    inputs = [query, key, value, "", "token_offset", "cumulative_lengths", *([bias] if bias else [])]
    attended = graph.add("PackedMultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=config.heads)
    if only:
        attended, x = (graph.add("Gather", states, only) for states in (attended, x))
    attended = linear(graph, weight, f"{layer}.attention", attended, hidden, hidden, bias=False)
    shift = parameter(graph, weight, f"{layer}.attention.bias", hidden)
    x = _norm(graph, config, weight, f"{layer}.attention_norm", attended, x, shift)
    gelu = config.activation == "gelu"
    up = linear(graph, weight, f"{layer}.up", x, hidden, wide, bias=not gelu)
    if gelu:
        up = graph.add("BiasGelu", up, parameter(graph, weight, f"{layer}.up.bias", wide), domain=MICROSOFT)
    else:
        up = activate(graph, config.activation, up)
    down = linear(graph, weight, f"{layer}.down", up, wide, hidden, bias=False)
    shift = parameter(graph, weight, f"{layer}.down.bias", hidden)
    return _norm(graph, config, weight, f"{layer}.norm", down, x, shift)


def _norm(graph: Graph, config: EncoderConfig, weight: Weights, name: str, x: str, skip: str, *bias: str) -> str:
    """The layer normalisation of a sum, in float32 (which the runtime asks older ONNX Runtimes for)."""
    parts = [parameter(graph, weight, f"{name}.{part}", config.hidden) for part in ("weight", "bias")]
    return graph.add("SkipLayerNormalization", x, skip, *parts, *bias, domain=MICROSOFT, epsilon=config.norm_eps)


def _output(
    graph: Graph, config: EncoderConfig, weight: Weights, output: Output, x: str, starts: str, pooling: Pooling | None
) -> None:
    """Emit what makes an output of the last hidden states ``x``: (tokens, hidden), or (texts, hidden) of first ones.

    Without ``starts``, they are first ones.
    """
    if output == "token_vectors":
        vectors = linear(graph, weight, "colbert", x, config.hidden, width := colbert_width(weight))
        graph.add("Cast", vectors, name=output, to=TensorProto.FLOAT)
        graph.outputs.append(float_value(output, "tokens", width))
    elif output == "token_weights":
        states = graph.add("Cast", x, to=TensorProto.FLOAT)
        weights = graph.add("Relu", linear(graph, weight, f"{HEADS}sparse", states, config.hidden, 1))
        graph.add("Reshape", weights, graph.integers([-1]), name=output)
        graph.outputs.append(float_value(output, "tokens"))
    elif output == "logits":
        score_head(graph, config, weight, graph.add("Cast", x, to=TensorProto.FLOAT))
    else:
        graph.add("Cast", _pooled(graph, x, starts, pooling), name=POOLED, to=TensorProto.FLOAT)
        graph.outputs.append(float_value(POOLED, "texts", config.hidden))


def _pooled(graph: Graph, x: str, starts: str, pooling: Pooling | None) -> str:
    """One state for each text, (texts, hidden)."""
    if pooling == "cls":
        return graph.add("Gather", x, starts) if starts else x
    ends = graph.add("Slice", "cumulative_lengths", graph.integers([1]), graph.integers([EVERY]))
    if pooling == "last_token":
        one = graph.weight("one", np.array(1, np.int32))
        return graph.add("Gather", x, graph.add("Sub", ends, one))
    # A text's row of this matrix has its tokens' shares, so that sums stay in range. The product is a tensor core's and
    # accumulates in float32; it costs a hundredth of the encoder for texts of a hundred tokens.
    column = graph.integers([1])
    own = graph.add("Equal", graph.add("Unsqueeze", starts, column), "text_starts")
    shares = graph.add("Cast", own, to=TensorProto.FLOAT16)
    lengths = graph.add("Cast", graph.add("Sub", ends, starts), to=TensorProto.FLOAT16)
    return graph.add("MatMul", graph.add("Div", shares, graph.add("Unsqueeze", lengths, column)), x)


def on_any_provider(graph: Graph) -> Graph:
    """A packed graph as every provider can run it, with its fp16 weights in fp32.

    It shows on a machine without a GPU that the graph and its rounded weights are right. What it can't show is fp16
    arithmetic.
    """
    result = Graph(list(graph.inputs), graph.outputs, [], {name: _whole(load) for name, load in graph.weights.items()})
    if not any(entry.name == "text_starts" for entry in graph.inputs):
        result.inputs.append(int_value("text_starts", "tokens", kind=TensorProto.INT32))
    _keep_apart(result)
    for node in graph.nodes:
        if node.op_type == "PackedMultiHeadAttention":
            _attend(result, node)
            continue
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT16:
            node = helper.make_node("Cast", node.input, node.output, node.name, to=TensorProto.FLOAT)
        result.nodes.append(node)
    return result


def _whole(load: Loader) -> Loader:
    def whole() -> np.ndarray:
        array = load()
        return array.astype(np.float32) if array.dtype == np.float16 else array

    return whole


def _keep_apart(graph: Graph) -> None:
    """Name ``apart``, which hides one text's tokens from another's, (tokens, tokens), and their ``places`` in each."""
    column = graph.add("Unsqueeze", "text_starts", graph.integers([1]), name="apart.column")
    shown, hidden = (graph.weight(str(value), np.array(value, np.float32)) for value in (0.0, -np.inf))
    graph.add("Where", graph.add("Equal", column, "text_starts", name="apart.same"), shown, hidden, name="apart")
    tokens = graph.add("Squeeze", graph.add("Shape", "text_starts", name="apart.shape"), name="apart.tokens")
    rows = graph.add("Range", graph.integers(0), tokens, graph.integers(1), name="apart.rows")
    starts = graph.add("Cast", "text_starts", name="apart.starts", to=TensorProto.INT64)
    graph.add("Sub", rows, starts, name="places")


def _attend(graph: Graph, node: onnx.NodeProto) -> None:
    """``PackedMultiHeadAttention`` in plain operators; its memory grows with the square of all tokens."""

    def add(op: str, *inputs: str, **attributes: Any) -> str:  # noqa: ANN401
        return graph.add(op, *inputs, name=f"{node.name}.{len(graph.nodes)}", **attributes)

    heads = next(attribute.i for attribute in node.attribute if attribute.name == "num_heads")
    split = graph.integers([0, heads, -1])
    query, key, value = (add("Reshape", part, split) for part in node.input[:3])
    size = add("Gather", add("Shape", query), graph.integers(2))
    query, value = (add("Transpose", part, perm=[1, 0, 2]) for part in (query, value))
    scores = add("MatMul", query, add("Transpose", key, perm=[1, 2, 0]))
    scores = add("Div", scores, add("Sqrt", add("Cast", size, to=TensorProto.FLOAT)))
    if len(node.input) > 6:
        bias = add("Squeeze", node.input[6], graph.integers([0]))
        for axis in (1, 2):
            bias = add("Gather", bias, "places", axis=axis)
        scores = add("Add", scores, bias)
    attended = add("MatMul", add("Softmax", add("Add", scores, "apart"), axis=-1), value)
    attended = add("Transpose", attended, perm=[1, 0, 2])
    graph.add("Reshape", attended, graph.integers([0, -1]), name=node.output[0])
