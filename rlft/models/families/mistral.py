"""Mistral: Llama's layer; one sliding window for all layers where the config has one."""

from rlft.models.families import Family

FAMILY = Family("MistralModel", window="config", reads=("head_dim", "sliding_window"))
