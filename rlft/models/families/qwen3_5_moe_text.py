"""Qwen3.5 MoE: Qwen3.5's layers, of gated DeltaNet and of attention, with experts and a shared one with a gate."""

from dataclasses import replace

from rlft.models.families import Experts
from rlft.models.families import qwen3_5_text as dense

ATTENTION = replace(
    dense.ATTENTION,
    decoder="Qwen3_5MoeTextModel",
    experts=Experts(
        shared_gate_up=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        shared_down="mlp.shared_expert.down_proj",
        shared_gate="mlp.shared_expert_gate",
    ),
    reads=(
        *dense.ATTENTION.reads,
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"),
    ),
)
DELTA = replace(
    ATTENTION, mixer=dense.DELTA.mixer, qkv=dense.DELTA.qkv, out=dense.DELTA.out, qk_norm=None, output_gate=False
)
FAMILY = replace(ATTENTION, by_type={"linear_attention": DELTA})
