"""OLMo 3: OLMo 2's layer with sliding windows and a rotary table for each type of layer."""

from rlft.models.families import Family

FAMILY = Family(
    "Olmo3Model",
    input_norm=None,
    attention_norm="post_attention_layernorm",
    mlp_norm=None,
    down_norm="post_feedforward_layernorm",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    qk_norm_whole=True,
    norm_style="olmo",
    rope_by_type=True,
    reads=("attention_bias", "sliding_window", "layer_types"),
)
