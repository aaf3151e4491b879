"""Compute the rotary tables of a pass. Shapes: T rows, H hidden size, R rotary columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rlft.models import rope
from rlft.models.families import Family
from rlft.models.fused.layer_modules import NO_ROPE, base_type


def rope_tables(
    decoder: Any,
    family: Family,
    types: Iterable[str | None],
    embedded: Tensor,
    position_ids: Tensor,
    padded_to: Tensor | None,
) -> dict[str | None, tuple[Tensor, ...]]:
    """Return the rotary tables (cos, sin), [T, R] each, per type of layer, with a scale of q [T, 1] in some families.

    types: of the decoder's layers. embedded: [T, H], gives dtype and device. position_ids: [T], or [3, T] where the
    rotary has axes for images. padded_to: positions of the padded call that the rows come from; they choose the
    frequencies.
    """
    rotary, tables, rows = decoder.rotary_emb, {}, position_ids.shape[-1]
    if rotary is None:
        # A rotation by 0 of two columns.
        cos = embedded.new_ones(rows, 2)
        return dict.fromkeys(types, (cos, torch.zeros_like(cos)))
    by_base = rotary_by_base(decoder, family)
    scale = query_scale(decoder.config, family, position_ids, embedded.dtype)
    if padded_to is not None and rope.limit(rotary) is not None:
        # Dynamic and long RoPE choose their frequencies by the largest position of the call.
        position_ids = torch.cat([position_ids, padded_to.max()[None]])
    # A rotary over the axes of images takes a position for each, all of which transformers 5.17 requires; those of text
    # are equal.
    axes = hasattr(rotary, "mrope_section")
    assert axes or position_ids.dim() == 1, "positions on three axes for a rotary with one"
    places = position_ids.view(-1, 1, position_ids.shape[-1]).expand(3, -1, -1) if axes else position_ids[None]
    for layer_type in types:
        by_type = family.rope_by_type and layer_type != NO_ROPE
        module = by_base.get(layer_type, rotary)
        cos, sin = module(embedded[None], places, *((layer_type,) if by_type else ()))
        if layer_type == NO_ROPE:
            # A rotation by 0 changes no bit, and the norms of q and k run in the same kernel.
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        if family.half_tables:
            cos, sin = (torch.cat([table, table], dim=-1) for table in (cos, sin))
        if family.turns_back:
            sin = -sin
        tables[layer_type] = (cos[0, :rows], sin[0, :rows], *scale)
    return tables


def rotary_by_base(decoder: Any, family: Family) -> dict[str | None, Any]:
    """Return the rotary module of each type of layer, in families that have one for each base of the frequencies."""
    modules = () if family.rope_bases is None else decoder.rotary_embs
    return {base_type(module.config.rope_parameters["rope_theta"]): module for module in modules}


def query_scale(config: Any, family: Family, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the scale of q at each of `positions` [T], as a tuple of one [T, 1]; () if the model has none."""
    factor, length = (config.rope_parameters.get(name) for name in family.query_scale or ("", ""))
    if factor is None or length is None:
        return ()
    # In fp32, as transformers computes it.
    return ((1 + factor * torch.log(1 + torch.floor(positions / length)))[:, None].to(dtype),)
