"""ModernBERT: gte-modernbert, gte-reranker-modernbert, granite-embedding r2."""

from collections.abc import Mapping
from typing import Any, get_args

from export.errors import ExportError
from export.families import Family
from export.layers import Activation
from export.prenorm import PrenormConfig, build_prenorm


def config(hf: Mapping[str, Any]) -> PrenormConfig | None:
    """Read ``config.json`` (transformers' ``ModernBertConfig``); scaled rotary positions are left to tracing.

    Raises:
        ExportError: They are scaled, or layers are made local, as only transformers 5 can, so that tracing would be
            silently wrong.
    """
    activation, head_activation = hf.get("hidden_activation", "gelu"), hf.get("classifier_activation", "gelu")
    pooling = hf.get("classifier_pooling", "cls")
    rope = hf.get("rope_parameters") or {}  # where transformers 5 keeps both thetas
    if any(kind.get("rope_type", "default") != "default" for kind in rope.values()):
        raise ExportError("rope_parameters scale its rotary positions, which can't be built yet; see docs/families.md")
    known = activation in get_args(Activation) and head_activation in get_args(Activation)
    every = hf.get("global_attn_every_n_layers", 3)
    types = ["sliding_attention" if i % every else "full_attention" for i in range(hf["num_hidden_layers"])]
    if hf.get("layer_types", types) != types:
        raise ExportError(f"layer_types isn't of one global layer in {every}, the first; see docs/families.md")
    if hf.get("rope_scaling") or not known or pooling not in ("cls", "mean"):
        return None
    global_theta = rope.get("full_attention", {}).get("rope_theta", hf.get("global_rope_theta", 160_000))
    local_theta = rope.get("sliding_attention", {}).get("rope_theta", hf.get("local_rope_theta", 10_000))
    return PrenormConfig(
        layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        heads=hf["num_attention_heads"],
        intermediate=hf["intermediate_size"],
        vocab=hf["vocab_size"],
        positions=hf["max_position_embeddings"],
        global_every=every,
        window=hf.get("local_attention", 128),
        global_theta=global_theta,
        local_theta=local_theta or global_theta,
        activation=activation,
        norm_eps=hf.get("norm_eps", 1e-5),
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        norm_bias=hf.get("norm_bias", False),
        head_activation=head_activation,
        head_bias=hf.get("classifier_bias", False),
        head_pooling=pooling,
        mlm_bias=hf.get("decoder_bias", True),
    )


WEIGHTS = {
    "embeddings.word": "embeddings.tok_embeddings.weight",
    "embeddings.norm.{p}": "embeddings.norm.{p}",
    "layer.{i}.attention_norm.{p}": "layers.{i}.attn_norm.{p}",
    "layer.{i}.query.{p}": "layers.{i}.attn.Wqkv.{p}[0/3]",
    "layer.{i}.key.{p}": "layers.{i}.attn.Wqkv.{p}[1/3]",
    "layer.{i}.value.{p}": "layers.{i}.attn.Wqkv.{p}[2/3]",
    "layer.{i}.attention.{p}": "layers.{i}.attn.Wo.{p}",
    "layer.{i}.norm.{p}": "layers.{i}.mlp_norm.{p}",
    "layer.{i}.up.{p}": "layers.{i}.mlp.Wi.{p}[0/2]",
    "layer.{i}.gate.{p}": "layers.{i}.mlp.Wi.{p}[1/2]",
    "layer.{i}.down.{p}": "layers.{i}.mlp.Wo.{p}",
    "norm.{p}": "final_norm.{p}",
    "head.dense.{p}": "head.dense.{p}",
    "head.norm.{p}": "head.norm.{p}",
    "head.out.{p}": "classifier.{p}",
    "mlm.dense.{p}": "head.dense.{p}",
    "mlm.norm.{p}": "head.norm.{p}",
    "mlm.bias": "decoder.bias",
}

FAMILY = Family(config=config, weights=WEIGHTS, prefix="model.", build=build_prenorm, pack=None)
