"""Gemma 3, text only: Gemma 2's layer with norms of q and k, and a rotary table for each type of layer."""

from rlft.models.families import Family

FAMILY = Family(
    "Gemma3TextModel",
    attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    down_norm="post_feedforward_layernorm",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    norm_style="gemma",
    activation="hidden_activation",
    rope_by_type=True,
    reads=(
        *("head_dim", "attention_bias", "query_pre_attn_scalar", "final_logit_softcapping"),
        *("sliding_window", "layer_types"),
    ),
)
