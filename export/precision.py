"""Which linears of an int8 graph stay in fp32, so that no text's vector strays further than a budget."""

import bisect
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from export.errors import ExportError
from export.graph import Graph
from export.quantize import Quantized, quantize_graph
from export.verify import cosines
from runtime.batching import plan_batches
from runtime.manifest import Pooling
from runtime.model import MAX_TOKENS_PER_RUN
from runtime.pooling import POOLED, Floats, pool
from runtime.session import create_session, run_session, usable_cpus

Cosines = Callable[[Graph, Sequence[int]], np.ndarray]
"""Of a graph and the places of some texts: their vectors' cosines to the original's, ``(n,)``."""

WORST = 16
"""Texts, those that stray furthest, by which linears are compared."""


def spend_precision(
    graph: Graph,
    quantized: Mapping[str, Quantized],
    measure: Cosines,
    texts: int,
    least: float,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Quantized]:
    """The linears that can be int8 with every text's cosine to the original at ``least``.

    Those that win back most for their size when they alone stay fp32 are taken first, as many as it needs; then each is
    made int8 again if it goes without. Linears that share an input stay together.

    Args:
        graph: fp32.
        quantized: What ``quantize_linears`` made of it.
        measure: What tells the cosines.
        texts: How many there are.
        least: The budget.
        progress: Told the share that is done.

    Raises:
        ExportError: Int8 word embeddings alone stray further.
    """
    every = range(texts)

    def without(kept: Iterable[str]) -> dict[str, Quantized]:
        left_out = set(kept)
        return {value: given for value, given in quantized.items() if value not in left_out}

    def strays(kept: Iterable[str], places: Sequence[int] = every) -> float:
        """How far beyond the budget the texts are, together."""
        found = measure(quantize_graph(graph, without(kept)), places)
        return float(np.maximum(least - found, 0).sum())

    found = measure(quantize_graph(graph, quantized), every)
    if found.min() >= least:
        return dict(quantized)
    if strays(quantized):
        raise ExportError(
            f"a least cosine of {least} can't be had with int8 word embeddings, not even with all linears in fp32; "
            "lower --min-cosine, or leave int8 out with --variants fp32"
        )
    worst = np.argsort(found)[:WORST].tolist()
    rest, costs = strays((), worst), {}
    for done, (value, given) in enumerate(quantized.items(), 1):
        weights = sum(rounded.levels.size for rounded in given.linears.values())
        costs[value] = (strays([value], worst) - rest) / weights
        progress(done / len(quantized))
    order = sorted(quantized, key=lambda value: costs[value])
    enough = bisect.bisect_left(range(1, len(order)), True, key=lambda count: not strays(order[:count]))
    kept = order[: enough + 1]
    for value in kept[-2::-1]:  # the last was needed
        fewer = [other for other in kept if other != value]
        if not strays(fewer):
            kept = fewer
    return without(kept)


def cosines_of(ids: Sequence[Sequence[int]], pooling: Pooling, reference: Sequence[Floats]) -> Cosines:
    """A function that measures graphs as ``spend_precision`` asks for.

    Args:
        ids: Token ids of the texts.
        pooling: How their vectors are pooled.
        reference: The original's vectors.
    """

    def measure(graph: Graph, texts: Sequence[int]) -> np.ndarray:
        expected, found = np.array([reference[i] for i in texts]), np.empty((len(texts), len(reference[0])), np.float32)
        with tempfile.TemporaryDirectory(prefix="bge-onnx-") as scratch:
            path = Path(scratch) / "model.onnx"
            graph.save(path)
            session = create_session(path, "cpu", usable_cpus())
            pools = any(entry.name == POOLED for entry in graph.outputs)
            dense = POOLED if pools else "last_hidden_state"
            for places in plan_batches([len(ids[i]) for i in texts], MAX_TOKENS_PER_RUN):
                rows = np.array([ids[texts[place]] for place in places], np.int64)
                (states,) = run_session(session, [dense], rows)
                found[places] = states if pools else pool(states, pooling)
        return cosines(found, expected)

    return measure
