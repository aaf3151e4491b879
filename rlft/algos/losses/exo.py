"""Efficient exact optimisation (EXO, 2402.00856) on pairs: DPO with the reverse KL to the labels instead of the forward
KL.

    q = sigmoid(beta D),    D as in `dpo`,    e = label_smoothing
    loss = q ( log q - log(1 - e) ) + (1 - q) ( log(1 - q) - log e )

The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded reward
(+1, -1); mean over pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.pairs import Settings, check_smoothing, read
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Stats

ADVANTAGE = "identity"
AGGREGATION: Aggregation = "sequence_sum"
RATIO = False
NEEDS_REFERENCE = True
WHOLE_GROUPS = True
NEEDS_SAMPLER = False
ZERO_ADV_ZERO_GRAD = False
ENTROPY_GRAD = False


@dataclass(frozen=True)
class Config(Settings):
    """Settings of [algo] for exo."""

    label_smoothing: float = 1e-3
    """Assumed share of wrong labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing)
        if not self.label_smoothing:
            raise ConfigError(f"algo.label_smoothing = {self.label_smoothing}: want above 0, the loss has its log")


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"log-ratio per sequence against the reference, reverse KL to the labels, beta {cfg.beta:g}, mean over pairs"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and TRL's reward metrics. logprobs: [T] with gradient."""
    assert batch.ref_logprobs is not None
    pairs = read(logprobs, batch)
    logit, e = cfg.beta * pairs.margin, cfg.label_smoothing
    better, worse = F.logsigmoid(logit), F.logsigmoid(-logit)
    value = better.exp() * (better - math.log1p(-e)) + worse.exp() * (worse - math.log(e))
    return pairs.total(value), pairs.gain_stats(cfg.beta)
