"""Describe an architecture to the fused layers: names and flags, one file per transformers `model_type`.

A decoder layer of every family here is

    n1 = norm(x);  q, k, v = n1 Wqkv;  q, k = rope(norm(q), norm(k));  o = attention(q, k, v) Wo
    mid = x + [norm](o);  n2 = norm(mid);  h = act(n2 Wgate) * (n2 Wup);  x' = mid + [norm](h Wdown)

and a family gives the names of its modules, which of the norms in brackets and of q, k it has, and its conventions.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Names and flags of an architecture; module paths are relative to a decoder layer, config attributes to the text
    config."""

    decoder: str
    """Class name of the decoder model in transformers."""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three projections, or one whose output rows are q, k and v."""
    out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Two projections, or one whose output rows are gate and up."""
    down: str = "mlp.down_proj"
    input_norm: str = "input_layernorm"
    attention_norm: str | None = None
    """Norm of the output of attention, before the residual."""
    mlp_norm: str = "post_attention_layernorm"
    down_norm: str | None = None
    """Norm of the output of the MLP, before the residual."""
    qk_norm: tuple[str, str] | None = None
    """Norms over the head dimension of q and of k."""
    gemma: bool = False
    """Norms multiply by 1 + weight in fp32 (`rlft.kernels.rms_norm`)."""
    activation: str = "hidden_act"
    """Config attribute with the name of the gate's activation."""
    window: str = "layer"
    """Where the sliding window is defined: "layer", `sliding_window` of the attention module; "config", of the config,
    for all layers; "none"."""
    rope_by_type: bool = False
    """Whether the rotary embedding is called once per type of layer."""
    dropouts: tuple[str, ...] = ("attention_dropout",)
    """Config attributes of dropouts inside the layer, which must be 0."""


def find(model_type: str) -> Family | None:
    """Return the family of a `model_type`; None if there is no file of that name."""
    if not model_type.isidentifier() or importlib.util.find_spec(f"{__name__}.{model_type}") is None:
        return None
    return importlib.import_module(f"{__name__}.{model_type}").FAMILY
