"""CWM: Llama's layer with sliding windows by layer."""

from rlft.models.families import Family

FAMILY = Family("CwmModel", reads=("head_dim", "mlp_bias", "sliding_window", "layer_types"))
