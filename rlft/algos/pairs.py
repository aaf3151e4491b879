"""View of a micro-batch for the preference losses: the two sides of each pair.

A group is a pair: its rows with advantage > 0 are the chosen side, those with advantage < 0 the rejected one. Both
sides are in one packed forward and share their prompt. A group with neither (equal rewards in online training) is not a
pair: it adds nothing to the loss, but counts in the denominator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlft.batch import segment_sum
from rlft.types import Batch, Stat, Stats

CLAMP = 20.0
"""Bound of a token's log-ratio to the reference: larger values are faults and must not make the loss infinite."""


class Side(NamedTuple):
    """One side of every pair, all [pairs]; 0 where the side is empty."""

    now: Tensor
    """Sum of log-probs over the trained tokens, with gradient."""
    gain: Tensor
    """Sum of logprob - ref_logprob, with gradient; `now` itself without reference log-probs."""
    tokens: Tensor
    """Number of trained tokens, at least 1."""

    @property
    def mean(self) -> Tensor:
        """Mean log-prob per token."""
        return self.now / self.tokens


class Pairs(NamedTuple):
    """All pairs of a micro-batch."""

    chosen: Side
    rejected: Side
    real: Tensor
    """[pairs] bool: whether the group is a pair."""
    weight: Tensor
    """[pairs]: 1 / pairs of the update."""

    @property
    def margin(self) -> Tensor:
        """D = gain of the chosen side - gain of the rejected side, [pairs]."""
        return self.chosen.gain - self.rejected.gain

    def total(self, loss: Tensor) -> Tensor:
        """Return the weighted sum of a loss per pair [pairs]."""
        return (torch.where(self.real, loss, 0) * self.weight).sum()

    def gain_stats(self, beta: float) -> Stats:
        """Return `stats` with beta times the gain as the implicit reward of a side."""
        return self.stats(beta * self.chosen.gain, beta * self.rejected.gain)

    def stats(self, chosen: Tensor, rejected: Tensor) -> Stats:
        """Return TRL's metrics of pairs. chosen, rejected: [pairs], the implicit rewards of the two sides."""
        margin = (chosen - rejected).detach()
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).float(),
            "logps/chosen": self.chosen.now,
            "logps/rejected": self.rejected.now,
        }
        return {name: Stat.mean(value, self.real) for name, value in values.items()}


def read(logprobs: Tensor, batch: Batch) -> Pairs:
    """Build the pairs of a micro-batch of whole groups. logprobs: [T] with gradient."""
    # Tokens of weight 0 may be nan or inf. They are replaced before any arithmetic, so that 0 * inf cannot occur.
    used = batch.train_mask & (batch.weight != 0)
    now = torch.where(used, logprobs, 0)
    gain = now
    if batch.ref_logprobs is not None:
        gain = (now - torch.where(used, batch.ref_logprobs, 0)).clamp(-CLAMP, CLAMP)
    # A prefix is in no pair and has no trained tokens, so any group id will do.
    group = batch.group_ids.clamp(min=0)[batch.seq_ids]
    count = len(batch.group_weight)

    def side(mask: Tensor) -> Side:
        parts = (segment_sum(torch.where(mask, values, 0), group, count) for values in (now, gain, mask.to(now.dtype)))
        total, gain_sum, tokens = parts
        return Side(total, gain_sum, tokens.clamp(min=1))

    better, worse = used & (batch.advantages > 0), used & (batch.advantages < 0)
    real = segment_sum((better | worse).to(now.dtype), group, count) > 0
    return Pairs(side(better), side(worse), real, batch.group_weight)
