"""HunYuan (dense): Llama's layer with norms of each head of q and k after the rotary embedding."""

from rlft.models.families import Family

FAMILY = Family(
    "HunYuanDenseV1Model",
    qk_norm=("self_attn.query_layernorm", "self_attn.key_layernorm"),
    qk_norm_after=True,
    window="none",
    reads=("head_dim", "attention_bias"),
)
