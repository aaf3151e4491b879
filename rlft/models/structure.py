"""Inspect a model of transformers: find its text decoder, and whether sequences can be packed into one row.

Only attention can keep the sequences of a packed row apart (`packed_attention`). Anything else that mixes tokens
carries over from one sequence into the next: a convolution, a recurrent state, a mask that the model builds itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

STATEFUL = re.compile(
    r"(?i:conv(?!1D$)|mamba|recurrent|linear_?attention|delta_?net|rwkv|lightning|rglru|hyena|a_log)|S[Ss][Mm](?![a-z])"
)
"""Names of layer types, classes and parameters that keep a state along the row. transformers' Conv1D is a linear layer.
"""
ATTENTION = re.compile(r"(Self)?Attention$")
"""Class names of attention modules."""
PACKED_LAYERS = ("full_attention", "sliding_attention", "attention")
"""Types of layers with plain causal attention, full or in a window."""
KNOWN = frozenset(
    {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "qkv_proj",
        "c_attn",
        "c_proj",
        "dense",
        "out_proj",
        "query_key_value",
        "q_norm",
        "k_norm",
        "q_layernorm",
        "k_layernorm",
        "query_layernorm",
        "key_layernorm",
        "attn_dropout",
        "resid_dropout",
        "attention_dropout",
        "dropout",
        "rotary_emb",
        "rotary_fn",
    }
)
"""Children and parameters of attention modules that `packed_attention` is known to reproduce."""


def decoder_of(base: Any) -> Any:
    """Return the text decoder of a causal language model, which turns ids into the head's input."""
    decoder = base.get_decoder()
    # transformers looks up the attribute `base_model_prefix`, which some text models lack (Llama 4).
    return base.model if decoder is base and isinstance(getattr(base, "model", None), nn.Module) else decoder


def unpackable(base: Any) -> str | None:
    """Return why sequences cannot be packed into one row of the model; None if they can.

    Whatever is not known to be plain causal attention counts as unpackable.
    """
    decoder = decoder_of(base)
    config = decoder.config
    if getattr(config, "cross_attention_layers", None) and getattr(base.config, "vision_config", None) is not None:
        return "layers that attend to images"
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    for kind in kinds:
        if STATEFUL.search(kind):
            return f"{kind.replace('_', ' ')} keeps a state along the row"
    for name, module in decoder.named_modules():
        parameters = (parameter for parameter, _ in module.named_parameters(recurse=False))
        if name and any(STATEFUL.search(label) for label in (type(module).__name__, *parameters)):
            return f"{type(module).__name__} keeps a state along the row"
    for kind in kinds:
        if kind not in PACKED_LAYERS:
            return f"layers of {kind.replace('_', ' ')}"
    if not getattr(base, "_supports_attention_backend", False):
        return f"{type(base).__name__} does not call transformers' AttentionInterface"
    layers = getattr(decoder, "layers", getattr(decoder, "h", None))
    if not isinstance(layers, nn.ModuleList):
        return f"the layers of {type(decoder).__name__} are not known"
    for layer in layers:
        problem = _unknown_attention(layer, config)
        if problem is not None:
            return problem
    return None


def _unknown_attention(layer: nn.Module, config: Any) -> str | None:
    """Return why `packed_attention` may not reproduce the attention of a decoder layer; None if it does."""
    matches = [child for child in layer.modules() if ATTENTION.search(type(child).__name__)]
    if len(matches) != 1:
        return f"{type(layer).__name__} has {len(matches)} attention modules"
    (attention,) = matches
    for module in (layer, attention):
        if not _forwards_kwargs(module):
            return f"{type(module).__name__} does not hand its keyword arguments on to transformers' AttentionInterface"
    if "sinks" in _members(attention):
        return f"{type(attention).__name__} has sinks"
    if hasattr(attention, "kv_lora_rank"):
        return f"{type(attention).__name__} has keys and values of different widths (MLA)"
    unknown = sorted(set(_members(attention)) - KNOWN)
    if unknown:
        return f"{type(attention).__name__} has {unknown[0]}, which packed rows do not know"
    key_projection, value_projection = getattr(attention, "k_proj", None), getattr(attention, "v_proj", None)
    if (
        key_projection is not None
        and value_projection is not None
        and key_projection.out_features != value_projection.out_features
    ):
        return f"keys of {key_projection.out_features} and values of {value_projection.out_features} features"
    expected = _window_of(attention, config)
    # An attention module without the attribute reads the config's, if its forward passes a window on.
    reads_config = "sliding_window=" in inspect.getsource(inspect.unwrap(type(attention).forward))
    window = getattr(attention, "sliding_window", expected if reads_config else None)
    if expected != (window if getattr(attention, "is_sliding", True) else None):
        return f"{type(attention).__name__} has the window {window}, its config says {expected}"
    return None


def _forwards_kwargs(module: nn.Module) -> bool:
    """Return whether the forward of a module passes its keyword arguments on, by its source."""
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        return False
    # Once in the signature, once in a call.
    return source.count("**kwargs") > 1


def _members(module: nn.Module) -> Iterator[str]:
    """Yield the names of direct children and parameters."""
    yield from (name for name, _ in module.named_children())
    yield from (name for name, _ in module.named_parameters(recurse=False))


def _window_of(attention: Any, config: Any) -> int | None:
    """Return the window that the config gives an attention module."""
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or kinds[attention.layer_idx] == "sliding_attention"
    return getattr(config, "sliding_window", None) if sliding else None
