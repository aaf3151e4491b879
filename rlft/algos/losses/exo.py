"""Efficient exact optimisation (EXO, 2402.00856) on pairs: DPO with the reverse KL to the labels instead of the forward
KL.

    q = sigmoid(beta D),    D as in `dpo`,    e = label_smoothing
    loss = q ( log q - log(1 - e) ) + (1 - q) ( log(1 - q) - log e )

The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded reward
(+1, -1); mean over pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.checks import check_smoothing
from rlft.algos.pair_loss import PairLoss
from rlft.algos.pairs import Pairs
from rlft.errors import ConfigError
from rlft.types import Stats


@dataclass(frozen=True)
class Exo(PairLoss):
    """Efficient exact optimisation of pairs."""

    label_smoothing: float = 1e-3
    """Assumed share of wrong labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing)
        if not self.label_smoothing:
            raise ConfigError(f"algo.label_smoothing = {self.label_smoothing}: want above 0, the loss has its log")

    def summary(self) -> str:
        ratio = "log-ratio per sequence against the reference"
        return f"{ratio}, reverse KL to the labels, beta {self.beta:g}, mean over pairs"

    def pair_loss(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        logit, e = self.beta * pairs.margin, self.label_smoothing
        better, worse = F.logsigmoid(logit), F.logsigmoid(-logit)
        value = better.exp() * (better - math.log1p(-e)) + worse.exp() * (worse - math.log(e))
        return value, pairs.gain_stats(self.beta)
