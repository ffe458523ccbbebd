"""The route for architectures that no family describes: ``optimum.exporters.onnx`` traces the model itself."""

import contextlib
import io
import logging
import tempfile
import warnings
from pathlib import Path

from export.errors import ExportError, first_line
from export.graph import Graph, load_graph
from runtime.manifest import Output

TASKS: dict[tuple[Output, ...], str] = {
    ("last_hidden_state",): "feature-extraction",
    ("logits",): "text-classification",
}
"""optimum's name for what a graph should give."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What the runtime gives a graph."""


def trace(folder: Path, architecture: str | None, outputs: tuple[Output, ...]) -> Graph:
    """Trace a checkpoint with optimum.

    Args:
        folder: The checkpoint.
        architecture: Its ``model_type``, for the error message.
        outputs: What it should give.

    Returns:
        An fp32 graph; its inputs are the tokenizer's, a mask included.

    Raises:
        ExportError: optimum doesn't know the architecture, fails on it, can't give these outputs, or wants more inputs.
    """
    if outputs not in TASKS:
        raise ExportError(
            f"{folder}: no family builds {architecture!r}, and {outputs[-1]} can't be traced; see docs/families.md"
        )
    with tempfile.TemporaryDirectory(prefix="bge-onnx-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers  # torch and optimum are slow to import
        from optimum.exporters.onnx import main_export

        logging.getLogger("optimum").setLevel(logging.ERROR)
        transformers.logging.set_verbosity_error()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                main_export(
                    str(folder),
                    scratch,
                    task=TASKS[outputs],
                    device="cpu",
                    do_validation=False,
                    library_name="transformers",
                    trust_remote_code=False,
                )
        except Exception as error:  # whatever a model's own code raises
            raise ExportError(
                f"{folder}: no family builds {architecture!r} and optimum can't trace it ({first_line(error)}); see "
                "docs/families.md for adding a family"
            ) from error
        graph = load_graph(Path(scratch) / "model.onnx")
    if unfed := [value.name for value in graph.inputs if value.name not in INPUTS]:
        raise ExportError(
            f"{folder}: traced by optimum, {architecture!r} takes {', '.join(unfed)} beside {', '.join(INPUTS)}, which "
            "the runtime doesn't give; see docs/families.md for adding a family"
        )
    graph.outputs = [value for value in graph.outputs if value.name in outputs]
    if not graph.outputs:
        raise ExportError(f"{folder}: traced by optimum, {architecture!r} gives no {outputs[0]}; see docs/families.md")
    return graph
