"""Helium: Llama's layer with an interleaved rotary and norms that multiply by their weight in fp32."""

from rlft.models.families import Family

FAMILY = Family(
    "HeliumModel", norm_style="olmo", window="none", interleaved=True, reads=("head_dim", "attention_bias", "mlp_bias")
)
