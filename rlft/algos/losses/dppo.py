"""DPPO (2602.04879): a trust region in probability instead of ratio, which masks tokens that moved too far.

    loss_t = -sg(min(w_t, cap)) A now_t M_t,    w_t = exp(now_t - sampler_t)
    M_t = 0 where p has moved from q in the direction of A by more than a limit, else 1;  p = exp(now), q = exp(sampler)

    divergence = "tv":  |p - q|
    divergence = "kl":  q log(q / p) + (1 - q) log((1 - q) / (1 - p))

Both compare the sampled token with all others together, so rare tokens with extreme ratios are not masked. The KL is at
least twice the square of the TV, so a limit of 0.08 on "kl" keeps the TV within 0.2.
The five choices: ratio per token against the sampler, as a weight up to 20; mask by divergence; no KL term; advantage
(reward - group mean) / (group std + 1e-4); mean over all tokens of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlft.algos.checks import check_above_zero
from rlft.algos.corrections import Correction
from rlft.algos.policy_loss import PolicyLoss
from rlft.algos.tokens import Tokens
from rlft.errors import ConfigError
from rlft.types import Stats


@dataclass(frozen=True)
class Dppo(PolicyLoss):
    """The policy gradient within a trust region of probabilities."""

    has_ratio: ClassVar[bool] = False
    against_sampler: ClassVar[bool] = True

    correction: Correction = "none"
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
        if self.divergence not in ("tv", "kl"):
            raise ConfigError(f'algo.divergence = "{self.divergence}": want "tv" or "kl"')
        check_above_zero(limit_low=self.limit_low, limit_high=self.limit_high)
        if not 1 <= self.cap < math.inf:
            raise ConfigError(f"algo.cap = {self.cap}: want 1 or more")

    def summary(self) -> str:
        return (
            f"ratio per token against the sampler up to {self.cap:g}, dropped beyond a {self.divergence.upper()} of "
            f"{self.limit_low:g} / {self.limit_high:g}, {self.common_summary()}"
        )

    def token_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        now, sampler, a = tokens.now.detach(), tokens.sampler, tokens.advantages
        p, q = now.exp(), sampler.exp()
        divergence = (p - q).abs() if self.divergence == "tv" else two_way_kl(now, sampler)
        low = (a < 0) & (p < q) & (divergence > self.limit_low)
        high = (a > 0) & (p > q) & (divergence > self.limit_high)
        weight = tokens.against_sampler().detach().exp().clamp(max=self.cap)
        token_loss = torch.where(low | high, 0, -weight * a * tokens.now)
        # fresh=False, since the ratio is against the sampler and not against old.
        return token_loss, tokens._replace(fresh=False).clip_stats(low, high)


def two_way_kl(now: Tensor, sampler: Tensor) -> Tensor:
    """Return KL(sampler : now) of the binary choice "this token or another", in nats. Log-probs of any shape."""
    # log(1 - p) is computed as log(-expm1(log p)), which does not cancel near p = 1; clamped below p = 1.
    others = [torch.log(-torch.expm1(logprob.clamp(max=-1e-7))) for logprob in (now, sampler)]
    return sampler.exp() * (sampler - now) - torch.expm1(sampler) * (others[1] - others[0])
