"""Qwen2: bge-code-v1."""

from collections.abc import Mapping
from typing import Any, get_args

from export.decoder import DecoderConfig, build_decoder
from export.errors import ExportError
from export.families import Family
from export.layers import Activation


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read ``config.json`` (transformers' ``Qwen2Config``, or that of a kin).

    Raises:
        ExportError: Its tokens see those behind them, or some not all of those before, its rotary positions are scaled,
            its activation is unknown, or ``GroupQueryAttention`` can't take its heads.
    """
    ropes = [hf.get(key) or {} for key in ("rope_scaling", "rope_parameters")]  # the second is transformers 5's
    kinds = {rope.get("rope_type", rope.get("type", "default")) for rope in ropes}
    layers, activation = hf["num_hidden_layers"], hf.get("hidden_act", "silu")
    local = hf.get("use_sliding_window") and hf.get("max_window_layers", 28) < layers
    heads = hf["num_attention_heads"]
    head = hf.get("head_dim") or hf["hidden_size"] // heads
    for cause, is_so in {
        "is_causal or use_bidirectional_attention lets tokens see those behind them": (
            hf.get("is_causal") is False or hf.get("use_bidirectional_attention")
        ),
        f"it scales its rotary positions ({', '.join(sorted(map(str, kinds)))})": kinds != {"default"},
        "use_sliding_window or layer_types makes layers local": (
            local or set(hf.get("layer_types") or ()) - {"full_attention"}
        ),
        f"its hidden_act is {activation!r}": activation not in get_args(Activation),
        f"its heads have {head} dimensions, not a multiple of 16": head % 16,
    }.items():
        if is_so:
            raise ExportError(f"its config.json is of a decoder that can't be built yet: {cause}; see docs/families.md")
    return DecoderConfig(
        layers=layers,
        hidden=hf["hidden_size"],
        heads=heads,
        key_heads=hf["num_key_value_heads"] or heads,
        head=head,
        intermediate=hf["intermediate_size"],
        vocab=hf["vocab_size"],
        positions=hf["max_position_embeddings"],
        theta=ropes[1].get("rope_theta", hf.get("rope_theta", 10_000)),
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
