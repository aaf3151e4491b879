"""RPO (2404.19733): DPO's loss plus the negative log-likelihood of the chosen side.

    loss = -log sigmoid(beta D) + nll_coef NLL_w,    D as in `dpo`, NLL_w = -mean over the chosen side's tokens

NLL_w is averaged over pairs, so every chosen side has equal weight. TRL 1.16 ("sigmoid" + "sft") averages over the
chosen tokens of a micro-batch, so long sides have more weight there, and the result depends on the split.
The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded reward
(+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.checks import check_above_zero
from rlft.algos.pair_loss import PairLoss
from rlft.algos.pairs import Pairs
from rlft.types import Stat, Stats


@dataclass(frozen=True)
class Rpo(PairLoss):
    """Direct preference optimisation of pairs with a likelihood term."""

    nll_coef: float = 1.0
    """Factor of the negative log-likelihood of the chosen side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(nll_coef=self.nll_coef)

    def summary(self) -> str:
        nll = f"{self.nll_coef:g} x NLL of the chosen side"
        return f"log-ratio per sequence against the reference, beta {self.beta:g}, {nll}"

    def pair_loss(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        nll = -pairs.chosen.mean
        value = -F.logsigmoid(self.beta * pairs.margin) + self.nll_coef * nll
        return value, pairs.gain_stats(self.beta) | {"nll_loss": Stat.mean(nll, pairs.real)}
