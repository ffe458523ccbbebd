"""The pre-norm encoder with rotary positions, gated linears and local attention that is ModernBERT."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from export.errors import ExportError
from export.graph import MICROSOFT, Graph, float_value
from export.layers import (
    Activation,
    Weights,
    activate,
    check_shape,
    check_theta,
    give_states,
    linear,
    norm,
    of_texts,
    parameter,
    reads_first,
    rotary_tables,
    states_at,
    token_graph,
    vocabulary_weights,
)
from runtime.manifest import Output, Pooling

BLOCK = 128
"""Local attention takes at least so many tokens at once: fewer keep the CPU less busy, more look at more in vain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrenormConfig:
    """The shape of a pre-norm encoder with rotary positions (ModernBERT)."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab: int
    positions: int
    """Longest text, in tokens."""
    global_every: int
    """Of so many layers the first is global: its tokens see all others. The rest are local."""
    window: int
    """Around a local layer's token; it sees half of it to either side."""
    global_theta: float
    local_theta: float
    """Bases of the rotary positions."""
    activation: Activation
    norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    norm_bias: bool
    head_activation: Activation
    head_bias: bool
    """Of the first linear of a head, be it of scores or of words."""
    head_pooling: Literal["cls", "mean"]
    mlm_bias: bool

    def __post_init__(self) -> None:
        """Check what a spoilt ``config.json`` may hold.

        Raises:
            ValueError: As ``check_shape``, or a theta isn't a positive number.
        """
        check_shape(self, global_every=1, window=0)
        check_theta(self.global_theta)
        check_theta(self.local_theta)


def build_prenorm(
    config: PrenormConfig,
    weight: Weights,
    outputs: Sequence[Output] = ("last_hidden_state",),
    pooling: Pooling | None = None,
) -> Graph:
    """The encoder in fp32, from ``input_ids`` int64 (batch, tokens) to each of the outputs.

    As in ``build_encoder`` there is no mask, and a last layer of first states where no others are read. Memory grows
    with the tokens, not with their square: global layers take ``MultiHeadAttention``'s flash path, local ones attend
    block by block.

    Args:
        config: The encoder's shape.
        weight: The checkpoint's, by our names.
        outputs: What the graph gives.
        pooling: How it pools; by ``cls`` it gives ``sentence_embedding``, as ``build_encoder``.
    """
    graph = token_graph(config.hidden)
    head = config.hidden // config.heads
    rotary_tables(graph, "global", config.positions, head, config.global_theta)
    if config.global_every > 1:
        rotary_tables(graph, "local", config.positions, head, config.local_theta)
        _windows(graph, config)
    x = graph.add("Gather", parameter(graph, weight, "embeddings.word", config.vocab, config.hidden), "input_ids")
    x = _norm(graph, config, weight, "embeddings.norm", graph.add("Reshape", x, "flat_shape"))
    first = reads_first(outputs, pooling, config.head_pooling)
    for i in range(config.layers):
        x = _layer(graph, config, weight, i, x, first=first and i == config.layers - 1)
    x = _norm(graph, config, weight, "norm", x)
    for output in outputs:
        _output(graph, config, weight, output, x, first)
    return graph


