"""GRPO with a squared penalty in place of the clip (SPO, 2401.16025): `algo.name = "examples/my_loss.py"`.

    loss_t = -r_t A + |A| (r_t - 1)^2 / (2 width),    r_t = exp(now - old)

Settings common to all policy losses, their correction, KL and entropy terms are those of `PolicyLoss`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlft.algos.checks import check_above_zero
from rlft.algos.policy_loss import PolicyLoss
from rlft.algos.tokens import Tokens
from rlft.types import Stats


@dataclass(frozen=True)
class Spo(PolicyLoss):
    """The policy gradient with a ratio per token that is drawn back to 1."""

    width: float = 0.2
    """Distance of the ratio from 1 at which a token has no gradient left."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(width=self.width)

    def summary(self) -> str:
        return f"ratio per token, squared penalty of width {self.width:g}, {self.common_summary()}"

    def token_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        ratio, advantages = tokens.log_ratio().exp(), tokens.advantages
        return -ratio * advantages + advantages.abs() * (ratio - 1) ** 2 / (2 * self.width), {}
