"""ERNIE 4.5 (dense): Llama's layer with an interleaved rotary."""

from rlft.models.families import Family

FAMILY = Family("Ernie4_5Model", window="none", interleaved=True, reads=("head_dim", "use_bias"))
