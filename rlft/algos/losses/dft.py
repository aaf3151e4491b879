"""Dynamic fine-tuning (DFT, 2508.05629): supervised fine-tuning with tokens weighted by their probability.

    loss = sum_t weight_t ( -A sg(p_t) logprob_t ),    p_t = exp(logprob_t), A = 1

Without the factor, the supervised gradient is a policy gradient with reward 1 / p, dominated by unlikely tokens.
The five choices: no ratio, no clip, no KL, advantage = recorded reward (1), mean over all trained tokens of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.algos.losses import sft
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
class Config(sft.Config):
    """Settings of [algo] for dft."""


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return "no ratio, no clip, no KL, each token by its probability"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above. logprobs: [T] with gradient."""
    used = batch.train_mask & (batch.weight != 0)
    now = torch.where(used, logprobs, 0)
    return (-(batch.advantages * now.detach().exp() * now) * batch.weight).sum(), {}
