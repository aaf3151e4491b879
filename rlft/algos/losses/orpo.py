"""ORPO (2403.07691): supervised loss on the chosen side plus an odds ratio against the rejected side, without a
reference.

    a = mean log-prob of a side's tokens,    o = a - log(1 - e^a)
    loss = NLL_w - beta log sigmoid(o_w - o_l),    NLL_w = -a_w

NLL_w is over the completion. In TRL 1.16 it is over prompt and completion, which also trains the model on the question,
and is a mean over all tokens of a micro-batch, so it depends on the split into micro-batches.
The five choices: no ratio; no clip; no KL and no reference; advantage = recorded reward (+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.pair_loss import PairLoss
from rlft.algos.pairs import Pairs
from rlft.types import Stat, Stats


@dataclass(frozen=True)
class Orpo(PairLoss):
    """Odds-ratio preference optimisation of pairs."""

    needs_reference: ClassVar[bool] = False

    beta: float = 0.1
    """Factor of the odds-ratio term (lambda in the paper)."""

    def summary(self) -> str:
        return f"odds ratio without a reference, {self.beta:g} x, NLL of the chosen side, mean over pairs"

    def pair_loss(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        nll = -pairs.chosen.mean
        log_odds = odds(pairs.chosen.mean) - odds(pairs.rejected.mean)
        ratio = F.logsigmoid(log_odds)
        stats = pairs.stats(self.beta * pairs.chosen.mean, self.beta * pairs.rejected.mean) | {
            "nll_loss": Stat.mean(nll, pairs.real),
            "log_odds_ratio": Stat.mean(ratio, pairs.real),
            "log_odds_chosen": Stat.mean(log_odds, pairs.real),
        }
        return nll - self.beta * ratio, stats


def odds(a: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of a log-prob a <= 0, any shape.

    log(1 - e^a) is computed as log(-expm1(a)), which does not cancel near a = 0.
    """
    a = a.clamp(max=-1e-6)  # at p = 1 the odds are infinite
    return a - (-a.expm1()).log()
