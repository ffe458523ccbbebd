"""Static int8 (W8A8) of any graph's linears and word embeddings.

Activations take one fixed scale per linear, so that a text's vector never depends on its neighbours. Outlier channels
are smoothed away (SmoothQuant, arXiv:2211.10438) with a strength chosen for each linear by measured error, and weights
are rounded so that later channels make up for the error of earlier ones (GPTQ, arXiv:2210.17323). They use as much of
their 8 bits as saturates nowhere: x86 CPUs without VNNI add the products of two neighbouring channels in an int16.
"""

import dataclasses
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import numpy as np
import onnx
import scipy.linalg
from onnx import TensorProto, helper

from export.attention import attend_by_length
from export.calibrate import Sample
from export.graph import MICROSOFT, Graph, read_by

ALPHAS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Smoothing strengths tried; 0 is none, and then no ``Mul`` is emitted."""
WEIGHT_LIMIT = 127
PAIR_LIMIT = 128
"""The most that the weights of input channels 2i and 2i + 1 may add up to: 255 · 128 still fits an int16."""
DAMPING = 2.0
"""GPTQ's share of the mean diagonal that is added to the Hessian; less fails texts unlike the calibration's."""
BLOCK = 64
"""GPTQ's rows that are corrected one by one before the rest is, a matter of speed alone."""
OUTPUTS = 384
"""About how many outputs are enough to choose a scheme by."""
MIN_OUTPUTS = 16
"""A linear with fewer outputs isn't worth quantising."""
ROWS_AT_ONCE = 8192
"""Of a table, which may take gigabytes."""
MIN_ROWS = 1024
"""A vocabulary with fewer words isn't worth quantising."""

NORMS = {"LayerNormalization", "SimplifiedLayerNormalization"}
"""Operators whose further inputs scale and shift channels."""
ROWWISE = {"MatMulIntegerToFloat", "LayerNormalization", "QuantizeLinear", "Add", "Mul", "Gelu", "FastGelu", "Relu"}
"""Operators that do the same to a token's values however tokens are laid out."""
ROW_SHAPES = {"flat_shape", "first_shape", "hidden_shape"}
"""Names of shapes that differ only in how tokens are laid out."""


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A linear with constant weights: a ``Gemm``, or a ``MatMul`` with or without an ``Add`` behind it."""

    nodes: tuple[onnx.NodeProto, ...]
    weight: str
    transposed: bool
    bias: str | None

    @property
    def input(self) -> str:
        """The value it reads."""
        return self.nodes[0].input[0]

    @property
    def output(self) -> str:
        """The value it writes."""
        return self.nodes[-1].output[0]

    def matrix(self, graph: Graph) -> np.ndarray:
        """Its weights, float32 ``(in, out)``."""
        weight = graph.weights[self.weight]()
        return weight.T if self.transposed else weight


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a linear's input is quantised."""

    smooth: np.ndarray | None
    """What each input channel is divided by, float32 ``(in,)``; None where smoothing doesn't help."""
    scale: float
    zero_point: int

    def apply(self, x: np.ndarray) -> np.ndarray:
        """What the quantised linear sees of ``(rows, in)``: smoothed, rounded, clipped, and scaled back."""
        smoothed = x if self.smooth is None else x / self.smooth
        levels = np.clip(np.rint(smoothed / self.scale) + self.zero_point, 0, 255)
        return ((levels - self.zero_point) * self.scale).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Quantized:
    """The linears that share an input, quantised."""

    scheme: Scheme
    linears: dict[Linear, "Rounded"]


@dataclass(frozen=True, slots=True)
class Rounded:
    """A linear's weights in int8."""

    levels: np.ndarray
    """int8 ``(in, out)``."""
    scale: np.ndarray
    """Of each output, float32 ``(out,)``."""
    bias: np.ndarray
    """float32 ``(out,)``; takes back what rounding shifts the outputs by on average."""


