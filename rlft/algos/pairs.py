"""The two sides of each pair of a micro-batch, as the preference losses read them.

A group is a pair: its rows with advantage > 0 are the chosen side, those with advantage < 0 the rejected one. Both
sides come in one packed forward, their prompt shared. A group with neither (equal rewards in online training) is no
pair: it adds nothing and stays in the denominator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlft.batch import segment_sum
from rlft.errors import ConfigError
from rlft.types import Batch, Stat, Stats

CLAMP = 20.0
"""Of a token's log-ratio to the reference: what is further off is a fault, and must not make the step infinite."""


@dataclass(frozen=True)
class Settings:
    """Settings of [algo] that every loss over pairs has."""

    advantage: str = "identity"
    """"identity" for recorded pairs; "best_and_worst" makes a pair of each sampled group (online)."""
    beta: float = 0.1
    """How strongly the margin counts: small values let the policy move further from the reference."""

    def __post_init__(self) -> None:
        check_above_zero(beta=self.beta)


class Side(NamedTuple):
    """One side of every pair, all [pairs]; 0 where the side is empty."""

    now: Tensor
    """Sum of the log-probs of its trained tokens, with gradient."""
    gain: Tensor
    """Sum of logprob - ref_logprob, with gradient; `now` itself without reference log-probs."""
    tokens: Tensor
    """Its trained tokens, at least 1."""

    @property
    def mean(self) -> Tensor:
        """Mean log-prob of its tokens."""
        return self.now / self.tokens


class Pairs(NamedTuple):
    """Every pair of a micro-batch."""

    chosen: Side
    rejected: Side
    real: Tensor
    """[pairs] bool: one side is better than the other."""
    weight: Tensor
    """[pairs]: 1 / pairs of the update."""

    @property
    def margin(self) -> Tensor:
        """D = gain of the chosen side - gain of the rejected one, [pairs]."""
        return self.chosen.gain - self.rejected.gain

    def total(self, loss: Tensor) -> Tensor:
        """The weighted sum of a loss per pair [pairs]."""
        return (torch.where(self.real, loss, 0) * self.weight).sum()

    def gain_stats(self, beta: float) -> Stats:
        """`stats` where the implicit reward of a side is beta times its gain."""
        return self.stats(beta * self.chosen.gain, beta * self.rejected.gain)

    def stats(self, chosen: Tensor, rejected: Tensor) -> Stats:
        """TRL's metrics of pairs. chosen, rejected: [pairs], the implicit rewards of the two sides."""
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
    """The pairs of a micro-batch that holds whole groups. logprobs: [T] with gradient."""
    # A token of weight 0 may hold nan or inf: it is replaced before any arithmetic, so that no 0 * inf can follow.
    used = batch.train_mask & (batch.weight != 0)
    now = torch.where(used, logprobs, 0)
    gain = now
    if batch.ref_logprobs is not None:
        gain = (now - torch.where(used, batch.ref_logprobs, 0)).clamp(-CLAMP, CLAMP)
    # A prefix belongs to no pair and has no trained token, so it may be put into any group.
    group = batch.group_ids.clamp(min=0)[batch.seq_ids]
    count = len(batch.group_weight)

    def side(of: Tensor) -> Side:
        parts = (segment_sum(torch.where(of, x, 0), group, count) for x in (now, gain, of.to(now.dtype)))
        total, gained, tokens = parts
        return Side(total, gained, tokens.clamp(min=1))

    better, worse = used & (batch.advantages > 0), used & (batch.advantages < 0)
    real = segment_sum((better | worse).to(now.dtype), group, count) > 0
    return Pairs(side(better), side(worse), real, batch.group_weight)


def check_above_zero(**numbers: float) -> None:
    """Raise ConfigError for a setting of [algo] that is not above 0, or not finite."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"algo.{name} = {value}: want a number above 0")


def check_smoothing(value: float) -> None:
    """Raise ConfigError unless `value` is a share of labels that may be wrong."""
    if not 0 <= value < 0.5:
        raise ConfigError(f"algo.label_smoothing = {value}: want 0 or more, below 0.5 (the share of wrong labels)")
