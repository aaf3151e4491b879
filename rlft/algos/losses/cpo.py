"""Contrastive preference optimisation (CPO, 2401.08417): DPO without a reference, regularised by the likelihood.

    d = now_w - now_l, sums over the sides
    loss = -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d) + nll_coef NLL_w,    NLL_w = -mean over the chosen side

NLL_w is averaged over pairs, so every chosen side has equal weight. TRL 1.16 averages over the chosen tokens of a
micro-batch, so long sides have more weight there, and the result depends on the split into micro-batches.

Legend: w the chosen side, l the rejected one, e = label_smoothing, d the margin.
The five choices: no ratio; no clip; no KL and no reference; advantage = recorded reward (+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.pairs import Settings, check_above_zero, check_smoothing, read
from rlft.types import Aggregation, Batch, Stat, Stats

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
    """Settings of [algo] for cpo."""

    beta: float = 0.1
    """Factor of the margin of log-probs."""
    label_smoothing: float = 0.0
    """Assumed share of wrong labels."""
    nll_coef: float = 1.0
    """Factor of the negative log-likelihood of the chosen side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(nll_coef=self.nll_coef)
        check_smoothing(self.label_smoothing)


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    nll = f"{cfg.nll_coef:g} x NLL of the chosen side"
    return f"log-probs without a reference, beta {cfg.beta:g}, {nll}, mean over pairs"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and TRL's reward metrics. logprobs: [T] with gradient."""
    pairs = read(logprobs, batch)
    nll = -pairs.chosen.mean
    logit, e = cfg.beta * (pairs.chosen.now - pairs.rejected.now), cfg.label_smoothing
    value = -(1 - e) * F.logsigmoid(logit) - e * F.logsigmoid(-logit) + cfg.nll_coef * nll
    stats = pairs.stats(cfg.beta * pairs.chosen.now, cfg.beta * pairs.rejected.now)
    return pairs.total(value), stats | {"nll_loss": Stat.mean(nll, pairs.real)}
