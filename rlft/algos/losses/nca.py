"""Noise contrastive alignment (NCA, 2402.05369) on pairs: also keeps the likelihood of the chosen side up.

    loss = -log sigmoid(beta g_w) - log sigmoid(-beta g_w) / 2 - log sigmoid(-beta g_l) / 2

g = log-ratio of a side against the reference. DPO may lower both sides as long as their margin grows; this loss does
not. The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded
reward (+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.pair_loss import PairLoss
from rlft.algos.pairs import Pairs
from rlft.types import Stats


@dataclass(frozen=True)
class Nca(PairLoss):
    """Noise contrastive alignment of pairs."""

    def summary(self) -> str:
        return f"log-ratio per sequence against the reference, each side by itself, beta {self.beta:g}, mean over pairs"

    def pair_loss(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        better, worse = self.beta * pairs.chosen.gain, self.beta * pairs.rejected.gain
        value = -F.logsigmoid(better) - 0.5 * F.logsigmoid(-better) - 0.5 * F.logsigmoid(-worse)
        return value, pairs.gain_stats(self.beta)
