"""What a call of a transformers decoder asks for, and what is set around it, that fused layers do not do."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from rlft.kernels.attention_plain import visible
from rlft.models import experts
from rlft.models.families import Family


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
    # Of images, added between the layers; of a call whose cache is shared by layers; of embedded images and text.
    given = ("deepstack_visual_embeds", "shared_kv_states", "per_layer_inputs")
    if any(kwargs.get(name) is not None for name in given):
        return True
    wanted = ("output_hidden_states", "output_attentions", "return_shared_kv_states", "output_router_logits")
    if any(kwargs.get(name, getattr(config, name, False)) for name in wanted):
        return True
    return kwargs.get("return_dict", getattr(config, "return_dict", True)) is False


def own_forward(
    decoder: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Any,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    use_cache: bool | None,
    **kwargs: Any,
) -> Any:
    """Run the forward of the decoder's class, which fused layers replace on the instance."""
    return type(decoder).forward(
        decoder,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **kwargs,
    )


def plain_mask(config: Any, mask: Any) -> Any:
    """Return a mask [B, S], or None, in place of masks by type of layer that say no more; any other mask as it is.

    config: of the decoder. mask: of a call. Models with images, such as Gemma 3, make masks [B, 1, S, S] for their
    decoder, also for text, whose tokens see those before them that are no padding.
    """
    if not isinstance(mask, dict):
        return mask
    given = {kind: each for kind, each in mask.items() if each is not None}
    if not given:
        return None
    first = next(iter(given.values()))
    square = isinstance(first, Tensor) and first.dim() == 4 and first.shape[2] == first.shape[3]
    if not square or first.dtype != torch.bool or any(each.shape[1] != 1 for each in given.values()):
        return mask
    live = first[:, 0].diagonal(dim1=1, dim2=2)
    tokens = live.shape[1]
    for kind, each in mask.items():
        window = None if kind == "full_attention" else getattr(config, "sliding_window", None) or None
        seen = visible(tokens, tokens, window, live.device) & live[:, None, :]
        # Without a mask all tokens before one are seen. What padding sees has no effect.
        found = visible(tokens, tokens, None, live.device) if each is None else each[:, 0]
        if not ((found == seen) | ~live[:, :, None]).all():
            return mask
    return live


def result_class(decoder: nn.Module) -> Any:
    """Return the class of a decoder's result, by its annotation: BaseModelOutputWithPast, or one with more fields."""
    from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

    annotated = inspect.signature(type(decoder).forward).return_annotation
    fits = isinstance(annotated, type) and issubclass(annotated, (BaseModelOutputWithPast, MoeModelOutputWithPast))
    return annotated if fits else BaseModelOutputWithPast


def setting_problem(decoder: nn.Module, family: Family) -> str | None:
    """Return which setting of the decoder that may change between calls no fused layer follows; None if none does."""
    config: Any = decoder.config
    chosen = getattr(config, "_experts_implementation", None)
    if family.experts is not None and chosen != experts.NAME:
        return f'experts_implementation is "{chosen}"'
    dropped = [name for name in family.dropouts if decoder.training and getattr(config, name, 0)]
    return f"{dropped[0]} is {getattr(config, dropped[0])} and the model is in training mode" if dropped else None


def autocast_problem(weight: Tensor) -> str | None:
    """Return which autocast would change the dtype of activations, that of `weight`; None if none would."""
    device, dtype = weight.device.type, weight.dtype
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype:
        return f"autocast to {torch.get_autocast_dtype(device)} over weights of {dtype}"
    return None
