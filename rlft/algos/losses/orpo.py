"""ORPO (2403.07691): supervised loss on the chosen side plus an odds ratio against the rejected side, without a
reference.

    a = mean log-prob of a side's tokens,    o = a - log(1 - e^a)
    loss = NLL_w - beta log sigmoid(o_w - o_l),    NLL_w = -a_w

NLL_w is over the completion. In TRL 1.16 it is over prompt and completion, which also trains the model on the question,
and is a mean over all tokens of a micro-batch, so it depends on the split into micro-batches.
The five choices: no ratio; no clip; no KL and no reference; advantage = recorded reward (+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.pairs import Settings, read
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
    """Settings of [algo] for orpo."""

    beta: float = 0.1
    """Factor of the odds-ratio term (lambda in the paper)."""


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"odds ratio without a reference, {cfg.beta:g} x, NLL of the chosen side, mean over pairs"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and TRL's reward metrics. logprobs: [T] with gradient."""
    pairs = read(logprobs, batch)
    nll = -pairs.chosen.mean
    log_odds = odds(pairs.chosen.mean) - odds(pairs.rejected.mean)
    ratio = F.logsigmoid(log_odds)
    stats = pairs.stats(cfg.beta * pairs.chosen.mean, cfg.beta * pairs.rejected.mean) | {
        "nll_loss": Stat.mean(nll, pairs.real),
        "log_odds_ratio": Stat.mean(ratio, pairs.real),
        "log_odds_chosen": Stat.mean(log_odds, pairs.real),
    }
    return pairs.total(nll - cfg.beta * ratio), stats


def odds(a: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of a log-prob a <= 0, any shape.

    log(1 - e^a) is computed as log(-expm1(a)), which does not cancel near a = 0.
    """
    a = a.clamp(max=-1e-6)  # at p = 1 the odds are infinite
    return a - (-a.expm1()).log()
