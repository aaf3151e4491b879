"""Direct preference optimisation (DPO, 2305.18290): a logistic loss on the margin between the two sides of a pair.

    D = (logprob - ref_logprob summed over the chosen side) - (the same over the rejected side)
    loss = -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D),    e = label_smoothing (cDPO)

With a new adapter D = 0 and the first loss is ln 2 = 0.69315. The reference is the base, or the adapter that training
started from. Online DPO (2402.04792) uses this loss on the best and worst completion of each sampled group: preset
`online_dpo`. The five choices: log-ratio per sequence against the reference; no clip; KL implied by beta; advantage =
recorded reward (+1, -1); mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlft.algos.pairs import Settings, check_smoothing, read
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
    """Settings of [algo] for dpo."""

    label_smoothing: float = 0.0
    """Assumed share of wrong labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing)


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"log-ratio per sequence against the reference, no clip, beta {cfg.beta:g}, mean over pairs"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and TRL's reward metrics. logprobs: [T] with gradient."""
    assert batch.ref_logprobs is not None
    pairs = read(logprobs, batch)
    logit, e = cfg.beta * pairs.margin, cfg.label_smoothing
    value = -(1 - e) * F.logsigmoid(logit) - e * F.logsigmoid(-logit)
    return pairs.total(value), pairs.gain_stats(cfg.beta)
