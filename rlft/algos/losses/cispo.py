"""Clipped importance-sampling weights (CISPO, MiniMax-M1, 2506.13585): clips the weight of a token, never its gradient.

    loss_t = -sg(min(r_t, clip_max)) A now_t,    r_t = exp(now - old)

The five choices: ratio per token, as a weight without gradient; at most clip_max, an absolute ratio as in TRL (verl and
slime measure from 1); no KL; advantage (reward - group mean) / (group std + 1e-4); mean over all tokens of the step.
The paper's mean is over the tokens of a prompt: aggregation "prompt_mean", as in ScaleRL (2510.13786, preset
`scalerl`). With one update r = 1, and the correction for the sampler is the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rlft.algos.policy_loss import PolicyLoss
from rlft.algos.tokens import Tokens
from rlft.errors import ConfigError
from rlft.types import Stat, Stats


@dataclass(frozen=True)
class Cispo(PolicyLoss):
    """The policy gradient with clipped ratios as weights."""

    clip_max: float = 5.0
    """Largest weight of a token, an absolute ratio."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.clip_max < math.inf:
            raise ConfigError(f"algo.clip_max = {self.clip_max}: want 1 or more, the largest ratio itself")

    def summary(self) -> str:
        return f"ratio per token as a weight up to {self.clip_max:g}, {self.common_summary()}"

    def token_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        r = tokens.log_ratio().detach().exp()
        token_loss = -r.clamp(max=self.clip_max) * tokens.advantages * tokens.now
        clipped = (r > self.clip_max) & (tokens.advantages > 0)
        return token_loss, {"cispo_clip_ratio": Stat.mean(clipped.float(), tokens.used)}
