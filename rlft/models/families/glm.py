"""GLM-4-9B: Llama's layer with gate and up in one projection, biases on q, k, v, and an interleaved, partial rotary."""

from rlft.models.families import Family

FAMILY = Family(
    "GlmModel", gate_up=("mlp.gate_up_proj",), window="none", interleaved=True, reads=("head_dim", "attention_bias")
)
