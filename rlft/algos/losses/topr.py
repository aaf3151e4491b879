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
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlft.algos.corrections import Correction
from rlft.algos.policy_loss import PolicyLoss
from rlft.algos.tokens import Tokens
from rlft.errors import ConfigError
from rlft.types import Aggregation, Stats


@dataclass(frozen=True)
class Topr(PolicyLoss):
    """The policy gradient with ratios as weights of bad completions."""

    has_ratio: ClassVar[bool] = False
    against_sampler: ClassVar[bool] = True

    advantage: str = "group_mean"
    """Estimator: a name in rlft.algos.advantages, or "file.py:function"."""
    aggregation: Aggregation = "sequence_sum"
    """How token losses are reduced to one number: token_mean, sequence_mean, constant, sequence_sum, prompt_mean."""
    correction: Correction = "none"
    """Only "none": the ratio is already against the sampler, so a correction would count twice."""
    level: Literal["sequence", "token"] = "sequence"
    """Whether the weight for A < 0 is the ratio of the sequence or of the token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level not in ("sequence", "token"):
            raise ConfigError(f'algo.level = "{self.level}": want "sequence" or "token"')

    def summary(self) -> str:
        ratio = f"{self.level} ratio against the sampler within [0, 1] where the advantage is negative"
        return f"{ratio}, {self.common_summary()}"

    def token_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        log_ratio, a = tokens.against_sampler().detach(), tokens.advantages
        w = (tokens.sum(log_ratio) if self.level == "sequence" else log_ratio).exp().clamp(max=1)
        return -torch.where(a >= 0, 1, w) * a * tokens.now, {}