def find_linears(graph: Graph) -> list[Linear]:
    """All linears whose weights are constant matrices, but for score heads: they cost nothing and decide everything."""
    consumers = graph.consumers()
    linears = []
    for node in graph.nodes:
        if node.op_type not in ("Gemm", "MatMul") or node.input[1] not in graph.weights:
            continue
        shape = graph.weights[node.input[1]]().shape
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        if len(shape) != 2 or shape[0 if transposed else 1] < MIN_OUTPUTS or node.name.startswith("head."):
            continue
        if node.op_type == "Gemm":
            linears.append(Linear((node,), node.input[1], transposed, node.input[2] if len(node.input) > 2 else None))
            continue
        after = consumers.get(node.output[0], [])
        bias = _bias(graph, after[0], node.output[0]) if len(after) == 1 else None
        linears.append(Linear((node, after[0]) if bias else (node,), node.input[1], False, bias))
    return linears


def _bias(graph: Graph, node: onnx.NodeProto, value: str) -> str | None:
    """The constant vector that an ``Add`` adds to ``value``, if that is what the node does."""
    if node.op_type != "Add":
        return None
    other = node.input[1] if node.input[0] == value else node.input[0]
    return other if other in graph.weights and graph.weights[other]().ndim == 1 else None


def quantize_linears(
    graph: Graph, samples: Mapping[str, Sample], progress: Callable[[float], None] = lambda share: None
) -> dict[str, Quantized]:
    """Of each value in ``samples``, how it and the linears that read it are quantised.

    Args:
        graph: fp32.
        samples: What ``collect`` kept of each linear's input.
        progress: Told the share that is done.
    """
    linears, quantized = find_linears(graph), {}
    for done, (value, sample) in enumerate(samples.items(), 1):
        group = [linear for linear in linears if linear.input == value]
        matrices = [linear.matrix(graph) for linear in group]
        together = np.concatenate(matrices, axis=1)
        scheme = choose_scheme(sample, together)
        columns = np.cumsum([matrix.shape[1] for matrix in matrices])[:-1]
        parts = zip(*(np.split(part, columns, -1) for part in round_linears(sample, together, scheme)), strict=True)
        rounded = {
            linear: Rounded(levels, scale, (shift + _weight_or_0(graph, linear.bias)).astype(np.float32))
            for linear, (levels, scale, shift) in zip(group, parts, strict=True)
        }
        quantized[value] = Quantized(scheme, rounded)
        progress(done / len(samples))
    return quantized


def _weight_or_0(graph: Graph, name: str | None) -> np.ndarray:
    return graph.weights[name]() if name else np.zeros(1, np.float32)


def quantize_graph(graph: Graph, quantized: Mapping[str, Quantized]) -> Graph:
    """A graph of the same inputs and outputs with int8 word embeddings and linears; those not given stay fp32."""
    graph, quantized = smooth_norms(graph, fold_smoothing(graph, quantized))
    result = Graph(graph.inputs, graph.outputs, [], dict(graph.weights), {**graph.opsets, MICROSOFT: 1})
    replaced: dict[int, list[onnx.NodeProto]] = {}
    for value, given in quantized.items():
        nodes, source = _input_nodes(result, value, given.scheme)
        for linear, rounded in given.linears.items():
            nodes.append(_linear_node(result, linear, source, rounded))
            replaced |= {id(node): [] for node in linear.nodes}
            replaced[id(linear.nodes[0])] = nodes
            nodes = []
    consumers, words = graph.consumers(), _word_ids(graph)
    for node in graph.nodes:
        if id(node) in replaced:
            result.nodes += replaced[id(node)]
        elif node.op_type == "Gelu" and all(id(reader) in replaced for reader in consumers.get(node.output[0], [])):
            # By tanh it takes three quarters of the time, and is off by 0.0005 at most: nothing beside a step of int8.
            result.nodes.append(helper.make_node("FastGelu", node.input, node.output, node.name, domain=MICROSOFT))
        else:
            result.nodes += _embedding_nodes(result, node, words)
    return attend_by_length(drop_unused(unfold_rows(result)))


