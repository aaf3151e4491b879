"""Qwen3 MoE: Qwen3's layer with experts in place of the MLP; some layers may be dense."""

from rlft.models.families import Experts, Family

FAMILY = Family(
    "Qwen3MoeModel",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    experts=Experts(renormalised="norm_topk_prob", dense_layers="mlp_only_layers", every="decoder_sparse_step"),
    reads=(
        *("head_dim", "attention_bias", "use_sliding_window", "sliding_window"),
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        *("mlp_only_layers", "decoder_sparse_step"),
    ),
)
