"""The second way to run a packed batch through transformers' own decoder: a row per sequence, padded on the right.

For decoders that keep a state along the row, or whose attention `packed_attention` cannot reproduce. A sequence behind
a shared prompt gets the prompt's tokens in front. Rows of like lengths run together; what a row's padding computes is
seen by no token before it, since everything here is causal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlft.types import Batch
from rlft.upload import upload

WASTE = 0.25
"""Largest share of padding in a forward."""


@dataclass(frozen=True)
class Rows:
    """A batch as padded rows: one [R, L] block of ids per forward, longest rows first, and where the results lie."""

    blocks: tuple[Tensor, ...]
    """[R, L] int64 on the device; 0 where a row is padded."""
    picks: tuple[Tensor, ...]
    """Per block: where in its R * L positions the wanted states are, int64 on the device."""
    order: Tensor
    """[N] int64: place of each wanted state among those of all blocks, one block after the other."""

    @staticmethod
    def of(batch: Batch, tokens: Tensor, device: torch.device) -> Rows:
        """The rows of a batch in host memory. tokens: [N] int64, the tokens whose predicting states are wanted; each
        has a token before it. Nothing here waits for the device; two uploads however many sequences there are."""
        bounds, prefix = batch.cu_seqlens.long(), batch.prefix.long()
        own, behind = bounds.diff(), prefix >= 0
        # A prompt that is shared has no row: it runs in front of each of its continuations.
        used = torch.ones(len(prefix), dtype=torch.bool)
        used[prefix[behind]] = False
        front = torch.where(behind, own[prefix.clamp(min=0)], 0)
        rows = used.nonzero().squeeze(1)
        lengths, by_length = (own + front)[rows].sort(descending=True, stable=True)
        rows = rows[by_length]
        line = torch.zeros(len(prefix), dtype=torch.int64).index_put((rows,), torch.arange(len(rows)))
        sizes = blocks_of(lengths.tolist())
        counts = torch.tensor([count for count, _ in sizes], dtype=torch.int64)
        widths = torch.tensor([width for _, width in sizes], dtype=torch.int64)
        block = torch.arange(len(sizes)).repeat_interleave(counts)  # of each row
        starts = widths[block].cumsum(0) - widths[block]  # of each row among the positions of all blocks
        ids = torch.zeros(int((counts * widths).sum()), dtype=torch.int64)
        for first, length, at in (
            (bounds[:-1][prefix.clamp(min=0)[rows]], front[rows], starts),
            (bounds[:-1][rows], own[rows], starts + front[rows]),
        ):
            offsets = _ranges(length)
            ids[at.repeat_interleave(length) + offsets] = batch.input_ids[first.repeat_interleave(length) + offsets]
        of_row = line[batch.seq_ids[tokens]]
        places = starts[of_row] + batch.position_ids[tokens] - 1
        ordered, order = block[of_row].sort(stable=True)
        ends = torch.bincount(ordered, minlength=len(sizes)).tolist()
        offset = (counts * widths).cumsum(0) - counts * widths
        places = (places - offset[block[of_row]])[order]
        back = torch.empty_like(order).index_put((order,), torch.arange(len(order)))
        sent = upload(torch.cat([places, back]), device)
        blocks = upload(ids, device).split((counts * widths).tolist())
        return Rows(
            tuple(b.view(count, width) for b, (count, width) in zip(blocks, sizes, strict=True)),
            sent[: len(places)].split(ends),
            sent[len(places) :],
        )

    def hidden(self, decoder: Any) -> Tensor:
        """The head's input [N, H] at the wanted states, in the order in which they were asked for."""
        found = []
        for ids, pick in zip(self.blocks, self.picks, strict=True):
            if not pick.numel():
                continue
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state
            found.append(states.flatten(0, 1).index_select(0, pick))
        return torch.cat(found).index_select(0, self.order)


def blocks_of(lengths: list[int]) -> list[tuple[int, int]]:
    """(rows, width) of each forward over rows of these lengths, which are sorted downwards: as few forwards as have at
    most WASTE of padding each."""
    made, at = [], 0
    while at < len(lengths):
        width, tokens, count = lengths[at], 0, 0
        while at + count < len(lengths) and tokens + lengths[at + count] >= (1 - WASTE) * width * (count + 1):
            tokens += lengths[at + count]
            count += 1
        made.append((count, width))
        at += count
    return made


def _ranges(lengths: Tensor) -> Tensor:
    """0 to n - 1 for each n of `lengths`, one after the other."""
    ends = lengths.cumsum(0)
    return torch.arange(int(ends[-1]) if len(ends) else 0) - (ends - lengths).repeat_interleave(lengths)
