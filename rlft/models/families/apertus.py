"""Apertus: Qwen3's layer whose MLP has no gate, and xIELU as its activation."""

from rlft.models.families import Family

FAMILY = Family(
    "ApertusModel",
    gate_up=("mlp.up_proj",),
    gated=False,
    activation_module="mlp.act_fn",
    input_norm="attention_layernorm",
    mlp_norm="feedforward_layernorm",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    window="none",
    reads=("attention_bias",),
)
