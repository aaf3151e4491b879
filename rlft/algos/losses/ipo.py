"""Identity preference optimisation (IPO, 2310.12036): the margin is pulled to a number instead of to infinity.

    loss = (D - 1 / (2 beta))^2

    length = "mean": D is the difference of the sides' mean log-ratios, as in TRL (whose authors asked the paper's)
    length = "sum":  of their sums, as the paper writes it; beta then means another thing

The five choices: log-ratio per sequence against the reference; no clip; the KL is implied by beta; advantage = the
recorded reward, +1 and -1; mean over pairs.
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
    """Whether a side counts by the mean over its tokens or by their sum."""

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
