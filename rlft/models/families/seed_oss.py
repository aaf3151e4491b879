"""Seed-OSS: Llama's layer with biases on q, k, v, and dropouts in training mode."""

from rlft.models.families import Family

FAMILY = Family(
    "SeedOssModel",
    window="none",
    dropouts=("attention_dropout", "residual_dropout"),
    reads=("head_dim", "attention_bias", "attention_out_bias", "mlp_bias"),
)