def _windows(graph: Graph, config: PrenormConfig) -> None:
    """Cut each text into blocks of equal length, each with a window of the tokens that its own may see.

    Names, for all blocks of all texts, the ``places`` of their tokens in the text and their ``rows`` among all tokens,
    of ``query`` (blocks, block) and of ``key`` (blocks, window); ``unseen`` (blocks, 1, block, window), the attention
    bias that hides what is out of reach; and ``unblocked``, where each token's row is after attention.

    A text of less than two blocks is one, whose window is all of it. The last block is filled up with the last token.
    """
    zero, one, reach = (graph.integers(x) for x in (0, 1, config.window // 2))
    column = graph.integers([1])
    texts, tokens = graph.add("Gather", "shape", zero), graph.add("Gather", "shape", one)
    last = graph.add("Sub", tokens, one)
    blocks = graph.add("Max", graph.add("Div", tokens, graph.integers(BLOCK)), one)
    block = graph.add("Add", graph.add("Div", last, blocks), one)
    window = graph.add("Min", graph.add("Add", block, graph.integers(config.window // 2 * 2)), tokens)

    index = graph.add("Unsqueeze", graph.add("Range", zero, graph.add("Mul", texts, blocks), one), column)
    start = graph.add("Mul", graph.add("Mod", index, blocks), block)
    query = graph.add("Add", start, graph.add("Range", zero, block, one))
    query = graph.add("Min", query, last, name="query.places")
    first = graph.add("Max", graph.add("Sub", start, reach), zero)
    first = graph.add("Min", first, graph.add("Sub", tokens, window))
    key = graph.add("Add", first, graph.add("Range", zero, window, one), name="key.places")
    before = graph.add("Mul", graph.add("Div", index, blocks), tokens)
    graph.add("Add", query, before, name="query.rows")
    graph.add("Add", key, before, name="key.rows")

    query, key = (graph.add("Unsqueeze", *x) for x in ((query, graph.integers([1, 3])), (key, graph.integers([1, 2]))))
    far = graph.add("Greater", graph.add("Abs", graph.add("Sub", query, key)), reach)
    hidden, shown = (graph.weight(str(x), np.array(x, np.float32)) for x in (-np.inf, 0.0))
    graph.add("Where", far, hidden, shown, name="unseen")

    before = graph.add("Mul", graph.add("Range", zero, texts, one), graph.add("Mul", blocks, block))
    rows = graph.add("Add", graph.add("Unsqueeze", before, column), graph.add("Range", zero, tokens, one))
    graph.add("Reshape", rows, graph.integers([-1]), name="unblocked")


def _layer(graph: Graph, config: PrenormConfig, weight: Weights, i: int, x: str, *, first: bool = False) -> str:
    """All states from those before; or, from all of those, the first of each text."""
    hidden, wide, layer = config.hidden, config.intermediate, f"layer.{i}"
    seen = _norm(graph, config, weight, f"{layer}.attention_norm", x) if i else x
    local = i % config.global_every > 0
    heads = []
    for part, side in (("query", "query"), ("key", "key"), ("value", "key")):
        states, shape, turned = seen, "hidden_shape", part != "value"
        if first and part == "query" and not local:
            states, turned = states_at(graph, seen, 0), False  # place 0 turns nothing
            shape = graph.weight("first_shape", np.array([-1, 1, hidden], np.int64))
        head = linear(graph, weight, f"{layer}.{part}", states, hidden, hidden, bias=config.attention_bias)
        head = graph.add("Gather", head, f"{side}.rows") if local else graph.add("Reshape", head, shape)
        if turned:
            places = ["local.cos", "local.sin"] if local else ["global.cos", "global.sin"]
            start = f"{side}.places" if local else graph.integers([0])
            head = graph.add("RotaryEmbedding", head, start, *places, domain=MICROSOFT)
        heads.append(head)
    bias = ["", "", "unseen"] if local else []
    attended = graph.add("MultiHeadAttention", *heads, *bias, domain=MICROSOFT, num_heads=config.heads)
    attended = graph.add("Reshape", attended, "flat_shape")
    if local:
        attended = graph.add("Gather", attended, "unblocked")
    if first:
        x = states_at(graph, x, 0)
        attended = states_at(graph, attended, 0) if local else attended
    attended = linear(graph, weight, f"{layer}.attention", attended, hidden, hidden, bias=config.attention_bias)
    x = graph.add("Add", x, attended)
    seen = _norm(graph, config, weight, f"{layer}.norm", x)
    up = linear(graph, weight, f"{layer}.up", seen, hidden, wide, bias=config.mlp_bias)
    gate = linear(graph, weight, f"{layer}.gate", seen, hidden, wide, bias=config.mlp_bias)
    gated = graph.add("Mul", activate(graph, config.activation, up), gate)
    return graph.add("Add", x, linear(graph, weight, f"{layer}.down", gated, wide, hidden, bias=config.mlp_bias))


def _output(graph: Graph, config: PrenormConfig, weight: Weights, output: Output, x: str, first: bool) -> None:
    """Emit what makes an output of the flat last hidden states ``x``, or with ``first`` of each text's first."""
    match output:
        case "last_hidden_state":
            give_states(graph, x, config.hidden, first)
        case "logits":
            if config.head_pooling == "mean":
                x = graph.add("ReduceMean", graph.add("Reshape", x, "hidden_shape"), axes=[1], keepdims=0)
            else:
                x = of_texts(graph, x if first else states_at(graph, x, 0), config.hidden)
            x = _head(graph, config, weight, "head", x)
            linear(graph, weight, "head.out", x, config.hidden, 1, output=output)
            graph.outputs.append(float_value(output, "batch", 1))
        case "vocabulary_weights":
            x = _head(graph, config, weight, "mlm", x)
            vocabulary_weights(graph, weight, x, config.vocab, config.hidden, bias=config.mlm_bias)
        case _:
            raise ExportError(f"{output} can't be built with ModernBERT; see docs/families.md")


def _head(graph: Graph, config: PrenormConfig, weight: Weights, name: str, x: str) -> str:
    dense = linear(graph, weight, f"{name}.dense", x, config.hidden, config.hidden, bias=config.head_bias)
    return _norm(graph, config, weight, f"{name}.norm", activate(graph, config.head_activation, dense))


def _norm(graph: Graph, config: PrenormConfig, weight: Weights, name: str, x: str) -> str:
    return norm(graph, weight, name, x, config.hidden, config.norm_eps, bias=config.norm_bias)
