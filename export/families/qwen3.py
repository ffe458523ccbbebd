"""Qwen3: Qwen3-Embedding."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from export.decoder import DecoderConfig
from export.families import qwen2


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read ``config.json`` (transformers' ``Qwen3Config``): each head's query and key have a norm of their own."""
    bias, head = hf.get("attention_bias", False), hf.get("head_dim", 128)
    return dataclasses.replace(qwen2.config({**hf, "head_dim": head}), head_norm=True, bias=bias, output_bias=bias)


FAMILY = dataclasses.replace(qwen2.FAMILY, config=config)
