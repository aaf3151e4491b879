"""Noise contrastive alignment (NCA, 2402.05369) on pairs: also keeps the likelihood of the chosen side up.

    loss = -log sigmoid(beta g_w) - log sigmoid(-beta g_w) / 2 - log sigmoid(-beta g_l) / 2

g = log-ratio of a side against the reference. DPO may lower both sides as long as their margin grows; this loss does
not. The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded
reward (+1, -1); mean over pairs.
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
    """Settings of [algo] for nca."""


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"log-ratio per sequence against the reference, each side by itself, beta {cfg.beta:g}, mean over pairs"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and TRL's reward metrics. logprobs: [T] with gradient."""
    assert batch.ref_logprobs is not None
    pairs = read(logprobs, batch)
    better, worse = cfg.beta * pairs.chosen.gain, cfg.beta * pairs.rejected.gain
    value = -F.logsigmoid(better) - 0.5 * F.logsigmoid(-better) - 0.5 * F.logsigmoid(-worse)
    return pairs.total(value), pairs.gain_stats(cfg.beta)