def unfold_rows(graph: Graph) -> Graph:
    """Leave tokens as (batch, tokens, width) where they are laid in one row for ``Gemm``, if none is left that asks it.

    Int8's product takes any shape, and of the nodes that a query goes through, these are a sixth.
    """
    flat: set[str] = set()
    for node in graph.nodes:
        if node.op_type == "Reshape":
            flat |= {node.output[0]} if node.input[1] == "flat_shape" else set()
        elif flat.intersection(read_by(node)):
            if node.op_type not in ROWWISE:
                return graph
            flat.update(node.output)
    nodes: list[onnx.NodeProto] = []
    same: dict[str, str] = {}
    given = {output.name for output in graph.outputs}
    for node in graph.nodes:
        inputs = [same.get(value, value) for value in node.input]
        if node.op_type == "Reshape" and node.input[1] in ROW_SHAPES and node.output[0] not in given:
            same[node.output[0]] = inputs[0]
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = inputs
        nodes.append(copy)
    return dataclasses.replace(graph, nodes=nodes)


def drop_unused(graph: Graph) -> Graph:
    """The graph without nodes and weights that nothing reads."""
    needed, nodes = {output.name for output in graph.outputs}, []
    for node in reversed(graph.nodes):
        if needed.intersection(node.output):
            needed.update(read_by(node))
            nodes.append(node)
    weights = {name: load for name, load in graph.weights.items() if name in needed}
    return dataclasses.replace(graph, nodes=nodes[::-1], weights=weights)


def fold_smoothing(graph: Graph, quantized: Mapping[str, Quantized]) -> dict[str, Quantized]:
    """Smooth what attention gives where its values are made, which costs nothing: it averages each channel of them."""
    makers = {linear.output: (value, linear) for value, given in quantized.items() for linear in given.linears}
    producers, consumers = graph.producers(), graph.consumers()
    kept = {output.name for output in graph.outputs}
    alone = {value for value in producers if len(consumers.get(value, [])) <= 1 and value not in kept}
    folded = dict(quantized)
    for value, given in quantized.items():
        smooth, source = given.scheme.smooth, _attended(producers, alone, value)
        if smooth is None or source not in makers:
            continue
        place, maker = makers[source]
        rounded = folded[place].linears[maker]
        smoothed = dataclasses.replace(rounded, scale=rounded.scale / smooth, bias=rounded.bias / smooth)
        folded[place] = dataclasses.replace(folded[place], linears=folded[place].linears | {maker: smoothed})
        folded[value] = dataclasses.replace(given, scheme=dataclasses.replace(given.scheme, smooth=None))
    return folded


def smooth_norms(graph: Graph, quantized: Mapping[str, Quantized]) -> tuple[Graph, dict[str, Quantized]]:
    """Smooth what a norm gives by its own weights, which costs nothing, where only linears that are int8 read it."""
    consumers, given_out = graph.consumers(), {output.name for output in graph.outputs}
    result = dataclasses.replace(graph, nodes=list(graph.nodes), weights=dict(graph.weights))
    folded = dict(quantized)
    for place, node in enumerate(graph.nodes):
        value = node.output[0]
        if node.op_type not in NORMS or value not in quantized or value in given_out:
            continue
        given, parts = quantized[value], node.input[1:]
        smooth, int8 = given.scheme.smooth, [id(linear.nodes[0]) for linear in given.linears]
        elsewhere = any(id(reader) not in int8 for reader in consumers[value])
        if smooth is None or elsewhere or any(part not in graph.weights for part in parts):
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for i, part in enumerate(parts, 1):
            copy.input[i] = result.weight(f"{value}.smooth.{i}", graph.weights[part]() / smooth)
        result.nodes[place] = copy
        folded[value] = dataclasses.replace(given, scheme=dataclasses.replace(given.scheme, smooth=None))
    return result, folded


def _attended(producers: Mapping[str, onnx.NodeProto], alone: Set[str], value: str) -> str | None:
    """Of what a ``MultiHeadAttention`` gives the values that it attends to, if nothing else reads what lies between."""
    attended = False
    while (node := producers.get(value)) and value in alone:
        if node.op_type == "MultiHeadAttention" and not attended:
            attended, value = True, node.input[2]
        elif node.op_type in ("Reshape", "Gather"):  # which move rows: the channels of attention lie flat
            value = node.input[0]
        else:
            return value if attended else None
    return None


