"""Self-play preference optimisation (SPPO, 2405.00675) with hard labels: pulls each side to a separate target.

    loss = (g_w - 1 / (2 beta))^2 + (g_l + 1 / (2 beta))^2,    g = log-ratio of a side against the reference

The paper's 1 / beta is eta, and its win rates are 1 and 0 here, as in TRL's "sppo_hard".
The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded reward
(+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """Settings of [algo] for sppo."""


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"squared log-ratio per sequence against the reference, beta {cfg.beta:g}, mean over pairs"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and TRL's reward metrics. logprobs: [T] with gradient."""
    assert batch.ref_logprobs is not None
    pairs = read(logprobs, batch)
    target = 0.5 / cfg.beta
    value = (pairs.chosen.gain - target) ** 2 + (pairs.rejected.gain + target) ** 2
    return pairs.total(value), pairs.gain_stats(cfg.beta)
