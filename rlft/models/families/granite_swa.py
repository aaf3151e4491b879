"""Granite with sliding windows: Granite's layer with attention sinks, and a base of the rotary frequencies by layer."""

from rlft.models.families import Family

FAMILY = Family(
    "GraniteSWAModel",
    sinks=True,
    rope_bases="layer_rope_theta",
    embedding_factor="embedding_multiplier",
    residual_factor="residual_multiplier",
    reads=(
        *("attention_bias", "mlp_bias", "attention_multiplier", "logits_scaling"),
        *("sliding_window", "layer_types"),
    ),
)
