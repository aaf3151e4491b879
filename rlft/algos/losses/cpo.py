"""Contrastive preference optimisation (CPO, 2401.08417): DPO without a reference, regularised by the likelihood.

    d = now_w - now_l, sums over the sides
    loss = -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d) + nll_coef NLL_w,    NLL_w = -mean over the chosen side

NLL_w is averaged over pairs, so every chosen side has equal weight. TRL 1.16 averages over the chosen tokens of a
micro-batch, so long sides have more weight there, and the result depends on the split into micro-batches.

Legend: w the chosen side, l the rejected one, e = label_smoothing, d the margin.
The five choices: no ratio; no clip; no KL and no reference; advantage = recorded reward (+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.checks import check_above_zero, check_smoothing
from rlft.algos.pair_loss import PairLoss
from rlft.algos.pairs import Pairs
from rlft.types import Stat, Stats


@dataclass(frozen=True)
class Cpo(PairLoss):
    """Contrastive preference optimisation of pairs."""

    needs_reference: ClassVar[bool] = False

    beta: float = 0.1
    """Factor of the margin of log-probs."""
    label_smoothing: float = 0.0
    """Assumed share of wrong labels."""
    nll_coef: float = 1.0
    """Factor of the negative log-likelihood of the chosen side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(nll_coef=self.nll_coef)
        check_smoothing(self.label_smoothing)

    def summary(self) -> str:
        nll = f"{self.nll_coef:g} x NLL of the chosen side"
        return f"log-probs without a reference, beta {self.beta:g}, {nll}, mean over pairs"

    def pair_loss(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        nll = -pairs.chosen.mean
        logit, e = self.beta * (pairs.chosen.now - pairs.rejected.now), self.label_smoothing
        value = -(1 - e) * F.logsigmoid(logit) - e * F.logsigmoid(-logit) + self.nll_coef * nll
        stats = pairs.stats(self.beta * pairs.chosen.now, self.beta * pairs.rejected.now)
        return value, stats | {"nll_loss": Stat.mean(nll, pairs.real)}
