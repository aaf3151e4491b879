"""Qwen2 and Qwen2.5: Llama's layer with biases on q, k, v, and sliding windows by layer."""

from rlft.models.families import Family

FAMILY = Family("Qwen2Model", reads=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"))
