"""Geometric-mean policy optimisation (GMPO, 2507.20673): the geometric mean of clipped token ratios.

    c_t = now - old, at most clip_high where A > 0, at least -clip_low where A < 0
    g_i = exp( mean_t c_t )
    loss_t = -r_t A,    r_t = sg(g_i) (1 + c_t - sg(c_t))

A sequence's mean of loss_t has the value -g_i A and its gradient; the form per token lets tokens be corrected apart.
The five choices: ratio per sequence; clip of each token's log-ratio, so a clipped token has no gradient; no KL;
advantage (reward - group mean) / (group std + 1e-4); mean over sequences.
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
    """How token losses are reduced to one number; the paper's is sequence_mean."""
    clip_low: float = 0.4
    """A token's log-ratio counts down to -clip_low where its advantage is negative, in nats."""
    clip_high: float = 0.4
    """A token's log-ratio counts up to clip_high where its advantage is positive, in nats."""

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
    d, a = tokens.log_ratio(), tokens.advantages
    c = torch.where(a > 0, d.clamp(max=cfg.clip_high), d.clamp(min=-cfg.clip_low))
    g = tokens.mean(torch.where(tokens.used, c, 0)).detach().exp()
    token_loss = -g * (1 + c - c.detach()) * a
    low, high = (d < -cfg.clip_low) & (a < 0), (d > cfg.clip_high) & (a > 0)
    value, stats = surrogate.total(token_loss, tokens, batch, cfg)
    return value, stats | surrogate.clip_stats(low, high, tokens)
