"""Ministral: Mistral's layer with sliding windows by layer."""

from rlft.models.families import Family

FAMILY = Family("MinistralModel", reads=("head_dim", "sliding_window", "layer_types"))
