"""Compute the rotary tables of a pass. Shapes: T rows, H hidden size, R rotary columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rlft.models import rope
from rlft.models.fused.layer_modules import NO_ROPE


def rope_tables(
    rotary: Any, types: Iterable[str | None], embedded: Tensor, position_ids: Tensor, padded_to: Tensor | None
) -> dict[str | None, tuple[Tensor, Tensor]]:
    """Return the rotary tables (cos, sin), [T, R] each, per type of layer.

    rotary: the decoder's rotary module. types: of its layers. embedded: [T, H], gives dtype and device. position_ids:
    [T]. padded_to: positions of the padded call that the rows come from; they choose the frequencies.
    """
    tables, rows = {}, position_ids.shape[0]
    if padded_to is not None and rope.limit(rotary) is not None:
        # Dynamic and long RoPE choose their frequencies by the largest position of the call.
        position_ids = torch.cat([position_ids, padded_to.max()[None]])
    for layer_type in types:
        arguments = () if layer_type in (None, NO_ROPE) else (layer_type,)
        cos, sin = rotary(embedded[None], position_ids[None], *arguments)
        if layer_type == NO_ROPE:
            # A rotation by 0 changes no bit, and the norms of q and k run in the same kernel.
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        tables[layer_type] = (cos[0, :rows], sin[0, :rows])
    return tables
