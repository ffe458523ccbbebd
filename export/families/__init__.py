"""Model families that are built rather than traced: one module per ``model_type`` of ``config.json``."""

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.encoder import build_encoder
from export.errors import ExportError
from export.graph import Graph, Loader
from export.layers import Weights
from export.packed import build_packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model family: how to read its ``config.json``, and what it calls its weights.

    Attributes:
        config: From ``config.json`` to the configuration of its emitter, or None where that can't express it, but
            tracing can; it raises ``KeyError`` or ``ValueError`` for a spoilt file, ``ExportError`` for a model that
            neither can make.
        weights: Our name of each weight → the checkpoint's, both with ``{i}`` for the layer and ``{p}`` for ``weight``
            or ``bias``. Where one weight holds several of ours, ``[1/3]`` at the end is the second third of its rows.
        prefix: What a checkpoint with a head puts before the other weights' names.
        build: The emitter, from its configuration, the weights, the outputs and the pooling to the graph.
        pack: The emitter of fp16 for CUDA, from the same, or None where there is none.
        cuda: Whether the fp32 graph runs on CUDA, too.
    """

    config: Callable[[Mapping[str, object]], Any]
    weights: dict[str, str]
    prefix: str
    build: Callable[..., Graph] = build_encoder
    pack: Callable[..., Graph] | None = build_packed
    cuda: bool = True


M3 = {"head.sparse.{p}": "sparse_linear.{p}", "colbert.{p}": "colbert_linear.{p}"}
"""BGE-M3's heads, which lie in files of their own beside an encoder of whatever family."""


def find_family(model_type: str) -> Family | None:
    """The family for a ``model_type`` such as ``bert``, or None where the model has to be traced."""
    module = f"{__name__}.{model_type.replace('-', '_')}"
    if not re.fullmatch(r"[a-z][\w-]*", model_type) or importlib.util.find_spec(module) is None:
        return None
    family: Family = importlib.import_module(module).FAMILY
    return family


def weight_finder(family: Family, weights: Mapping[str, Loader]) -> Weights:
    """A function from our name of a weight to its loader.

    Args:
        family: Says what the checkpoint calls it.
        weights: The checkpoint's, by its own names.
    """
    names = M3 | family.weights

    def find(name: str) -> Loader:
        layer = re.match(r"layer\.(\d+)\.", name)
        pattern = re.sub(r"^layer\.\d+\.", "layer.{i}.", name)
        stem, _, part = pattern.rpartition(".")
        theirs = names.get(pattern) or names[f"{stem}.{{p}}"]
        theirs, _, share = theirs.format(i=layer and layer[1], p=part).partition("[")
        for candidate in (theirs, family.prefix + theirs):
            if candidate in weights:
                return _rows(weights[candidate], share.rstrip("]")) if share else weights[candidate]
        raise ExportError(
            f"the checkpoint has no weight {theirs!r}, as its model_type in config.json has; save it whole with "
            "transformers, or mend the model_type"
        )

    return find


def _rows(load: Loader, share: str) -> Loader:
    """A share such as ``1/3`` of a weight's rows."""
    which, of = map(int, share.split("/"))
    return lambda: np.array_split(load(), of)[which]
