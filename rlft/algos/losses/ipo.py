"""Identity preference optimisation (IPO, 2310.12036): pulls the margin to a finite target.

    loss = (D - 1 / (2 beta))^2

    length = "mean": D is the difference of the sides' mean log-ratios, as in TRL (confirmed by the authors of the
    paper) length = "sum":  D is the difference of their sums, as written in the paper; beta then has another scale

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
    """Settings of [algo] for ipo."""

    length: Literal["mean", "sum"] = "mean"
    """Whether the log-ratio of a side is the mean or the sum over its tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length not in ("mean", "sum"):
            raise ConfigError(f'algo.length = "{self.length}": want "mean" or "sum"')


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"{cfg.length} log-ratio per sequence against the reference, no clip, beta {cfg.beta:g}, mean over pairs"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and TRL's reward metrics. logprobs: [T] with gradient."""
    assert batch.ref_logprobs is not None
    pairs = read(logprobs, batch)
    sides = (pairs.chosen, pairs.rejected)
    gains = [side.gain / side.tokens if cfg.length == "mean" else side.gain for side in sides]
    value = (gains[0] - gains[1] - 1 / (2 * cfg.beta)) ** 2
    return pairs.total(value), pairs.gain_stats(cfg.beta)
