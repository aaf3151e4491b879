"""Qwen3: a norm over each head of q and of k."""

from rlft.models.families import Family

FAMILY = Family(
    "Qwen3Model",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    reads=(
        *("head_dim", "attention_bias"),
        *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    ),
)
