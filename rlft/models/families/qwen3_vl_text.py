"""Qwen3-VL's text decoder: Qwen3's layer, with positions on the axes of images.

The features that its tower adds behind the first layers are added by the decoder (`rlft.models.vision.ImageRows`).
"""

from rlft.models.families import Family

FAMILY = Family(
    "Qwen3VLTextModel",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    window="none",
    reads=("head_dim", "attention_bias"),
)
