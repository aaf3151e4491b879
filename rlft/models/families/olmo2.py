"""OLMo 2: norms behind attention and MLP instead of before them, and of q and k over all heads."""

from rlft.models.families import Family

FAMILY = Family(
    "Olmo2Model",
    input_norm=None,
    attention_norm="post_attention_layernorm",
    mlp_norm=None,
    down_norm="post_feedforward_layernorm",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    qk_norm_whole=True,
    norm_style="olmo",
    window="none",
    reads=("attention_bias",),
)
