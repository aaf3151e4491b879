"""RPO (2404.19733): DPO's loss plus the negative log-likelihood of the chosen side.

    loss = -log sigmoid(beta D) + nll_coef NLL_w,    D as in `dpo`, NLL_w = -mean over the chosen side's tokens

NLL_w is averaged over pairs, so every chosen side has equal weight. TRL 1.16 ("sigmoid" + "sft") averages over the
chosen tokens of a micro-batch, so long sides have more weight there, and the result depends on the split.
The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage = recorded reward
(+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.pairs import Settings, check_above_zero, read
from rlft.types import Aggregation, Batch, Stat, Stats

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
    """Settings of [algo] for rpo."""

    nll_coef: float = 1.0
    """Factor of the negative log-likelihood of the chosen side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(nll_coef=self.nll_coef)


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"log-ratio per sequence against the reference, beta {cfg.beta:g}, {cfg.nll_coef:g} x NLL of the chosen side"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and TRL's reward metrics. logprobs: [T] with gradient."""
    assert batch.ref_logprobs is not None
    pairs = read(logprobs, batch)
    nll = -pairs.chosen.mean
    value = -F.logsigmoid(cfg.beta * pairs.margin) + cfg.nll_coef * nll
    return pairs.total(value), pairs.gain_stats(cfg.beta) | {"nll_loss": Stat.mean(nll, pairs.real)}
