"""What the linears of a graph see on calibration texts: the ranges and a sample of their inputs."""

import concurrent.futures
import functools
import heapq
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from export.errors import ExportError, first_line
from export.graph import Graph
from runtime.session import Session, run_session, usable_cpus

ROWS = 1024
"""About how many tokens are kept of each linear's input, beside the extreme ones."""
EXTREMES = 1024
"""Of so many texts, the most extreme ones, the most extreme token is kept too: memory doesn't grow with the texts."""
WORKERS = 8
"""The most texts at once: in a model of XLM-R-large's shape the values of one of 512 tokens take 0.35 GB."""


@dataclass(slots=True)
class Sample:
    """What one value of the graph held, as rows of tokens."""

    absmax: np.ndarray
    """Largest magnitude of each channel over all calibration tokens, float32 ``(channels,)``."""
    rows: np.ndarray
    """A sample of tokens, float32 ``(rows, channels)``, with the most extreme token of each of ``EXTREMES`` texts."""


@dataclass(slots=True)
class Kept:
    """What is kept of a value while texts are run."""

    absmax: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float32))
    rows: dict[int, np.ndarray] = field(default_factory=dict)
    """Of each text by its number."""
    extremes: list[tuple[float, int, np.ndarray]] = field(default_factory=list)
    """A heap: a text's most extreme magnitude, its number downwards, and which of its rows are drawn."""

    def add(self, number: int, magnitude: np.ndarray, rows: np.ndarray, drawn: np.ndarray) -> None:
        """Keep of a text the drawn tokens and the most extreme one, until there are too many others more extreme."""
        self.absmax = np.maximum(self.absmax, magnitude)
        self.rows[number] = rows
        heapq.heappush(self.extremes, (float(magnitude.max()), -number, drawn))
        if len(self.extremes) > EXTREMES:
            _, negative, drawn = heapq.heappop(self.extremes)
            rows = self.rows.pop(-negative)[drawn]
            if len(rows):
                self.rows[-negative] = rows


def calibration_texts(path: Path | None = None) -> list[str]:
    """The texts of a file, one a line; by default the project's own mixed set.

    Raises:
        ExportError: The file can't be read or holds no text.
    """
    source = path or files("export").joinpath("texts/calibration.txt")
    try:
        texts = [line for line in source.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path}: can't be read ({error}); pass a UTF-8 file with one text a line") from None
    if not texts:
        raise ExportError(f"{path}: holds no text; pass a UTF-8 file with one text a line")
    return texts


def calibration_pairs(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Queries and passages for a reranker: a line with a tab is a pair, any other is made into one.

    A line's first third is a query that its rest answers, for half of them; the others go with the line that follows.
    """
    pairs = []
    for i, text in enumerate(texts):
        words = text.split(" ")
        if "\t" in text:
            query, _, passage = text.partition("\t")
        elif i % 2 and len(words) > 5:
            query, passage = " ".join(words[: len(words) // 3]), " ".join(words[len(words) // 3 :])
        else:
            query, passage = text, texts[(i + 1) % len(texts)]
        pairs.append((query, passage))
    return pairs


def collect(
    graph: Graph, values: Sequence[str], texts: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> dict[str, Sample]:
    """Run the graph on each text and keep what the named values held. Deterministic.

    Args:
        graph: An fp32 graph.
        values: Names of float values of shape ``(…, channels)``.
        texts: Token ids and token types of the calibration texts.
    """
    share = min(1.0, ROWS / sum(len(ids) for ids, _ in texts))
    generator = np.random.default_rng(0)
    drawn = [generator.random(len(ids)) < share for ids, _ in texts]
    with tempfile.TemporaryDirectory(prefix="bge-onnx-") as scratch:
        session = _session(graph, values, Path(scratch) / "calibrate.onnx")
        with concurrent.futures.ThreadPoolExecutor(min(usable_cpus(), WORKERS)) as pool:
            kept = [Kept() for _ in values]
            for number, observed in enumerate(pool.map(functools.partial(_observe, session, values), texts, drawn)):
                for part, seen in zip(kept, observed, strict=True):
                    part.add(number, *seen)
    merged = {}
    for value in values:
        held = kept.pop(0)  # a large model's would be held twice
        merged[value] = Sample(held.absmax, np.concatenate(list(held.rows.values())))
    return merged


def _observe(
    session: Session,
    values: Sequence[str],
    text: tuple[Sequence[int], Sequence[int]],
    drawn: np.ndarray,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each value on one text: channels' magnitudes, the drawn tokens and the most extreme, and which are drawn."""
    ids, types = (np.array([part], np.int64) for part in text)
    try:
        held = run_session(session, values, ids, types)
    except Exception as error:  # onnxruntime's errors share no public base
        raise ExportError(
            f"the graph fails on a calibration text of {ids.size} tokens ({first_line(error)}); "
            "is the checkpoint whole, and its max length right?"
        ) from error
    samples = []
    for rows in (value.reshape(-1, value.shape[-1]) for value in held):
        magnitude = np.abs(rows)
        some = np.resize(drawn, len(rows))
        chosen = some | (np.arange(len(rows)) == magnitude.max(axis=1).argmax())
        samples.append((magnitude.max(axis=0), rows[chosen], some[chosen]))
    return samples


def _session(graph: Graph, values: Sequence[str], path: Path) -> Session:
    """A session over the graph with the values as further outputs."""
    extra = [helper.make_tensor_value_info(value, TensorProto.FLOAT, None) for value in values]
    Graph(graph.inputs, [*graph.outputs, *extra], graph.nodes, graph.weights, graph.opsets).save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # texts run side by side instead, which is faster
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
