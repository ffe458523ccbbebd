"""Mistral: e5-mistral."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from export.decoder import DecoderConfig
from export.families import qwen2


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read ``config.json`` (transformers' ``MistralConfig``): no biases, and perhaps a window in all layers."""
    known = {key: value for key, value in hf.items() if key not in ("use_sliding_window", "layer_types")}
    return dataclasses.replace(qwen2.config(known), bias=False, window=hf.get("sliding_window", 4096))


FAMILY = dataclasses.replace(qwen2.FAMILY, config=config)
