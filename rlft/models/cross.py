"""States of images for cross-attention (Llama 3.2 Vision), and the masks that say which tokens see which of them.

An image is one token of the prompt, and layers of cross-attention read its states: from its token on, up to the token
of the next image. Images whose tokens are neighbours are seen together. An image has the states of all its tiles, of
which the model was shown the first ones; the others, of black tiles, are masked.

A token before the first image sees no image. transformers lets it attend to all states alike, and leaves out its MLP in
these layers; the same is done here, so the rows of a forward must have the same number of images.

Shapes: B rows, L columns, n images of a row, K states of an image, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MASK, LIVE = "cross_attention_mask", "full_text_row_masked_out_mask"
"""Names of the masks in transformers' decoder."""
Shown = Sequence[tuple[int, int]]
"""Images of a row, in order: index among those of the batch, and column of its token."""


@dataclass(frozen=True)
class CrossStates:
    """The states of the images of a batch, on the device."""

    states: tuple[Tensor, ...]
    """Of each image [K, H]."""
    seen: tuple[int, ...]
    """Of each image, how many of its states are of tiles that it fills."""

    def arguments(self, rows: Sequence[Shown], columns: int) -> dict[str, Tensor]:
        """Return the arguments by which transformers' decoder takes images for rows of L = `columns` tokens.

        rows: each with the same number of images, at least one.
        """
        together = torch.stack([torch.cat([self.states[image] for image, _ in shown]) for shown in rows])
        visible = torch.zeros(len(rows), columns, together.shape[1], dtype=torch.bool)
        for line, shown in enumerate(rows):
            first = 0
            for (image, start), end in zip(shown, ends([place for _, place in shown], columns), strict=True):
                visible[line, start:end, first : first + self.seen[image]] = True
                first += len(self.states[image])
        live = visible.any(-1, keepdim=True)
        hidden = (~visible & live)[:, None].to(together.device)
        lowest = torch.finfo(together.dtype).min
        mask = torch.zeros(hidden.shape, dtype=together.dtype, device=together.device).masked_fill(hidden, lowest)
        return {"cross_attention_states": together, MASK: mask, LIVE: live[:, None].to(together.device, together.dtype)}


def ends(places: Sequence[int], columns: int) -> list[int]:
    """Return the column behind the last token that sees each image. places: of their tokens."""
    found = [*places[1:], columns][: len(places)]
    for i in reversed(range(len(places) - 1)):
        if places[i + 1] == places[i] + 1:
            found[i] = found[i + 1]
    return found


def last_token(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks for the token behind the last column, which sees what that sees; nothing where none are given.

    given: of a decoder, those of `CrossStates.arguments` among them.
    """
    return {name: given[name][:, :, -1:] for name in (MASK, LIVE) if name in given}
