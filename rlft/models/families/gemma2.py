"""Gemma 2: norms on both sides of attention and MLP, GeGLU, softcapped scores, sliding windows by layer."""

from rlft.models.families import Family

FAMILY = Family(
    "Gemma2Model",
    attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    down_norm="post_feedforward_layernorm",
    norm_style="gemma",
    activation="hidden_activation",
    reads=(
        *("head_dim", "attention_bias", "query_pre_attn_scalar", "final_logit_softcapping"),
        *("sliding_window", "layer_types", "attn_logit_softcapping"),
    ),
)
