"""LFM2: gated short convolutions, with attention in some of the layers."""

from dataclasses import replace

from rlft.models.families import Conv, Family

ATTENTION = Family(
    "Lfm2Model",
    out="self_attn.out_proj",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
    input_norm="operator_norm",
    mlp_norm="ffn_norm",
    final_norm="embedding_norm",
    qk_norm=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    activation="silu",
    window="none",
    dropouts=(),
    reads=(
        *("norm_eps", "layer_types", "full_attn_idxs", "conv_bias", "conv_L_cache"),
        *("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of"),
    ),
)
CONV = replace(ATTENTION, mixer=Conv(), qkv=("conv.in_proj",), out="conv.out_proj", qk_norm=None)
FAMILY = replace(ATTENTION, by_type={"conv": CONV})
