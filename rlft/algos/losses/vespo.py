"""VESPO (2602.10693): weights each sequence by a gamma-shaped function of its ratio against the sampler.

    W = exp( sum_t (now_t - sampler_t) ),    phi = e^l W^k e^(-l W)
    loss_t = -sg(phi) A now_t,               k, l = 2, 3 where A >= 0, else 3, 2

phi(1) = 1, so on-policy the gradient is that of REINFORCE; phi falls to 0 on both sides.
a is the advantage A, k the power and l the decay.
The five choices: ratio per sequence (product) against the sampler; no clip; no KL; advantage (reward - group mean) /
(group std + 1e-4); mean over all tokens of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.algos import settings, surrogate
from rlft.algos.tokens import read
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Stat, Stats

ADVANTAGE = "group_norm"
AGGREGATION: Aggregation = "token_mean"
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
    """Settings of [algo] for vespo."""

    correction: settings.Correction = "none"
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
        settings.check_against_sampler(self, "vespo")
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"algo.{name} = {getattr(self, name)}: want a number above 0")


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"sequence ratio (product) against the sampler in a gamma-shaped weight, {surrogate.summary(cfg)}"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and its metrics. logprobs: [T] with gradient."""
    tokens = read(logprobs, batch)
    a = tokens.advantages
    log_w = tokens.sum(tokens.against_sampler().detach())
    k = torch.where(a >= 0, cfg.k_pos, cfg.k_neg).to(log_w.dtype)
    lambda_ = torch.where(a >= 0, cfg.lambda_pos, cfg.lambda_neg).to(log_w.dtype)
    phi = (lambda_ + k * log_w - lambda_ * log_w.exp()).exp()
    value, stats = surrogate.total(-phi * a * tokens.now, tokens, batch, cfg)
    return value, stats | {"vespo/phi_seq_mean": Stat.mean(phi, tokens.used)}
