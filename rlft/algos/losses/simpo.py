"""SimPO (2405.14734): a logistic loss on the margin of mean log-probs above a target, without a reference.

    loss = -log sigmoid( beta (m_w - m_l) - gamma ),    m = mean log-prob of a side's tokens

The five choices: no ratio; no clip; no KL and no reference; advantage = recorded reward (+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.checks import check_zero_or_more
from rlft.algos.pair_loss import PairLoss
from rlft.algos.pairs import Pairs
from rlft.types import Stats


@dataclass(frozen=True)
class Simpo(PairLoss):
    """Preference optimisation of pairs by mean log-probs."""

    needs_reference: ClassVar[bool] = False

    beta: float = 2.0
    """Factor of the margin of mean log-probs."""
    gamma: float = 1.0
    """Target margin, in units of beta times mean log-probs; usually 0.3 to 0.6 of beta."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_zero_or_more(gamma=self.gamma)

    def summary(self) -> str:
        return f"mean log-probs without a reference, beta {self.beta:g}, margin {self.gamma:g}, mean over pairs"

    def pair_loss(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        value = -F.logsigmoid(self.beta * (pairs.chosen.mean - pairs.rejected.mean) - self.gamma)
        return value, pairs.stats(self.beta * pairs.chosen.mean, self.beta * pairs.rejected.mean)
