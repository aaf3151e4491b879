"""Hinge loss on the DPO margin (SLiC, 2305.10425; with the reference as in 2309.06657): no loss beyond a margin of 1.

    loss = max(0, 1 - beta D),    D as in `dpo`

The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded reward
(+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.pairs import Settings, read
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
    """Settings of [algo] for hinge."""


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"log-ratio per sequence against the reference in a hinge, beta {cfg.beta:g}, mean over pairs"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and TRL's reward metrics. logprobs: [T] with gradient."""
    assert batch.ref_logprobs is not None
    pairs = read(logprobs, batch)
    value = F.relu(1 - cfg.beta * pairs.margin)
    return pairs.total(value), pairs.gain_stats(cfg.beta)
