"""Qwen3.5: three layers of gated DeltaNet for one of attention, whose output has a gate."""

from dataclasses import replace

from rlft.models.families import Delta, Family

ATTENTION = Family(
    "Qwen3_5TextModel",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    gated_attention=True,
    norm_style="gemma",
    window="none",
    reads=(
        *("head_dim", "attention_bias", "layer_types", "linear_conv_kernel_dim"),
        *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    ),
)
DELTA = replace(
    ATTENTION,
    mixer=Delta(),
    qkv=tuple(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a")),
    out="linear_attn.out_proj",
    qk_norm=None,
    gated_attention=False,
)
FAMILY = replace(ATTENTION, by_type={"linear_attention": DELTA})
