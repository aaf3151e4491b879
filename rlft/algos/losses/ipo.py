"""Identity preference optimisation (IPO, 2310.12036): pulls the margin to a finite target.

    loss = (D - 1 / (2 beta))^2

    length = "mean": D is the difference of the sides' mean log-ratios, as in TRL (confirmed by the paper's authors)
    length = "sum":  D is the difference of their sums, as written in the paper; beta then has another scale

The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded reward
(+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlft.algos.pair_loss import PairLoss
from rlft.algos.pairs import Pairs
from rlft.errors import ConfigError
from rlft.types import Stats


@dataclass(frozen=True)
class Ipo(PairLoss):
    """Identity preference optimisation of pairs."""

    length: Literal["mean", "sum"] = "mean"
    """Whether the log-ratio of a side is the mean or the sum over its tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length not in ("mean", "sum"):
            raise ConfigError(f'algo.length = "{self.length}": want "mean" or "sum"')

    def summary(self) -> str:
        return (
            f"{self.length} log-ratio per sequence against the reference, no clip, beta {self.beta:g}, mean over pairs"
        )

    def pair_loss(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        sides = (pairs.chosen, pairs.rejected)
        gains = [side.gain / side.tokens if self.length == "mean" else side.gain for side in sides]
        value = (gains[0] - gains[1] - 1 / (2 * self.beta)) ** 2
        return value, pairs.gain_stats(self.beta)
