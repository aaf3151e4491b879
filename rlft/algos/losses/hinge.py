"""Hinge loss on the DPO margin (SLiC, 2305.10425; with the reference as in 2309.06657): no loss beyond a margin of 1.

    loss = max(0, 1 - beta D),    D as in `dpo`

The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded reward
(+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.pair_loss import PairLoss
from rlft.algos.pairs import Pairs
from rlft.types import Stats


@dataclass(frozen=True)
class Hinge(PairLoss):
    """The hinge loss of pairs."""

    def summary(self) -> str:
        return f"log-ratio per sequence against the reference in a hinge, beta {self.beta:g}, mean over pairs"

    def pair_loss(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        value = F.relu(1 - self.beta * pairs.margin)
        return value, pairs.gain_stats(self.beta)
