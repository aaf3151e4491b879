"""Qwen3-VL's text decoder: Qwen3's layer, for rows whose three positions are equal, as those of text are."""

from rlft.models.families import Family

FAMILY = Family(
    "Qwen3VLTextModel",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    window="none",
    reads=("head_dim", "attention_bias"),
)
