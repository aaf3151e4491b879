"""OLMoE: a norm over all heads of q and of k, and experts in place of the MLP."""

from rlft.models.families import Experts, Family

FAMILY = Family(
    "OlmoeModel",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    qk_norm_whole=True,
    window="none",
    experts=Experts(renormalised="norm_topk_prob"),
    reads=("attention_bias", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
)
