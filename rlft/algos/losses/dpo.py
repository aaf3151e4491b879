"""Direct preference optimisation (DPO, 2305.18290): a logistic loss on the margin between the two sides of a pair.

    D = (logprob - ref_logprob summed over the chosen side) - (the same over the rejected side)
    loss = -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D),    e = label_smoothing (cDPO)

With a new adapter D = 0 and the first loss is ln 2 = 0.69315. The reference is the base, or the adapter that training
started from. Online DPO (2402.04792) uses this loss on the best and worst completion of each sampled group: preset
`online_dpo`. The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage =
recorded reward (+1, -1); mean over pairs.
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
class Dpo(PairLoss):
    """Direct preference optimisation of pairs."""

    label_smoothing: float = 0.0
    """Assumed share of wrong labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing)

    def summary(self) -> str:
        return f"log-ratio per sequence against the reference, no clip, beta {self.beta:g}, mean over pairs"

    def pair_loss(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        logit, e = self.beta * pairs.margin, self.label_smoothing
        value = -(1 - e) * F.logsigmoid(logit) - e * F.logsigmoid(-logit)
        return value, pairs.gain_stats(self.beta)
