"""Llama 2 and 3, SmolLM2, and everything else saved as `llama`."""

from rlft.models.families import Family

FAMILY = Family("LlamaModel", window="none")
