"""Model families that are built rather than traced: one module per ``model_type`` of ``config.json``."""

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping

from export.encoder import Family
from export.errors import ExportError
from export.graph import Loader


def find_family(model_type: str) -> Family | None:
    """The family for a ``model_type`` such as ``bert``, or None where the model has to be traced."""
    module = f"{__name__}.{model_type.replace('-', '_')}"
    if not re.fullmatch(r"[a-z][\w-]*", model_type) or importlib.util.find_spec(module) is None:
        return None
    family: Family = importlib.import_module(module).FAMILY
    return family


def weight_finder(family: Family, weights: Mapping[str, Loader]) -> Callable[[str], Loader]:
    """A function from our name of a weight to its loader.

    Args:
        family: Says what the checkpoint calls it.
        weights: The checkpoint's, by its own names.
    """

    def find(name: str) -> Loader:
        layer = re.match(r"layer\.(\d+)\.", name)
        pattern = re.sub(r"^layer\.\d+\.", "layer.{i}.", name)
        stem, _, part = pattern.rpartition(".")
        theirs = family.weights.get(pattern) or family.weights[f"{stem}.{{p}}"]
        theirs = theirs.format(i=layer and layer[1], p=part)
        for candidate in (theirs, family.prefix + theirs):
            if candidate in weights:
                return weights[candidate]
        raise ExportError(f"the checkpoint has no weight {theirs!r}; is it a {family.prefix.rstrip('.')} encoder?")

    return find
