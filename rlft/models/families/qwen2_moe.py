"""Qwen2 MoE (Qwen1.5-MoE, Qwen2-57B-A14B): Qwen2's layer with experts, and a shared one with a gate."""

from rlft.models.families import Experts, Family

FAMILY = Family(
    "Qwen2MoeModel",
    experts=Experts(
        renormalised="norm_topk_prob",
        shared_gate_up=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        shared_down="mlp.shared_expert.down_proj",
        shared_gate="mlp.shared_expert_gate",
        dense_layers="mlp_only_layers",
        every="decoder_sparse_step",
    ),
    reads=(
        *("qkv_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"),
        *("norm_topk_prob", "mlp_only_layers", "decoder_sparse_step"),
    ),
)
