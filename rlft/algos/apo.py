"""Anchored preference optimisation (APO, 2408.06266): each side is pushed in a direction of its own.

    variant = "zero":  1 - sigmoid(beta g_w) + sigmoid(beta g_l)      chosen up, rejected down: data better than the
    policy variant = "down":  sigmoid(beta g_w) + 1 - sigmoid(beta D)        both down, rejected more: data worse than
    the policy

g = log-ratio of a side against the reference, D = g_w - g_l.
The five choices: log-ratio per sequence against the reference; no clip; the KL is implied by beta; advantage = the
recorded reward, +1 and -1; mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlft.algos.pairs import check_above_zero, read
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
class Config:
    """Settings of [algo] for apo."""

    advantage: str = ADVANTAGE
    """"identity" for recorded pairs; "best_and_worst" makes a pair of each sampled group (online)."""
    beta: float = 0.1
    """How strongly the margin counts: small values let the policy move further from the reference."""
    variant: Literal["zero", "down"] = "zero"
    """Which of the two."""

    def __post_init__(self) -> None:
        check_above_zero(beta=self.beta)
        if self.variant not in ("zero", "down"):
            raise ConfigError(f'algo.variant = "{self.variant}": want "zero" or "down"')


def words(cfg: Config) -> str:
    """Ratio, clip, KL and correction in words, for the start of a run."""
    return f"log-ratio per sequence against the reference ({cfg.variant}), no clip, beta {cfg.beta:g}, mean over pairs"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """The weighted sum of this file's formula, and TRL's reward metrics. logprobs: [T] with gradient."""
    assert batch.ref_logprobs is not None
    pairs = read(logprobs, batch)
    better, worse = cfg.beta * pairs.chosen.gain, cfg.beta * pairs.rejected.gain
    zero = 1 - better.sigmoid() + worse.sigmoid()
    value = zero if cfg.variant == "zero" else better.sigmoid() + 1 - (better - worse).sigmoid()
    return pairs.total(value), pairs.stats(cfg.beta * pairs.chosen.gain, cfg.beta * pairs.rejected.gain)
