"""SimPO (2405.14734): a logistic loss on the margin of mean log-probs above a target, without a reference.

    loss = -log sigmoid( beta (m_w - m_l) - gamma ),    m = mean log-prob of a side's tokens

The five choices: no ratio; no clip; no KL and no reference; advantage = recorded reward (+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.pairs import Settings, read
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Stats

ADVANTAGE = "identity"
AGGREGATION: Aggregation = "sequence_sum"
RATIO = False
NEEDS_REFERENCE = False
WHOLE_GROUPS = True
NEEDS_SAMPLER = False
ZERO_ADV_ZERO_GRAD = False
ENTROPY_GRAD = False


@dataclass(frozen=True)
class Config(Settings):
    """Settings of [algo] for simpo."""

    beta: float = 2.0
    """Factor of the margin of mean log-probs."""
    gamma: float = 1.0
    """Target margin, in units of beta times mean log-probs; usually 0.3 to 0.6 of beta."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma < float("inf"):
            raise ConfigError(f"algo.gamma = {self.gamma}: want 0 or more, and finite")


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"mean log-probs without a reference, beta {cfg.beta:g}, margin {cfg.gamma:g}, mean over pairs"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and TRL's reward metrics. logprobs: [T] with gradient."""
    pairs = read(logprobs, batch)
    value = -F.logsigmoid(cfg.beta * (pairs.chosen.mean - pairs.rejected.mean) - cfg.gamma)
    return pairs.total(value), pairs.stats(cfg.beta * pairs.chosen.mean, cfg.beta * pairs.rejected.mean)
