"""Turn a padded batch into packed rows.

Shapes: B sequences, S padded length, H hidden size, T rows that are not padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.kernels.attention import Sequences


def text_positions(position_ids: Tensor | None) -> tuple[Tensor | None, bool]:
    """Return one position per token, and whether those given are equal for each token.

    position_ids: [B, S], or [3 or 4, B, S] of a vision-language model: equal for text, different for parts of images.
    """
    if position_ids is None or position_ids.dim() < 3:
        return position_ids, True
    return position_ids[0], bool((position_ids == position_ids[:1]).all())


def unpadded(
    embedded: Tensor, mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor | None, Sequences, Tensor]:
    """Return packed rows [T, H] of a padded batch [B, S, H], their indices in [B S] (None: all), sequences, positions.

    mask: [B, S], 0 at padding, on either side; None: no padding, and a row whose positions do not increase by 1 is
    split into several sequences, as in transformers.
    """
    B, S, H = embedded.shape
    if position_ids is None:
        positions = torch.arange(S, device=embedded.device).expand(B, S)
    else:
        positions = position_ids.expand(B, S)
    positions = positions.reshape(-1)
    places = None
    if mask is None:
        starts = list(range(0, B * S, S))
        if position_ids is not None:
            jumps = (positions[1:] != positions[:-1] + 1).nonzero().flatten() + 1
            starts = sorted({*starts, *jumps.tolist()})
        bounds = [*starts, B * S]
        rows = embedded.reshape(B * S, H)
    else:
        live = mask.to(torch.bool)
        bounds = [0, *live.sum(1).cumsum(0).tolist()]
        places = live.reshape(-1).nonzero().flatten()
        rows, positions = embedded.reshape(B * S, H)[places], positions[places]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    prefix = torch.full((len(bounds) - 1,), -1, dtype=torch.int32)
    return rows, places, Sequences.of(cu_seqlens, prefix, embedded.device), positions


def unpadded_ids(ids: Tensor, places: Tensor | None) -> Tensor:
    """Return the ids [T] of packed rows. ids: [B, S]. places: as `unpadded` returns them."""
    return ids.reshape(-1) if places is None else ids.reshape(-1)[places]


def padded_again(hidden: Tensor, places: Tensor | None, shape: torch.Size) -> Tensor:
    """Return packed rows [T, H] as a padded batch, with zeros at padding. places: as `unpadded` returns them."""
    if places is not None:
        hidden = hidden.new_zeros(shape[0] * shape[1], shape[2]).index_copy(0, places, hidden)
    return hidden.view(shape)
