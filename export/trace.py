"""The route for architectures that no family describes: ``optimum.exporters.onnx`` traces the model itself."""

import contextlib
import io
import logging
import tempfile
import warnings
from pathlib import Path

from export.errors import ExportError, first_line
from export.graph import Graph, load_graph


def trace(folder: Path, architecture: str | None, task: str) -> Graph:
    """Trace a checkpoint with optimum.

    Args:
        folder: The checkpoint.
        architecture: Its ``model_type``, for the error message.
        task: optimum's task name, such as ``feature-extraction``.

    Returns:
        An fp32 graph whose first output is what the task names; its inputs are the tokenizer's, a mask included.

    Raises:
        ExportError: optimum doesn't know the architecture or fails on it.
    """
    with tempfile.TemporaryDirectory(prefix="bge-onnx-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers  # torch and optimum are slow to import
        from optimum.exporters.onnx import main_export

        logging.getLogger("optimum").setLevel(logging.ERROR)
        transformers.logging.set_verbosity_error()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                main_export(
                    str(folder), scratch, task=task, device="cpu", do_validation=False, library_name="transformers"
                )
        except Exception as error:  # whatever a model's own code raises
            raise ExportError(
                f"{folder}: no family builds {architecture!r} and optimum can't trace it ({first_line(error)}); see "
                "docs/families.md for adding a family"
            ) from error
        graph = load_graph(Path(scratch) / "model.onnx")
    del graph.outputs[1:]
    return graph
