"""OLMo hybrid: OLMo 3's attention in every fourth layer, and gated DeltaNet with norms before attention and MLP."""

from dataclasses import replace

from rlft.models.families import Delta
from rlft.models.families.olmo2 import FAMILY as OLMO2

ATTENTION = replace(
    OLMO2,
    decoder="OlmoHybridModel",
    rotary="config",
    reads=(
        *("attention_bias", "layer_types", "linear_allow_neg_eigval", "linear_conv_kernel_dim"),
        *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
        # Of the initialisation alone.
        *("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor"),
    ),
)
DELTA = replace(
    ATTENTION,
    mixer=Delta(norm="linear_attn.o_norm", double_beta="linear_allow_neg_eigval"),
    qkv=tuple(f"linear_attn.{name}_proj" for name in "qkvgba"),
    out="linear_attn.o_proj",
    input_norm="input_layernorm",
    attention_norm=None,
    mlp_norm="post_attention_layernorm",
    down_norm=None,
    qk_norm=None,
)
FAMILY = replace(ATTENTION, by_type={"linear_attention": DELTA})
