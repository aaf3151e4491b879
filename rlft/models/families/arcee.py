"""Arcee AFM: Llama's layer whose MLP has no gate, and the square of ReLU as its activation."""

from rlft.models.families import Family

FAMILY = Family(
    "ArceeModel", gate_up=("mlp.up_proj",), gated=False, window="none", reads=("head_dim", "attention_bias", "mlp_bias")
)
