"""GLM-4-0414: GLM's layer with norms behind attention and MLP too."""

from rlft.models.families import Family

FAMILY = Family(
    "Glm4Model",
    gate_up=("mlp.gate_up_proj",),
    attention_norm="post_self_attn_layernorm",
    down_norm="post_mlp_layernorm",
    window="none",
    interleaved=True,
    reads=("head_dim", "attention_bias"),
)
