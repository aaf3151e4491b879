"""Run a packed batch through transformers' own decoder with one row per sequence, padded on the right.

This serves decoders that keep a state along the row, or whose attention `packed_attention` cannot reproduce. A sequence
behind a shared prompt gets a copy of the prompt's tokens in front. Rows of similar length run together; no token before
the padding sees it, since all these decoders are causal. Rows of a forward have the same number of images where
cross-attention reads them (`rlft.models.cross`).

Shapes: N selected states, R rows and L columns of a block, H hidden size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from rlft.models.cross import CrossStates, Shown
from rlft.models.packed import inputs
from rlft.models.routing import NO_CHOICE, Choice
from rlft.models.vision import Seen
from rlft.types import Batch
from rlft.upload import upload

WASTE = 0.25
"""Largest share of padding in a forward."""


@dataclass(frozen=True)
class Rows:
    """A batch as padded rows: one [R, L] block of ids per forward, longest rows first, and the positions of the
    results."""

    blocks: tuple[Tensor, ...]
    """[R, L] int64 on the device; 0 at padding."""
    tokens: tuple[Tensor, ...]
    """Per block, [R, L] int64 on the device: the token of the batch at each position, -1 at padding."""
    picks: tuple[Tensor, ...]
    """Per block, int64 on the device: indices of the selected states among its R * L positions."""
    shown: tuple[tuple[Shown, ...], ...]
    """Per block and row, the images that it shows."""
    order: Tensor
    """[N] int64: index of each selected state among those of all blocks, concatenated."""

    @staticmethod
    def of(batch: Batch, tokens: Tensor, device: torch.device) -> Rows:
        """Build the rows of a batch in host memory.

        tokens: [N] int64, the tokens whose predicting states are selected; each has a token before it. Does not wait
        for the device; it takes three uploads however many sequences there are.
        """
        bounds, prefix = batch.cu_seqlens.long(), batch.prefix.long()
        own_lengths, behind = bounds.diff(), prefix >= 0
        # A shared prompt has no row: it runs in front of each of its continuations.
        has_row = torch.ones(len(prefix), dtype=torch.bool)
        has_row[prefix[behind]] = False
        prefix_lengths = torch.where(behind, own_lengths[prefix.clamp(min=0)], 0)
        rows = has_row.nonzero().squeeze(1)
        whole = _shown(batch, bounds, prefix_lengths)
        lengths, by_length = (own_lengths + prefix_lengths)[rows].sort(descending=True, stable=True)
        images = torch.tensor([len(whole[row]) for row in rows[by_length].tolist()])
        images, by_images = images.sort(descending=True, stable=True)
        rows, lengths = rows[by_length][by_images], lengths[by_images]
        row_of_sequence = torch.zeros(len(prefix), dtype=torch.int64).index_put((rows,), torch.arange(len(rows)))
        alike = lengths.split(images.unique_consecutive(return_counts=True)[1].tolist())
        sizes = [size for part in alike for size in blocks_of(part.tolist())]
        counts = torch.tensor([count for count, _ in sizes], dtype=torch.int64)
        widths = torch.tensor([width for _, width in sizes], dtype=torch.int64)
        block = torch.arange(len(sizes)).repeat_interleave(counts)  # of each row
        starts = widths[block].cumsum(0) - widths[block]  # of each row among the positions of all blocks
        places = torch.full((int((counts * widths).sum()),), -1, dtype=torch.int64)
        for sources, length, positions in (
            (bounds[:-1][prefix.clamp(min=0)[rows]], prefix_lengths[rows], starts),
            (bounds[:-1][rows], own_lengths[rows], starts + prefix_lengths[rows]),
        ):
            offsets = _ranges(length)
            places[positions.repeat_interleave(length) + offsets] = sources.repeat_interleave(length) + offsets
        ids = torch.where(places >= 0, batch.input_ids[places], 0)
        token_rows, sequences = row_of_sequence[batch.seq_ids[tokens]], batch.seq_ids[tokens]
        indices = starts[token_rows] + prefix_lengths[sequences] + tokens - bounds[sequences] - 1
        ordered, order = block[token_rows].sort(stable=True)
        picks_per_block = torch.bincount(ordered, minlength=len(sizes)).tolist()
        offset = (counts * widths).cumsum(0) - counts * widths
        indices = (indices - offset[block[token_rows]])[order]
        inverse = torch.empty_like(order).index_put((order,), torch.arange(len(order)))
        areas = (counts * widths).tolist()
        uploaded = upload(torch.cat([indices, inverse]), device)
        blocks, block_tokens = (
            tuple(part.view(size) for part, size in zip(upload(whole, device).split(areas), sizes, strict=True))
            for whole in (ids, places)
        )
        lines = iter([whole[row] for row in rows.tolist()])
        shown = tuple(tuple(itertools.islice(lines, count)) for count, _ in sizes)
        picks = uploaded[: len(indices)].split(picks_per_block)
        return Rows(blocks, block_tokens, picks, shown, uploaded[len(indices) :])

    def hidden(
        self, decoder: Any, positions: Tensor | None = None, images: Seen | None = None, choice: Choice = NO_CHOICE
    ) -> Tensor:
        """Return the head's input [N, H] at the selected states, in the order of `tokens`.

        positions: [T] or [3, T] int64, with images. images, choice: for the rows of the batch.
        """
        selected = []
        for ids, tokens, pick, shown in zip(self.blocks, self.tokens, self.picks, self.shown, strict=True):
            if not pick.numel():
                continue
            given: dict[str, Any] = {"input_ids": ids}
            if isinstance(images, CrossStates):
                given |= images.arguments(shown, ids.shape[1]) if shown[0] else {}
            elif images is not None and positions is not None:
                # At padding whatever, since no token before it sees it.
                given = inputs(decoder, ids, positions[..., tokens.clamp(min=0)], images.spread(tokens.flatten()))
            with choice.of(tokens.clamp(min=0).flatten()).given():
                states = decoder(**given, use_cache=False).last_hidden_state
            selected.append(states.flatten(0, 1).index_select(0, pick))
        return torch.cat(selected).index_select(0, self.order)


def _shown(batch: Batch, bounds: Tensor, prefix_lengths: Tensor) -> list[Shown]:
    """Return the images that each sequence shows with its shared prompt, where cross-attention reads them."""
    shown: list[list[tuple[int, int]]] = [[] for _ in range(len(batch.prefix))]
    for number, (image, row) in enumerate(batch.images):
        if image.layout == "cross":
            sequence = int(batch.seq_ids[row])
            place = row - int(bounds[sequence]) + int(prefix_lengths[sequence])
            for other in [sequence, *(batch.prefix == sequence).nonzero().flatten().tolist()]:
                shown[other].append((number, place))
    return [sorted(each, key=itemgetter(1)) for each in shown]


def blocks_of(lengths: list[int]) -> list[tuple[int, int]]:
    """Return (rows, width) of each forward over rows of these lengths, which are sorted in descending order.

    There are as few forwards as possible with at most WASTE of padding each.
    """
    blocks, start = [], 0
    while start < len(lengths):
        width, tokens, count = lengths[start], 0, 0
        while start + count < len(lengths) and tokens + lengths[start + count] >= (1 - WASTE) * width * (count + 1):
            tokens += lengths[start + count]
            count += 1
        blocks.append((count, width))
        start += count
    return blocks


def _ranges(lengths: Tensor) -> Tensor:
    """Concatenate 0 to n - 1 for each n of `lengths`."""
    ends = lengths.cumsum(0)
    return torch.arange(int(ends[-1]) if len(ends) else 0) - (ends - lengths).repeat_interleave(lengths)
