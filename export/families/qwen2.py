"""Qwen2: bge-code."""

from collections.abc import Mapping
from typing import Any, get_args

from export.decoder import DecoderConfig, build_decoder
from export.families import Family
from export.layers import Activation


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read ``config.json`` (transformers' ``Qwen2Config``, or that of a kin).

    Raises:
        ValueError: Its positions are scaled, some of its layers are local, or its activation is unknown.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # the first is transformers 5's
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"it scales its rotary positions by {kind!r}, which can't be built yet")
    if hf.get("use_sliding_window") or "sliding_attention" in (hf.get("layer_types") or ()):
        raise ValueError("its use_sliding_window or layer_types make layers local, which can't be built yet")
    if (activation := hf.get("hidden_act", "silu")) not in get_args(Activation):
        raise ValueError(f"its hidden_act {activation!r} can't be built yet")
    heads = hf["num_attention_heads"]
    return DecoderConfig(
        layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        heads=heads,
        key_heads=hf.get("num_key_value_heads") or heads,
        head=hf.get("head_dim") or hf["hidden_size"] // heads,
        intermediate=hf["intermediate_size"],
        vocab=hf["vocab_size"],
        positions=hf["max_position_embeddings"],
        theta=rope.get("rope_theta", hf.get("rope_theta", 10_000)),
        activation=activation,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        bias=True,
    )


WEIGHTS = {
    "embeddings.word": "embed_tokens.weight",
    "layer.{i}.attention_norm.{p}": "layers.{i}.input_layernorm.{p}",
    "layer.{i}.query.{p}": "layers.{i}.self_attn.q_proj.{p}",
    "layer.{i}.query_norm.{p}": "layers.{i}.self_attn.q_norm.{p}",
    "layer.{i}.key.{p}": "layers.{i}.self_attn.k_proj.{p}",
    "layer.{i}.key_norm.{p}": "layers.{i}.self_attn.k_norm.{p}",
    "layer.{i}.value.{p}": "layers.{i}.self_attn.v_proj.{p}",
    "layer.{i}.attention.{p}": "layers.{i}.self_attn.o_proj.{p}",
    "layer.{i}.norm.{p}": "layers.{i}.post_attention_layernorm.{p}",
    "layer.{i}.gate.{p}": "layers.{i}.mlp.gate_proj.{p}",
    "layer.{i}.up.{p}": "layers.{i}.mlp.up_proj.{p}",
    "layer.{i}.down.{p}": "layers.{i}.mlp.down_proj.{p}",
    "norm.{p}": "norm.{p}",
}

FAMILY = Family(config=config, weights=WEIGHTS, prefix="model.", build=build_decoder, pack=None, cuda=False)
