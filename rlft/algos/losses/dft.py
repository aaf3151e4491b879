"""Dynamic fine-tuning (DFT, 2508.05629): supervised fine-tuning with tokens weighted by their probability.

    loss = sum_t weight_t ( -A sg(p_t) logprob_t ),    p_t = exp(logprob_t), A = 1

Without the factor, the supervised gradient is a policy gradient with reward 1 / p, dominated by unlikely tokens.
The five choices: no ratio, no clip, no KL, advantage = recorded reward (1), mean over all trained tokens of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlft.algos.checks import check_choice
from rlft.algos.loss import Loss
from rlft.types import Aggregation, Batch, Stats


@dataclass(frozen=True)
class Dft(Loss):
    """Supervised fine-tuning, each token weighted by its probability."""

    zero_adv_zero_grad: ClassVar[bool] = True

    aggregation: Aggregation = "token_mean"
    """How token losses are reduced to one number: token_mean, sequence_mean, constant, sequence_sum, prompt_mean."""

    def __post_init__(self) -> None:
        check_choice(Aggregation, aggregation=self.aggregation)

    def summary(self) -> str:
        return "no ratio, no clip, no KL, each token by its probability"

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        used = batch.train_mask & (batch.weight != 0)
        now = torch.where(used, logprobs, 0)
        return (-(batch.advantages * now.detach().exp() * now) * batch.weight).sum(), {}
