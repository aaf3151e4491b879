"""Soft adaptive policy optimisation (SAPO, 2511.20347): a sigmoid gate in place of the clip.

    loss_t = -(4 / tau) sigmoid(tau (r_t - 1)) A,    r_t = exp(now - old),    tau by the sign of A

The five choices: ratio per token; no hard clip, the gradient decays with the distance from 1, faster for A <= 0; no KL;
advantage (reward - group mean) / (group std + 1e-4); mean over sequences of the mean over tokens. At r = 1 the gradient
is that of REINFORCE, but the value is -2 A / tau, not -A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.algos import settings, surrogate
from rlft.algos.tokens import read
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Stats

ADVANTAGE = "group_norm"
AGGREGATION: Aggregation = "sequence_mean"
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
    """Settings of [algo] for sapo."""

    aggregation: Aggregation = AGGREGATION
    """How token losses are reduced to one number: token_mean, sequence_mean, constant, sequence_sum, prompt_mean."""
    temperature_pos: float = 1.0
    """tau for tokens of positive advantage; larger is narrower."""
    temperature_neg: float = 1.05
    """tau for tokens of other advantages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature_pos", "temperature_neg"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"algo.{name} = {getattr(self, name)}: want a number above 0")


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    gate = f"tau {cfg.temperature_pos:g} and {cfg.temperature_neg:g}"
    return f"ratio per token in a soft gate, {gate}, {surrogate.summary(cfg)}"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and its metrics. logprobs: [T] with gradient."""
    tokens = read(logprobs, batch)
    r, a = tokens.log_ratio().exp(), tokens.advantages
    tau = torch.where(a > 0, cfg.temperature_pos, cfg.temperature_neg).to(r.dtype)
    token_loss = -torch.sigmoid(tau * (r - 1)) * 4 / tau * a
    return surrogate.total(token_loss, tokens, batch, cfg)
