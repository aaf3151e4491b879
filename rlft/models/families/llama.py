"""Llama 2 and 3, SmolLM2, and everything else saved as `llama`."""

from rlft.models.families import Family

FAMILY = Family("LlamaModel", window="none", reads=("head_dim", "attention_bias", "mlp_bias"))
