"""Phi-3 and Phi-4: Llama's layer with q, k, v in one projection and gate, up in another, partial rotary."""

from rlft.models.families import Family

FAMILY = Family(
    "Phi3Model",
    qkv=("self_attn.qkv_proj",),
    gate_up=("mlp.gate_up_proj",),
    window="config",
    dropouts=("attention_dropout", "resid_pdrop", "embd_pdrop"),
    reads=("original_max_position_embeddings", "sliding_window"),
)
