"""Soft adaptive policy optimisation (SAPO, 2511.20347): a sigmoid gate in place of the clip.

    loss_t = -(4 / tau) sigmoid(tau (r_t - 1)) A,    r_t = exp(now - old),    tau by the sign of A

The five choices: ratio per token; no hard clip, the gradient decays with the distance from 1, faster for A <= 0; no KL;
advantage (reward - group mean) / (group std + 1e-4); mean over sequences of the mean over tokens. At r = 1 the gradient
is that of REINFORCE, but the value is -2 A / tau, not -A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.algos.checks import check_above_zero
from rlft.algos.policy_loss import PolicyLoss
from rlft.algos.tokens import Tokens
from rlft.types import Aggregation, Stats


@dataclass(frozen=True)
class Sapo(PolicyLoss):
    """The policy gradient with a sigmoid gate."""

    aggregation: Aggregation = "sequence_mean"
    """How token losses are reduced to one number: token_mean, sequence_mean, constant, sequence_sum, prompt_mean."""
    temperature_pos: float = 1.0
    """tau for tokens of positive advantage; larger is narrower."""
    temperature_neg: float = 1.05
    """tau for tokens of other advantages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(temperature_pos=self.temperature_pos, temperature_neg=self.temperature_neg)

    def summary(self) -> str:
        gate = f"tau {self.temperature_pos:g} and {self.temperature_neg:g}"
        return f"ratio per token in a soft gate, {gate}, {self.common_summary()}"

    def token_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        r, a = tokens.log_ratio().exp(), tokens.advantages
        tau = torch.where(a > 0, self.temperature_pos, self.temperature_neg).to(r.dtype)
        token_loss = -torch.sigmoid(tau * (r - 1)) * 4 / tau * a
        return token_loss, {}
