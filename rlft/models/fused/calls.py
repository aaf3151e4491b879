"""What a call of a transformers decoder asks for that fused layers do not do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def asks_for_more(config: Any, mask: Any, cache: Any, use_cache: bool | None, kwargs: dict[str, Any]) -> bool:
    """Return whether only transformers' own layers give what a call asks for.

    config: of the decoder. mask: the attention mask. cache: the KV cache. kwargs: further arguments of the call.
    """
    wants_cache = config.use_cache if use_cache is None else use_cache
    if cache is not None or (wants_cache and not torch.is_grad_enabled()) or (use_cache and wants_cache):
        return True
    if not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
        return True
    if not kwargs.get("is_causal", getattr(config, "is_causal", True)):
        return True
    if kwargs.get("deepstack_visual_embeds") is not None:  # of images, added between the layers
        return True
    wanted = ("output_hidden_states", "output_attentions")
    if any(kwargs.get(name, getattr(config, name, False)) for name in wanted):
        return True
    return kwargs.get("return_dict", getattr(config, "return_dict", True)) is False
