"""VESPO (2602.10693): weights each sequence by a gamma-shaped function of its ratio against the sampler.

    W = exp( sum_t (now_t - sampler_t) ),    phi = e^l W^k e^(-l W)
    loss_t = -sg(phi) A now_t,               k, l = 2, 3 where A >= 0, else 3, 2

phi(1) = 1, so on-policy the gradient is that of REINFORCE; phi falls to 0 on both sides.
a is the advantage A, k the power and l the decay.
The five choices: ratio per sequence (product) against the sampler; no clip; no KL; advantage (reward - group mean) /
(group std + 1e-4); mean over all tokens of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlft.algos.checks import check_above_zero
from rlft.algos.corrections import Correction
from rlft.algos.policy_loss import PolicyLoss
from rlft.algos.tokens import Tokens
from rlft.types import Stat, Stats


@dataclass(frozen=True)
class Vespo(PolicyLoss):
    """The policy gradient with a gamma-shaped weight of each sequence."""

    has_ratio: ClassVar[bool] = False
    against_sampler: ClassVar[bool] = True

    correction: Correction = "none"
    """Only "none": the ratio is already against the sampler, so a correction would count twice."""
    k_pos: float = 2.0
    """Power of W where the advantage is 0 or more."""
    lambda_pos: float = 3.0
    """Decay in W where the advantage is 0 or more."""
    k_neg: float = 3.0
    """Power of W where the advantage is negative."""
    lambda_neg: float = 2.0
    """Decay in W where the advantage is negative."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(k_pos=self.k_pos, lambda_pos=self.lambda_pos, k_neg=self.k_neg, lambda_neg=self.lambda_neg)

    def summary(self) -> str:
        return f"sequence ratio (product) against the sampler in a gamma-shaped weight, {self.common_summary()}"

    def token_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        a = tokens.advantages
        log_w = tokens.sum(tokens.against_sampler().detach())
        k = torch.where(a >= 0, self.k_pos, self.k_neg).to(log_w.dtype)
        lambda_ = torch.where(a >= 0, self.lambda_pos, self.lambda_neg).to(log_w.dtype)
        phi = (lambda_ + k * log_w - lambda_ * log_w.exp()).exp()
        token_loss = -phi * a * tokens.now
        return token_loss, {"vespo/phi_seq_mean": Stat.mean(phi, tokens.used)}
