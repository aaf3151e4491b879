"""Supervised fine-tuning: maximise the log-prob of recorded completions.

    loss = sum_t weight_t ( -A logprob_t ),    A = 1

The five choices: no ratio, no clip, no KL, advantage = recorded reward (1), mean over all trained tokens of the
step. Value and gradient equal those of the cross-entropy of the completion tokens, averaged over the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlft.algos.checks import check_choice
from rlft.algos.loss import Loss
from rlft.types import Aggregation, Batch, Stat, Stats


@dataclass(frozen=True)
class Sft(Loss):
    """The log-likelihood of recorded completions."""

    zero_adv_zero_grad: ClassVar[bool] = True

    aggregation: Aggregation = "token_mean"
    """How token losses are reduced to one number: token_mean, sequence_mean, constant, sequence_sum, prompt_mean."""

    def __post_init__(self) -> None:
        check_choice(Aggregation, aggregation=self.aggregation)

    def summary(self) -> str:
        return "no ratio, no clip, no KL"

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        used = batch.train_mask & (batch.weight != 0)
        loss = (-(batch.advantages * torch.where(used, logprobs, 0)) * batch.weight).sum()
        return loss, {"nll": Stat.mean(-logprobs, used)}
