"""Robust DPO (2403.00409): an unbiased DPO loss for labels that are wrong with a known probability e.

    loss = ( -(1 - e) log sigmoid(beta D) + e log sigmoid(-beta D) ) / (1 - 2 e)

D as in `dpo`. The expectation over flipped labels is DPO's loss on the true labels.
The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded reward
(+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.checks import check_smoothing
from rlft.algos.pair_loss import PairLoss
from rlft.algos.pairs import Pairs
from rlft.types import Stats


@dataclass(frozen=True)
class RobustDpo(PairLoss):
    """Direct preference optimisation of pairs with wrong labels."""

    label_smoothing: float = 0.1
    """Known share of wrong labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing)

    def summary(self) -> str:
        wrong = f"{self.label_smoothing:g} of labels wrong"
        return f"log-ratio per sequence against the reference, no clip, beta {self.beta:g}, {wrong}"

    def pair_loss(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        logit, e = self.beta * pairs.margin, self.label_smoothing
        value = (-(1 - e) * F.logsigmoid(logit) + e * F.logsigmoid(-logit)) / (1 - 2 * e)
        return value, pairs.gain_stats(self.beta)
