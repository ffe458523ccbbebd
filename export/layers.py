"""The parts that models share: checked shapes and weights, linears, norms, activations, and SPLADE's head."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from export.errors import ExportError
from export.graph import MICROSOFT, Graph, Loader, float_value, int_value
from runtime.manifest import Output, Pooling
from runtime.pooling import POOLED

Weights: TypeAlias = Callable[[str], Loader]
"""Gives the loader of a weight by our name (see ``Family``), such as ``layer.0.query.weight``."""

Activation = Literal["gelu", "gelu_new", "relu", "silu"]


def check_shape(config: Any, **least: int) -> None:  # noqa: ANN401
    """Check what a spoilt ``config.json`` may have made of a model's configuration.

    Args:
        config: The configuration; unless it says what a ``head`` has, the heads share the width.
        least: Further sizes than those that every model has, and the smallest that each may be.

    Raises:
        ValueError: A size isn't a whole number or is too small, or the heads don't share the width evenly.
    """
    sizes = ("layers", "hidden", "heads", "intermediate", "vocab", "positions")
    for name, lowest in (dict.fromkeys(sizes, 1) | least).items():
        value = getattr(config, name)
        if type(value) is not int or value < lowest:
            raise ValueError(f"{name} is {value!r:.60}, not a whole number from {lowest} up")
    if not hasattr(config, "head") and config.hidden % config.heads:
        raise ValueError(f"{config.heads} attention heads can't share {config.hidden} dimensions evenly")
    if not isinstance(config.norm_eps, float | int):
        raise ValueError(f"the norms' epsilon is {config.norm_eps!r:.60}, not a number")


def check_theta(theta: object) -> None:
    """Check the base of rotary positions.

    Raises:
        ValueError: It isn't a positive number.
    """
    if not isinstance(theta, float | int) or not theta > 0:
        raise ValueError(f"rotary positions have the theta {theta!r:.60}, not a positive number")


def rotary_tables(graph: Graph, kind: str, positions: int, size: int, theta: float) -> None:
    """Name ``{kind}.cos`` and ``{kind}.sin`` for heads of a size, (positions, size / 2).

    They are made in float32 throughout, as transformers' are.
    """
    frequency = 1 / np.float32(theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    angle = np.arange(positions, dtype=np.float32)[:, None] * frequency
    graph.weight(f"{kind}.cos", np.cos(angle))
    graph.weight(f"{kind}.sin", np.sin(angle))


def token_graph(hidden: int) -> Graph:
    """A graph of ``input_ids``, int64 (batch, tokens).

    It names their ``shape``, that of their states, ``hidden_shape``, and ``flat_shape`` for states laid in one row.
    """
    graph = Graph(inputs=[int_value("input_ids", "batch", "tokens")])
    graph.weight("flat_shape", np.array([-1, hidden], np.int64))
    graph.add(
        "Concat", graph.add("Shape", "input_ids", name="shape"), graph.integers([hidden]), name="hidden_shape", axis=0
    )
    return graph


def linear(
    graph: Graph,
    weight: Weights,
    name: str,
    x: str,
    width_in: int,
    width_out: int,
    *,
    bias: bool = True,
    output: str = "",
) -> str:
    """A linear over flat tokens, as ``Gemm``, which takes the bias along."""
    inputs = [x, parameter(graph, weight, f"{name}.weight", width_out, width_in)]
    if bias:
        inputs.append(parameter(graph, weight, f"{name}.bias", width_out))
    return graph.add("Gemm", *inputs, name=output or name, transB=1)


def norm(graph: Graph, weight: Weights, name: str, x: str, width: int, epsilon: float, *, bias: bool = True) -> str:
    """A layer normalisation."""
    parts = [
        parameter(graph, weight, f"{name}.{part}", width) for part in ("weight", "bias") if part == "weight" or bias
    ]
    return graph.add("LayerNormalization", x, *parts, axis=-1, epsilon=epsilon)


def reads_first(outputs: Sequence[Output], pooling: Pooling | None, head: Pooling = "cls") -> bool:
    """Whether only each text's first of the last states is read: how vectors are pooled, and how for a score head."""
    pooled_by: dict[tuple[Output, ...], Pooling | None] = {("last_hidden_state",): pooling, ("logits",): head}
    return pooled_by.get(tuple(outputs)) == "cls"


def states_at(graph: Graph, x: str, place: int) -> str:
    """Of flat tokens each text's at a place, such as 0 for the first and -1 for the last, (batch, width)."""
    states = graph.add("Gather", graph.add("Reshape", x, "hidden_shape"), graph.integers([place]), axis=1)
    return graph.add("Reshape", states, "flat_shape")


def of_texts(graph: Graph, x: str, width: int, name: str = "") -> str:
    """A state of each text as (batch, width), which it is not where an int8 graph keeps tokens as they come."""
    return graph.add("Reshape", x, graph.weight("texts_shape", np.array([-1, width], np.int64)), name=name)


def give_states(graph: Graph, x: str, width: int, one: bool) -> None:
    """Emit the flat last states ``x`` as the graph's output; if it is ``one`` of each text, as the text's vector."""
    if one:
        graph.outputs.append(float_value(of_texts(graph, x, width, POOLED), "batch", width))
    else:
        states = graph.add("Reshape", x, "hidden_shape", name="last_hidden_state")
        graph.outputs.append(float_value(states, "batch", "tokens", width))


def activate(graph: Graph, activation: Activation, x: str) -> str:
    """An activation, under transformers' name for it."""
    match activation:
        case "gelu":
            return graph.add("Gelu", x, domain=MICROSOFT)
        case "gelu_new":
            return graph.add("FastGelu", x, domain=MICROSOFT)
        case "relu":
            return graph.add("Relu", x)
        case "silu":
            return graph.add("QuickGelu", x, domain=MICROSOFT, alpha=1.0)


def vocabulary_weights(graph: Graph, weight: Weights, x: str, vocab: int, hidden: int, *, bias: bool = True) -> None:
    """SPLADE's output (arXiv:2109.10086), of the last states of a masked language model's head."""
    inputs = [x, parameter(graph, weight, "embeddings.word", vocab, hidden)]
    if bias:
        inputs.append(parameter(graph, weight, "mlm.bias", vocab))
    x = graph.add("Gemm", *inputs, name="mlm.out", transB=1)
    graph.weight("vocabulary", np.array([vocab], np.int64))
    x = graph.add("Reshape", x, graph.add("Concat", "shape", "vocabulary", axis=0))
    x = graph.add("Relu", graph.add("ReduceMax", x, axes=[1], keepdims=0))
    graph.add("Log", graph.add("Add", x, graph.weight("1.0", np.array(1, np.float32))), name="vocabulary_weights")
    graph.outputs.append(float_value("vocabulary_weights", "batch", vocab))


def parameter(graph: Graph, weight: Weights, name: str, *shape: int) -> str:
    """A weight of the checkpoint, which ``checked`` reads."""
    return graph.weight(name, checked(weight, name, *shape))


def checked(weight: Weights, name: str, *shape: int) -> Loader:
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
