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

from rlft.algos import settings, surrogate
from rlft.algos.tokens import read
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Stat, Stats

ADVANTAGE = "group_norm"
AGGREGATION: Aggregation = "token_mean"
RATIO = True
NEEDS_REFERENCE = settings.needs_reference
WHOLE_GROUPS = False
NEEDS_SAMPLER = settings.needs_sampler
ZERO_ADV_ZERO_GRAD = settings.zero_adv_zero_grad
ENTROPY_GRAD = settings.entropy_grad
prepare = surrogate.prepare
adapt = surrogate.adapt


@dataclass(frozen=True)
class Config(settings.Settings):
    """Settings of [algo] for cispo."""

    clip_max: float = 5.0
    """Largest weight of a token, an absolute ratio."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.clip_max < math.inf:
            raise ConfigError(f"algo.clip_max = {self.clip_max}: want 1 or more, the largest ratio itself")


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"ratio per token as a weight up to {cfg.clip_max:g}, {surrogate.summary(cfg)}"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and its metrics. logprobs: [T] with gradient."""
    tokens = read(logprobs, batch)
    r = tokens.log_ratio().detach().exp()
    token_loss = -r.clamp(max=cfg.clip_max) * tokens.advantages * tokens.now
    value, stats = surrogate.total(token_loss, tokens, batch, cfg)
    clipped = (r > cfg.clip_max) & (tokens.advantages > 0)
    return value, stats | {"cispo_clip_ratio": Stat.mean(clipped.float(), tokens.used)}
