"""Granite 3 and 4 (dense): Llama's layer with factors on embedded tokens, scores, outputs and logits."""

from rlft.models.families import Family

FAMILY = Family(
    "GraniteModel",
    window="none",
    embedding_factor="embedding_multiplier",
    residual_factor="residual_multiplier",
    reads=("attention_bias", "mlp_bias", "attention_multiplier", "logits_scaling"),
)
