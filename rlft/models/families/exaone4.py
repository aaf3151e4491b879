"""EXAONE 4: norms behind attention and MLP; with windows, q and k are rotated in the layers that have one."""

from rlft.models.families import Family

FAMILY = Family(
    "Exaone4Model",
    input_norm=None,
    attention_norm="post_attention_layernorm",
    mlp_norm=None,
    down_norm="post_feedforward_layernorm",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    window="flag",
    rotary="sliding",
    reads=("sliding_window", "sliding_window_pattern", "layer_types"),
)
