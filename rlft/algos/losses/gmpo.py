"""Geometric-mean policy optimisation (GMPO, 2507.20673): the geometric mean of clipped token ratios.

    c_t = now - old, at most clip_high where A > 0, at least -clip_low where A < 0
    g_i = exp( mean_t c_t )
    loss_t = -r_t A,    r_t = sg(g_i) (1 + c_t - sg(c_t))

The mean of loss_t over a sequence has the value and gradient of -g_i A; the per-token form allows a correction per
token. The five choices: ratio per sequence; clip of each token's log-ratio, which removes a clipped token's gradient;
no KL; advantage (reward - group mean) / (group std + 1e-4); mean over sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlft.algos.policy_loss import PolicyLoss
from rlft.algos.tokens import Tokens
from rlft.errors import ConfigError
from rlft.types import Aggregation, Stats


@dataclass(frozen=True)
class Gmpo(PolicyLoss):
    """The policy gradient with the geometric mean of clipped token ratios."""

    has_clip: ClassVar[bool] = True

    aggregation: Aggregation = "sequence_mean"
    """How token losses are reduced to one number; sequence_mean in the paper."""
    clip_low: float = 0.4
    """Lower clip of a token's log-ratio is -clip_low where the advantage is negative, in nats."""
    clip_high: float = 0.4
    """Upper clip of a token's log-ratio where the advantage is positive, in nats."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("clip_low", self.clip_low), ("clip_high", self.clip_high)):
            if not 0 <= value <= 20:
                raise ConfigError(f"algo.{name} = {value}: want 0 to 20 nats")

    def summary(self) -> str:
        return (
            f"geometric mean of token ratios, log-ratios clipped to [{-self.clip_low:g}, {self.clip_high:g}], "
            f"{self.common_summary()}"
        )

    def token_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        log_ratio, a = tokens.log_ratio(), tokens.advantages
        clipped = torch.where(a > 0, log_ratio.clamp(max=self.clip_high), log_ratio.clamp(min=-self.clip_low))
        mean_ratio = tokens.mean(torch.where(tokens.used, clipped, 0)).detach().exp()
        token_loss = -mean_ratio * (1 + clipped - clipped.detach()) * a
        low, high = (log_ratio < -self.clip_low) & (a < 0), (log_ratio > self.clip_high) & (a > 0)
        return token_loss, tokens.clip_stats(low, high)
