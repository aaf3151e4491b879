"""Self-play preference optimisation (SPPO, 2405.00675) with hard labels: pulls each side to a separate target.

    loss = (g_w - 1 / (2 beta))^2 + (g_l + 1 / (2 beta))^2,    g = log-ratio of a side against the reference

The paper's 1 / beta is eta, and its win rates are 1 and 0 here, as in TRL's "sppo_hard".
The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded reward
(+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlft.algos.pair_loss import PairLoss
from rlft.algos.pairs import Pairs
from rlft.types import Stats


@dataclass(frozen=True)
class Sppo(PairLoss):
    """Self-play preference optimisation of pairs."""

    def summary(self) -> str:
        return f"squared log-ratio per sequence against the reference, beta {self.beta:g}, mean over pairs"

    def pair_loss(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        target = 0.5 / self.beta
        value = (pairs.chosen.gain - target) ** 2 + (pairs.rejected.gain + target) ** 2
        return value, pairs.gain_stats(self.beta)
