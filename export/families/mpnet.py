"""MPNet: all-mpnet-base-v2, multi-qa-mpnet-base-*."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from export.encoder import EncoderConfig
from export.families import Family, roberta


def config(hf: Mapping[str, Any]) -> EncoderConfig | None:
    """Read ``config.json`` (transformers' ``MPNetConfig``): RoBERTa with T5's relative attention and no token types."""
    encoder = roberta.config({**hf, "pad_token_id": 1})  # transformers' MPNet doesn't read it
    return encoder and dataclasses.replace(
        encoder, token_types=0, relative_buckets=hf.get("relative_attention_num_buckets", 32)
    )


WEIGHTS = roberta.WEIGHTS | {
    "attention_bias": "encoder.relative_attention_bias.weight",
    "layer.{i}.query.{p}": "encoder.layer.{i}.attention.attn.q.{p}",
    "layer.{i}.key.{p}": "encoder.layer.{i}.attention.attn.k.{p}",
    "layer.{i}.value.{p}": "encoder.layer.{i}.attention.attn.v.{p}",
    "layer.{i}.attention.{p}": "encoder.layer.{i}.attention.attn.o.{p}",
    "layer.{i}.attention_norm.{p}": "encoder.layer.{i}.attention.LayerNorm.{p}",
}

FAMILY = Family(config=config, weights=WEIGHTS, prefix="mpnet.")
