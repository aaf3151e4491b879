"""Gemma 1: Llama's layer with GeGLU and norms that multiply by 1 + weight."""

from rlft.models.families import Family

FAMILY = Family("GemmaModel", norm_style="gemma", window="none", reads=("head_dim", "attention_bias"))
