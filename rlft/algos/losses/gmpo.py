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
    """Settings of [algo] for gmpo."""

    aggregation: Aggregation = AGGREGATION
    """How token losses are reduced to one number; sequence_mean in the paper."""
    clip_low: float = 0.4
    """Lower clip of a token's log-ratio is -clip_low where the advantage is negative, in nats."""
    clip_high: float = 0.4
    """Upper clip of a token's log-ratio where the advantage is positive, in nats."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip_low", "clip_high"):
            if not 0 <= getattr(self, name) <= 20:
                raise ConfigError(f"algo.{name} = {getattr(self, name)}: want 0 to 20 nats")


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return (
        f"geometric mean of token ratios, log-ratios clipped to [{-cfg.clip_low:g}, {cfg.clip_high:g}], "
        f"{surrogate.summary(cfg)}"
    )


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and its metrics. logprobs: [T] with gradient."""
    tokens = read(logprobs, batch)
    log_ratio, a = tokens.log_ratio(), tokens.advantages
    clipped = torch.where(a > 0, log_ratio.clamp(max=cfg.clip_high), log_ratio.clamp(min=-cfg.clip_low))
    mean_ratio = tokens.mean(torch.where(tokens.used, clipped, 0)).detach().exp()
    token_loss = -mean_ratio * (1 + clipped - clipped.detach()) * a
    low, high = (log_ratio < -cfg.clip_low) & (a < 0), (log_ratio > cfg.clip_high) & (a > 0)
    value, stats = surrogate.total(token_loss, tokens, batch, cfg)
    return value, stats | surrogate.clip_stats(low, high, tokens)
