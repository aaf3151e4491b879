"""Qwen3-Next: Qwen3.5's layers with projections that lie by key head, experts, and a shared one with a gate."""

from dataclasses import replace

from rlft.models.families import Delta, Experts
from rlft.models.families import qwen3_5_text as dense

ATTENTION = replace(
    dense.ATTENTION,
    decoder="Qwen3NextModel",
    experts=Experts(
        renormalised="norm_topk_prob",
        shared_gate_up=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        shared_down="mlp.shared_expert.down_proj",
        shared_gate="mlp.shared_expert_gate",
        dense_layers="mlp_only_layers",
        every="decoder_sparse_step",
    ),
    reads=(
        *dense.ATTENTION.reads,
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"),
        *("norm_topk_prob", "mlp_only_layers", "decoder_sparse_step"),
    ),
)
DELTA = replace(
    ATTENTION,
    mixer=Delta(by_head=True),
    qkv=("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
    out=dense.DELTA.out,
    qk_norm=None,
    output_gate=False,
)
FAMILY = replace(ATTENTION, by_type={"linear_attention": DELTA})
