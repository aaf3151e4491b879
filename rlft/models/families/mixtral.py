"""Mixtral: Mistral's layer with experts in place of the MLP."""

from rlft.models.families import Experts, Family

FAMILY = Family(
    "MixtralModel",
    window="config",
    experts=Experts(count="num_local_experts"),
    dropouts=("attention_dropout", "router_jitter_noise"),
    reads=("head_dim", "sliding_window", "num_local_experts", "num_experts_per_tok"),
)
