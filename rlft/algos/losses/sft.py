"""Supervised fine-tuning: maximise the log-prob of recorded completions.

    loss = sum_t weight_t ( -A logprob_t ),    A = 1

The five choices: no ratio, no clip, no KL, advantage = recorded reward (1), mean over all trained tokens of the
step. Value and gradient equal those of the cross-entropy of the completion tokens, averaged over the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Stats

ADVANTAGE = "identity"
AGGREGATION: Aggregation = "token_mean"
RATIO = False
NEEDS_REFERENCE = False
WHOLE_GROUPS = False
NEEDS_SAMPLER = False
ZERO_ADV_ZERO_GRAD = True
ENTROPY_GRAD = False


@dataclass(frozen=True)
class Config:
    """Settings of [algo] for sft."""

    aggregation: Aggregation = AGGREGATION
    """How token losses are reduced to one number: token_mean, sequence_mean, constant, sequence_sum, prompt_mean."""

    def __post_init__(self) -> None:
        choices = get_args(Aggregation)
        if self.aggregation not in choices:
            raise ConfigError(f'algo.aggregation = "{self.aggregation}": want one of {", ".join(choices)}')


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return "no ratio, no clip, no KL"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above. logprobs: [T] with gradient."""
    used = batch.train_mask & (batch.weight != 0)
    return (-(batch.advantages * torch.where(used, logprobs, 0)) * batch.weight).sum(), {}
