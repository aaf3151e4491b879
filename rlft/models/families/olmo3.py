"""OLMo 3: OLMo 2's layer with sliding windows and a rotary table for each type of layer."""

from dataclasses import replace

from rlft.models.families.olmo2 import FAMILY as OLMO2

FAMILY = replace(
    OLMO2,
    decoder="Olmo3Model",
    window="layer",
    rope_by_type=True,
    reads=("attention_bias", "sliding_window", "layer_types"),
)
