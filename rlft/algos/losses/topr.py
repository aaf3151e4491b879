"""Tapered off-policy REINFORCE (TOPR, 2503.14286): full weight for good completions, ratio weight for bad ones.

    loss_t = -A now_t                      where A >= 0
    loss_t = -sg(min(w, 1)) A now_t        where A < 0

    level = "sequence":  w = exp( sum_t (now_t - sampler_t) )       level = "token":  w_t = exp(now_t - sampler_t)

The five choices: ratio against the sampler, of a sequence as in the paper, or of a token; weight within [0, 1] where
A < 0; no KL; advantage reward - group mean (the paper's rewards are +1 and -1); mean over sequences of the sum over
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlft.algos import settings, surrogate
from rlft.algos.tokens import read
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Stats

ADVANTAGE = "group_mean"
AGGREGATION: Aggregation = "sequence_sum"
RATIO = False
NEEDS_REFERENCE = settings.needs_reference
WHOLE_GROUPS = False
NEEDS_SAMPLER = True
ZERO_ADV_ZERO_GRAD = settings.zero_adv_zero_grad
ENTROPY_GRAD = settings.entropy_grad
prepare = surrogate.prepare
adapt = surrogate.adapt


@dataclass(frozen=True)
class Config(settings.Settings):
    """Settings of [algo] for topr."""

    advantage: str = ADVANTAGE
    """Estimator: a name in rlft.algos.advantages, or "file.py:function"."""
    aggregation: Aggregation = AGGREGATION
    """How token losses are reduced to one number: token_mean, sequence_mean, constant, sequence_sum, prompt_mean."""
    correction: settings.Correction = "none"
    """Only "none": the ratio is already against the sampler, so a correction would count twice."""
    level: Literal["sequence", "token"] = "sequence"
    """Whether the weight for A < 0 is the ratio of the sequence or of the token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.check_against_sampler(self, "topr")
        if self.level not in ("sequence", "token"):
            raise ConfigError(f'algo.level = "{self.level}": want "sequence" or "token"')


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return (
        f"{cfg.level} ratio against the sampler within [0, 1] where the advantage is negative, {surrogate.summary(cfg)}"
    )


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and its metrics. logprobs: [T] with gradient."""
    tokens = read(logprobs, batch)
    log_ratio, a = tokens.against_sampler().detach(), tokens.advantages
    w = (tokens.sum(log_ratio) if cfg.level == "sequence" else log_ratio).exp().clamp(max=1)
    return surrogate.total(-torch.where(a >= 0, 1, w) * a * tokens.now, tokens, batch, cfg)
