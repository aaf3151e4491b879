"""DPPO (2602.04879): a trust region in probability instead of ratio, which masks tokens that moved too far.

    loss_t = -sg(min(w_t, cap)) A now_t M_t,    w_t = exp(now_t - sampler_t)
    M_t = 0 where p has moved from q in the direction of A by more than a limit, else 1;  p = exp(now), q = exp(sampler)

    divergence = "tv":  |p - q|
    divergence = "kl":  q log(q / p) + (1 - q) log((1 - q) / (1 - p))

Both compare the sampled token with all others together, so rare tokens with extreme ratios are not masked. The KL is at
least twice the square of the TV, so a limit of 0.08 on "kl" keeps the TV within 0.2.
The five choices: ratio per token
against the sampler, as a weight up to 20; mask by divergence; no KL term; advantage (reward - group mean) / (group std
+ 1e-4); mean over all tokens of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlft.algos import settings, surrogate
from rlft.algos.tokens import read
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Stats

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
    """Settings of [algo] for dppo."""

    correction: settings.Correction = "none"
    """Only "none": the ratio is already against the sampler, so a correction would count twice."""
    divergence: Literal["tv", "kl"] = "tv"
    """Measure of the change of a token's probability: total variation, or KL of the binary choice."""
    limit_low: float = 0.2
    """Largest divergence of a token of negative advantage that became less likely."""
    limit_high: float = 0.2
    """Largest divergence of a token of positive advantage that became more likely."""
    cap: float = 20.0
    """Largest weight of a token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.check_against_sampler(self, "dppo")
        if self.divergence not in ("tv", "kl"):
            raise ConfigError(f'algo.divergence = "{self.divergence}": want "tv" or "kl"')
        for name in ("limit_low", "limit_high"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"algo.{name} = {getattr(self, name)}: want a number above 0")
        if not 1 <= self.cap < math.inf:
            raise ConfigError(f"algo.cap = {self.cap}: want 1 or more")


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return (
        f"ratio per token against the sampler up to {cfg.cap:g}, dropped beyond a {cfg.divergence.upper()} of "
        f"{cfg.limit_low:g} / {cfg.limit_high:g}, {surrogate.summary(cfg)}"
    )


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and its metrics. logprobs: [T] with gradient."""
    tokens = read(logprobs, batch)
    now, sampler, a = tokens.now.detach(), tokens.sampler, tokens.advantages
    p, q = now.exp(), sampler.exp()
    divergence = (p - q).abs() if cfg.divergence == "tv" else two_way_kl(now, sampler)
    low, high = (a < 0) & (p < q) & (divergence > cfg.limit_low), (a > 0) & (p > q) & (divergence > cfg.limit_high)
    weight = tokens.against_sampler().detach().exp().clamp(max=cfg.cap)
    token_loss = torch.where(low | high, 0, -weight * a * tokens.now)
    value, stats = surrogate.total(token_loss, tokens, batch, cfg)
    # fresh=False, since the ratio is against the sampler and not against old.
    return value, stats | surrogate.clip_stats(low, high, tokens._replace(fresh=False))


def two_way_kl(now: Tensor, sampler: Tensor) -> Tensor:
    """Return KL(sampler : now) of the binary choice "this token or another", in nats. Log-probs of any shape."""
    # log(1 - p) is computed as log(-expm1(log p)), which does not cancel near p = 1; clamped below p = 1.
    others = [torch.log(-torch.expm1(logprob.clamp(max=-1e-7))) for logprob in (now, sampler)]
    return sampler.exp() * (sampler - now) - torch.expm1(sampler) * (others[1] - others[0])
