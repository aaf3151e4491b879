"""Anchored preference optimisation (APO, 2408.06266): controls the direction of each side separately.

    variant = "zero":  1 - sigmoid(beta g_w) + sigmoid(beta g_l)
    variant = "down":  sigmoid(beta g_w) + 1 - sigmoid(beta D)

"zero" raises the chosen side and lowers the rejected one: for data better than the policy. "down" lowers both, the
rejected one more: for data worse than the policy.
g = log-ratio of a side against the reference, D = g_w - g_l.
The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded reward
(+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlft.algos.pair_loss import PairLoss
from rlft.algos.pairs import Pairs
from rlft.errors import ConfigError
from rlft.types import Stats


@dataclass(frozen=True)
class Apo(PairLoss):
    """Anchored preference optimisation of pairs."""

    variant: Literal["zero", "down"] = "zero"
    """Variant of the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("zero", "down"):
            raise ConfigError(f'algo.variant = "{self.variant}": want "zero" or "down"')

    def summary(self) -> str:
        ratio = f"log-ratio per sequence against the reference ({self.variant})"
        return f"{ratio}, no clip, beta {self.beta:g}, mean over pairs"

    def pair_loss(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        better, worse = self.beta * pairs.chosen.gain, self.beta * pairs.rejected.gain
        zero = 1 - better.sigmoid() + worse.sigmoid()
        value = zero if self.variant == "zero" else better.sigmoid() + 1 - (better - worse).sigmoid()
        return value, pairs.gain_stats(self.beta)
