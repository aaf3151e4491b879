"""Ministral 3: Mistral's layer with a scale on q that grows with the position."""

from rlft.models.families import Family

FAMILY = Family(
    "Ministral3Model",
    window="config",
    query_scale=("llama_4_scaling_beta", "original_max_position_embeddings"),
    reads=("head_dim", "sliding_window"),
)
