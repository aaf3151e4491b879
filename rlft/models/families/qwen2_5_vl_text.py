"""Qwen2.5-VL's text decoder: Qwen2's layer, for rows whose three positions are equal, as those of text are."""

from rlft.models.families import Family

FAMILY = Family(
    "Qwen2_5_VLTextModel", reads=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
)
