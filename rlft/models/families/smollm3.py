"""SmolLM3: Llama's layer, whose q and k are not rotated in every fourth layer; sliding windows by layer."""

from rlft.models.families import Family

FAMILY = Family(
    "SmolLM3Model",
    rotary="flag",
    reads=(
        *("attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"),
        *("use_sliding_window", "sliding_window", "layer_types"),
    ),
)
