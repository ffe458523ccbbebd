"""RoBERTa, and XLM-R and CamemBERT, which differ in their tokenizers alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from export.encoder import EncoderConfig
from export.families import Family, bert


def config(hf: Mapping[str, Any]) -> EncoderConfig | None:
    """Read ``config.json`` (transformers' ``RobertaConfig``): BERT, but places count from behind the padding id."""
    encoder = bert.config(hf)
    pad = hf.get("pad_token_id", 1)
    return encoder and dataclasses.replace(
        encoder, pad=pad, positions=encoder.positions - pad - 1, mlm_activation="gelu"
    )


WEIGHTS = bert.WEIGHTS | {
    "head.dense.{p}": "classifier.dense.{p}",
    "head.out.{p}": "classifier.out_proj.{p}",
    "mlm.dense.{p}": "lm_head.dense.{p}",
    "mlm.norm.{p}": "lm_head.layer_norm.{p}",
    "mlm.bias": "lm_head.bias",
}

FAMILY = Family(config=config, weights=WEIGHTS, prefix="roberta.")
