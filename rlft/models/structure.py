"""What can be read off a model of transformers: its text decoder, and whether sequences can be packed into one row.

Only attention can keep the sequences of a packed row apart (`packed_attention`). Whatever else mixes tokens runs from
one sequence into the next: a convolution, a recurrent state, a mask that the model builds itself.
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
"""Layer types, classes and parameters of what keeps a state along the row. transformers' Conv1D is a linear layer."""
ATTENTION = re.compile(r"(Self)?Attention$")
"""Classes of attention modules."""
PACKED_LAYERS = ("full_attention", "sliding_attention", "attention")
"""Types of layers whose attention is causal, in a window at most."""
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
"""Children and parameters of attention modules whose results `packed_attention` is known to reproduce."""


def decoder_of(base: Any) -> Any:
    """The text decoder of a causal language model: what turns ids into the head's input."""
    decoder = base.get_decoder()
    # transformers looks under the name of `base_model_prefix`, and some text models are called otherwise (Llama 4).
    return base.model if decoder is base and isinstance(getattr(base, "model", None), nn.Module) else decoder


def unpackable(base: Any) -> str | None:
    """Why sequences cannot be packed into one row of the model, in words; None where they can.

    What is not known to be plain causal attention counts as unpackable.
    """
    decoder = decoder_of(base)
    config = decoder.config
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    for kind in kinds:
        if STATEFUL.search(kind):
            return f"{kind.replace('_', ' ')} keeps a state along the row"
    for name, module in decoder.named_modules():
        parameters = (n for n, _ in module.named_parameters(recurse=False))
        if name and any(STATEFUL.search(n) for n in (type(module).__name__, *parameters)):
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
        why = _unknown_attention(layer, config)
        if why is not None:
            return why
    return None


def _unknown_attention(layer: nn.Module, config: Any) -> str | None:
    """What about the attention of a decoder layer `packed_attention` may not reproduce, in words."""
    found = [m for m in layer.modules() if ATTENTION.search(type(m).__name__)]
    if len(found) != 1:
        return f"{type(layer).__name__} has {len(found)} attention modules"
    (attention,) = found
    for module in (layer, attention):
        if not _hands_on(module):
            return f"{type(module).__name__} does not hand its keyword arguments on to transformers' AttentionInterface"
    if "sinks" in _own(attention):
        return f"{type(attention).__name__} has sinks"
    if hasattr(attention, "kv_lora_rank"):
        return f"{type(attention).__name__} has keys and values of different widths (MLA)"
    unknown = sorted(set(_own(attention)) - KNOWN)
    if unknown:
        return f"{type(attention).__name__} has {unknown[0]}, which packed rows do not know"
    k, v = getattr(attention, "k_proj", None), getattr(attention, "v_proj", None)
    if k is not None and v is not None and k.out_features != v.out_features:
        return f"keys of {k.out_features} and values of {v.out_features} features"
    expected = _window_of(attention, config)
    # Without one of its own an attention module reads the config's, where it hands one on.
    reads = "sliding_window=" in inspect.getsource(inspect.unwrap(type(attention).forward))
    window = getattr(attention, "sliding_window", expected if reads else None)
    if expected != (window if getattr(attention, "is_sliding", True) else None):
        return f"{type(attention).__name__} has the window {window}, its config says {expected}"
    return None


def _hands_on(module: nn.Module) -> bool:
    """Whether the source of a module's forward hands its keyword arguments on."""
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        return False
    # Once where they are taken, once where they are given.
    return source.count("**kwargs") > 1


def _own(module: nn.Module) -> Iterator[str]:
    yield from (name for name, _ in module.named_children())
    yield from (name for name, _ in module.named_parameters(recurse=False))


def _window_of(attention: Any, config: Any) -> int | None:
    """The window that the config gives an attention module."""
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or kinds[attention.layer_idx] == "sliding_attention"
    return getattr(config, "sliding_window", None) if sliding else None