def choose_scheme(sample: Sample, matrix: np.ndarray) -> Scheme:
    """The smoothing with the least error in the outputs of the linears that share an input.

    Nothing of the sample is clipped. Weights are rounded plainly to 8 bits meanwhile, which costs about what
    ``round_weights`` does within its limits.
    """
    some = np.ascontiguousarray(matrix[:, :: max(1, matrix.shape[1] // OUTPUTS)])
    expected = sample.rows @ some

    def loss(scheme: Scheme) -> float:
        scaled = some if scheme.smooth is None else some * scheme.smooth[:, None]
        error = scheme.apply(sample.rows) @ _round_plainly(scaled) - expected
        return float(np.square(error - error.mean(axis=0)).sum())

    smoothed = [_full_range(sample.rows, _smoothing(sample.absmax, matrix, alpha)) for alpha in ALPHAS]
    return min(smoothed, key=loss)


def _full_range(rows: np.ndarray, smooth: np.ndarray | None) -> Scheme:
    """The scheme that clips nothing."""
    divided = rows if smooth is None else rows / smooth
    low, high = min(0.0, float(divided.min())), max(0.0, float(divided.max()))
    scale = max((high - low) / 255, 1e-12)
    return Scheme(smooth, scale, round(-low / scale))


def _smoothing(absmax: np.ndarray, matrix: np.ndarray, alpha: float) -> np.ndarray | None:
    if not alpha:
        return None
    activation, weight = np.maximum(absmax, 1e-5), np.maximum(np.abs(matrix).max(axis=1), 1e-5)
    smooth = activation**alpha / weight ** (1 - alpha)
    return (smooth / np.exp(np.log(smooth).mean())).astype(np.float32)


def _round_plainly(matrix: np.ndarray) -> np.ndarray:
    scale = _weight_scale(matrix)
    return np.rint(matrix / scale) * scale


def round_weights(matrix: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round weights to 8 bits per output channel, minimising the error on the inputs (GPTQ).

    The scale is the least at which no weight and no pair of neighbours is beyond its limit, nor are they when rounded.

    Args:
        matrix: float32 ``(in, out)``.
        inputs: A sample of what it is multiplied with, float32 ``(rows, in)``.

    Returns:
        int8 ``(in, out)`` and its scales, float32 ``(out,)``.
    """
    scale = _weight_scale(matrix)
    hessian = inputs.T @ inputs
    hessian[np.diag_indices_from(hessian)] += DAMPING * np.diagonal(hessian).mean() + 1e-12
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    # The upper Cholesky factor of the inverse is the inverted factor of the reversed matrix, reversed.
    backwards = np.linalg.cholesky(hessian[np.ix_(order[::-1], order[::-1])])
    factor = scipy.linalg.lapack.strtri(backwards, lower=1)[0][::-1, ::-1]
    left = (matrix / scale)[order]
    levels = np.zeros(matrix.shape, np.float32)
    for start in range(0, len(left), BLOCK):
        block = slice(start, start + BLOCK)
        errors = np.empty_like(left[block])
        for i in range(start, min(start + BLOCK, len(left))):
            channel, neighbour = order[i], order[i] ^ 1
            beside = levels[neighbour] if neighbour < len(levels) else np.float32(0)  # 0 until it is rounded
            low = np.maximum(-PAIR_LIMIT - np.minimum(beside, 0), -WEIGHT_LIMIT)
            high = np.minimum(PAIR_LIMIT - np.maximum(beside, 0), WEIGHT_LIMIT)
            levels[channel] = np.clip(np.rint(left[i]), low, high)
            errors[i - start] = (left[i] - levels[channel]) / factor[i, i]
            left[i + 1 : start + BLOCK] -= np.outer(factor[i, i + 1 : start + BLOCK], errors[i - start])
        left[start + BLOCK :] -= factor[block, start + BLOCK :].T @ errors
    return levels.astype(np.int8), scale


def _weight_scale(matrix: np.ndarray) -> np.ndarray:
    """The scale of each output channel, float32 ``(out,)``."""
    even = matrix if len(matrix) % 2 == 0 else np.pad(matrix, ((0, 1), (0, 0)))
    pairs = even.reshape(-1, 2, matrix.shape[1])
    sums = np.maximum(np.maximum(pairs, 0).sum(axis=1), -np.minimum(pairs, 0).sum(axis=1))  # of one sign each
    least = np.maximum(sums.max(axis=0) / PAIR_LIMIT, np.abs(matrix).max(axis=0) / WEIGHT_LIMIT)
    return np.maximum(least, 1e-14).astype(np.float32)


def round_linears(sample: Sample, matrix: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round the weights of linears that share an input.

    Args:
        sample: What they see.
        matrix: Their weights side by side, float32 ``(in, out)``.
        scheme: How their input is quantised.

    Returns:
        int8 ``(in, out)``, scales float32 ``(out,)``, and what rounding shifts the outputs by on average, float32
        ``(out,)``, which the bias can take back.
    """
    seen = scheme.apply(sample.rows)
    levels, scale = round_weights(matrix if scheme.smooth is None else matrix * scheme.smooth[:, None], seen)
    return levels, scale, (sample.rows @ matrix - seen @ (levels * scale)).mean(axis=0)


def _input_nodes(result: Graph, value: str, scheme: Scheme) -> tuple[list[onnx.NodeProto], str]:
    """The nodes that smooth and quantise a value, and the name of what they give."""
    nodes, source = [], value
    if scheme.smooth is not None:
        source = f"{value}.smooth"
        factor = result.weight(f"{source}.factor", 1 / scheme.smooth)
        nodes.append(helper.make_node("Mul", [value, factor], [source], source))
    result.weight(f"{value}.scale", np.array(scheme.scale, np.float32))
    result.weight(f"{value}.zero_point", np.array(scheme.zero_point, np.uint8))
    inputs = [source, f"{value}.scale", f"{value}.zero_point"]
    nodes.append(helper.make_node("QuantizeLinear", inputs, [f"{value}.int8"], f"{value}.int8"))
    return nodes, f"{value}.int8"


def _linear_node(result: Graph, linear: Linear, quantized: str, rounded: Rounded) -> onnx.NodeProto:
    value, name = linear.input, linear.output  # not the weight's name, which linears may share
    inputs = [
        quantized,
        result.weight(f"{name}.int8", rounded.levels),
        f"{value}.scale",
        result.weight(f"{name}.scale", rounded.scale),
        f"{value}.zero_point",
        result.weight(f"{name}.zero_point", np.zeros(len(rounded.scale), np.int8)),
        result.weight(f"{name}.bias", rounded.bias),
    ]
    return helper.make_node("MatMulIntegerToFloat", inputs, [linear.output], linear.output, domain=MICROSOFT)


def _word_ids(graph: Graph) -> set[str]:
    """The values that hold the token ids, reshaped or as another type."""
    words = {"input_ids"}
    for node in graph.nodes:
        if node.op_type in ("Reshape", "Cast", "Identity") and node.input[0] in words:
            words.add(node.output[0])
    return words


def _embedding_nodes(result: Graph, node: onnx.NodeProto, words: Set[str]) -> list[onnx.NodeProto]:
    """A lookup of words as one in an int8 table with a scale per row; any other node, of positions too, as it is."""
    if node.op_type != "Gather" or node.input[0] not in result.weights or any(a.i for a in node.attribute):
        return [node]
    name, indices = node.input[0], node.input[1]
    if indices not in words:
        return [node]
    table = result.weights[name]()
    if table.ndim != 2 or len(table) < MIN_ROWS or table.dtype != np.float32:
        return [node]
    scale, levels = np.empty((len(table), 1), np.float32), np.empty(table.shape, np.int8)
    for start in range(0, len(table), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        scale[rows] = np.maximum(np.abs(table[rows]).max(axis=1, keepdims=True), 1e-12) / 127
        levels[rows] = np.rint(table[rows] / scale[rows])
    result.weight(f"{name}.int8", levels)
    result.weight(f"{name}.scale", scale)
    rounded, floats, scales = (f"{node.output[0]}.{part}" for part in ("int8", "float", "scale"))
    return [
        helper.make_node("Gather", [f"{name}.int8", indices], [rounded], rounded),
        helper.make_node("Cast", [rounded], [floats], floats, to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{name}.scale", indices], [scales], scales),
        helper.make_node("Mul", [floats, scales], [node.output[0]], node.output[0]),
    ]
