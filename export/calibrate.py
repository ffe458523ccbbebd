"""What the linears of a graph see on calibration texts: the ranges and a sample of their inputs."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from export.errors import ExportError
from export.graph import Graph
from runtime.session import usable_cpus

ROWS = 1024
"""About how many tokens are kept of each linear's input, beside the extreme ones."""


@dataclass(slots=True)
class Sample:
    """What one value of the graph held, as rows of tokens."""

    absmax: np.ndarray
    """Largest magnitude of each channel over all calibration tokens, float32 ``(channels,)``."""
    rows: np.ndarray
    """A sample of tokens, float32 ``(rows, channels)``; each text's most extreme token is in it."""


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


def collect(graph: Graph, values: Sequence[str], token_ids: Sequence[Sequence[int]]) -> dict[str, Sample]:
    """Run the graph on each text and keep what the named values held. Deterministic.

    Args:
        graph: An fp32 graph.
        values: Names of float values of shape ``(…, channels)``.
        token_ids: Token ids of the calibration texts.
    """
    share = min(1.0, ROWS / sum(map(len, token_ids)))
    generator = np.random.default_rng(0)
    peaks: dict[str, np.ndarray] = {}
    kept: dict[str, list[np.ndarray]] = {value: [] for value in values}
    with tempfile.TemporaryDirectory(prefix="bge-onnx-") as scratch:
        session = _session(graph, values, Path(scratch) / "calibrate.onnx")
        wants_mask = any(entry.name == "attention_mask" for entry in session.get_inputs())
        wants_types = any(entry.name == "token_type_ids" for entry in session.get_inputs())
        for ids in token_ids:
            feeds = {"input_ids": np.array([ids], np.int64)}
            if wants_mask:
                feeds["attention_mask"] = np.ones_like(feeds["input_ids"])
            if wants_types:
                feeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])
            drawn = generator.random(len(ids)) < share
            for value, held in zip(values, session.run(list(values), feeds), strict=True):
                rows = held.reshape(-1, held.shape[-1])
                magnitude = np.abs(rows)
                peak = magnitude.max(axis=0)
                peaks[value] = np.maximum(peaks[value], peak) if value in peaks else peak
                extreme = np.arange(len(rows)) == magnitude.max(axis=1).argmax()
                kept[value].append(rows[drawn | extreme])
    return {value: Sample(peaks[value], np.concatenate(kept[value])) for value in values}


def _session(graph: Graph, values: Sequence[str], path: Path) -> onnxruntime.InferenceSession:
    """A session over the graph with the values as further outputs."""
    extra = [helper.make_tensor_value_info(value, TensorProto.FLOAT, None) for value in values]
    Graph(graph.inputs, [*graph.outputs, *extra], graph.nodes, graph.weights, graph.opsets).save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
