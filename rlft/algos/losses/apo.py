"""Anchored preference optimisation (APO, 2408.06266): controls the direction of each side separately.

    variant = "zero":  1 - sigmoid(beta g_w) + sigmoid(beta g_l)
    variant = "down":  sigmoid(beta g_w) + 1 - sigmoid(beta D)

"zero" raises the chosen side and lowers the rejected one: for data better than the policy. "down" lowers both, the
rejected one more: for data worse than the policy.
g = log-ratio of a side against the reference, D = g_w - g_l.
The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded reward
(+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlft.algos.pairs import Settings, read
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
    """Settings of [algo] for apo."""

    variant: Literal["zero", "down"] = "zero"
    """Variant of the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("zero", "down"):
            raise ConfigError(f'algo.variant = "{self.variant}": want "zero" or "down"')


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"log-ratio per sequence against the reference ({cfg.variant}), no clip, beta {cfg.beta:g}, mean over pairs"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and TRL's reward metrics. logprobs: [T] with gradient."""
    assert batch.ref_logprobs is not None
    pairs = read(logprobs, batch)
    better, worse = cfg.beta * pairs.chosen.gain, cfg.beta * pairs.rejected.gain
    zero = 1 - better.sigmoid() + worse.sigmoid()
    value = zero if cfg.variant == "zero" else better.sigmoid() + 1 - (better - worse).sigmoid()
    return pairs.total(value), pairs.gain_stats(cfg.beta)
