"""Qwen2-VL's text decoder: Qwen2's layer, with positions on the axes of images."""

from rlft.models.families import Family

FAMILY = Family("Qwen2VLTextModel", reads=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"))
