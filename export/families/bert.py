"""BERT: bge-*-en and -zh, e5, gte, all-MiniLM, ms-marco-MiniLM."""

from collections.abc import Mapping
from typing import Any

from export.encoder import EncoderConfig
from export.families import Family


def config(hf: Mapping[str, Any]) -> EncoderConfig | None:
    """Read ``config.json`` (transformers' ``BertConfig``); relative positions and decoders are left to tracing."""
    activation = hf.get("hidden_act", "gelu")
    relative = hf.get("position_embedding_type", "absolute") != "absolute"
    if relative or hf.get("is_decoder") or activation not in ("gelu", "gelu_new", "relu"):
        return None
    return EncoderConfig(
        layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        heads=hf["num_attention_heads"],
        intermediate=hf["intermediate_size"],
        vocab=hf["vocab_size"],
        positions=hf["max_position_embeddings"],
        token_types=hf.get("type_vocab_size", 2),
        activation=activation,
        norm_eps=hf.get("layer_norm_eps", 1e-12),
    )


WEIGHTS = {
    "embeddings.word": "embeddings.word_embeddings.weight",
    "embeddings.position": "embeddings.position_embeddings.weight",
    "embeddings.token_type": "embeddings.token_type_embeddings.weight",
    "embeddings.norm.{p}": "embeddings.LayerNorm.{p}",
    "layer.{i}.query.{p}": "encoder.layer.{i}.attention.self.query.{p}",
    "layer.{i}.key.{p}": "encoder.layer.{i}.attention.self.key.{p}",
    "layer.{i}.value.{p}": "encoder.layer.{i}.attention.self.value.{p}",
    "layer.{i}.attention.{p}": "encoder.layer.{i}.attention.output.dense.{p}",
    "layer.{i}.attention_norm.{p}": "encoder.layer.{i}.attention.output.LayerNorm.{p}",
    "layer.{i}.up.{p}": "encoder.layer.{i}.intermediate.dense.{p}",
    "layer.{i}.down.{p}": "encoder.layer.{i}.output.dense.{p}",
    "layer.{i}.norm.{p}": "encoder.layer.{i}.output.LayerNorm.{p}",
    "head.dense.{p}": "pooler.dense.{p}",
    "head.out.{p}": "classifier.{p}",
    "mlm.dense.{p}": "cls.predictions.transform.dense.{p}",
    "mlm.norm.{p}": "cls.predictions.transform.LayerNorm.{p}",
    "mlm.bias": "cls.predictions.bias",
}

FAMILY = Family(config=config, weights=WEIGHTS, prefix="bert.")
