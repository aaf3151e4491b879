"""GLM-4.5 and 4.6: experts by sigmoid scores with a correction and groups, a shared one, and dense first layers."""

from rlft.models.families import Experts, Family

FAMILY = Family(
    "Glm4MoeModel",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    qk_norm_flag="use_qk_norm",
    window="none",
    experts=Experts(
        wide_router=True,
        scoring="sigmoid",
        renormalised="norm_topk_prob",
        scale="routed_scaling_factor",
        groups=("n_group", "topk_group"),
        shared_gate_up=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        shared_down="mlp.shared_experts.down_proj",
        count="n_routed_experts",
        dense_first="first_k_dense_replace",
    ),
    reads=(
        *("head_dim", "attention_bias", "use_qk_norm", "first_k_dense_replace", "norm_topk_prob"),
        *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"),
        *("n_group", "topk_group", "routed_scaling_factor", "num_mtp_layers"),
    ),
)
