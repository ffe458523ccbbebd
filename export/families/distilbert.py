"""DistilBERT."""

from collections.abc import Mapping
from typing import Any

from export.encoder import EncoderConfig
from export.families import Family


def config(hf: Mapping[str, Any]) -> EncoderConfig | None:
    """Read ``config.json`` (transformers' ``DistilBertConfig``)."""
    activation = hf.get("activation", "gelu")
    if activation not in ("gelu", "relu"):
        return None
    return EncoderConfig(
        layers=hf["n_layers"],
        hidden=hf["dim"],
        heads=hf["n_heads"],
        intermediate=hf["hidden_dim"],
        vocab=hf["vocab_size"],
        positions=hf["max_position_embeddings"],
        token_types=0,
        activation=activation,
        norm_eps=1e-12,
        head_activation="relu",
    )


WEIGHTS = {
    "embeddings.word": "embeddings.word_embeddings.weight",
    "embeddings.position": "embeddings.position_embeddings.weight",
    "embeddings.norm.{p}": "embeddings.LayerNorm.{p}",
    "layer.{i}.query.{p}": "transformer.layer.{i}.attention.q_lin.{p}",
    "layer.{i}.key.{p}": "transformer.layer.{i}.attention.k_lin.{p}",
    "layer.{i}.value.{p}": "transformer.layer.{i}.attention.v_lin.{p}",
    "layer.{i}.attention.{p}": "transformer.layer.{i}.attention.out_lin.{p}",
    "layer.{i}.attention_norm.{p}": "transformer.layer.{i}.sa_layer_norm.{p}",
    "layer.{i}.up.{p}": "transformer.layer.{i}.ffn.lin1.{p}",
    "layer.{i}.down.{p}": "transformer.layer.{i}.ffn.lin2.{p}",
    "layer.{i}.norm.{p}": "transformer.layer.{i}.output_layer_norm.{p}",
    "head.dense.{p}": "pre_classifier.{p}",
    "head.out.{p}": "classifier.{p}",
    "mlm.dense.{p}": "vocab_transform.{p}",
    "mlm.norm.{p}": "vocab_layer_norm.{p}",
    "mlm.bias": "vocab_projector.bias",
}

FAMILY = Family(config=config, weights=WEIGHTS, prefix="distilbert.")
