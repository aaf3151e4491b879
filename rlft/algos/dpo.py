"""Direct preference optimisation (DPO, 2305.18290): a logistic loss on the margin between the two sides of a pair.

    D = (logprob - ref_logprob summed over the chosen side) - (the same over the rejected side)
    loss = sum over pairs of group_weight ( -log sigmoid(beta D) )

A group is a pair: the side with advantage > 0 is the chosen one. With a new adapter D = 0 and the first loss is ln 2 =
0.69315. The reference is the base, or the adapter that training started from.

The five choices: log-ratio per sequence against the reference; no clip; the KL is implied by beta; advantage = the
recorded reward, +1 and -1; mean over pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.batch import segment_sum
from rlft.errors import ConfigError
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
class Config:
    """Settings of [algo] for dpo."""

    beta: float = 0.1
    """How strongly the margin counts: small values let the policy move further from the reference."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"algo.beta = {self.beta}: want a number above 0")


def words(cfg: Config) -> str:
    """Ratio, clip, KL and correction in words, for the start of a run."""
    return f"log-ratio per sequence against the reference, no clip, beta {cfg.beta:g}, mean over pairs"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """The weighted sum of this file's formula, and TRL's reward metrics. logprobs: [T] with gradient."""
    assert batch.ref_logprobs is not None
    # A token of weight 0 may hold nan or inf: it is replaced before any arithmetic, so that no 0 * inf can follow.
    used = batch.train_mask & (batch.weight != 0)
    sequences, pairs = len(batch.prefix), len(batch.group_weight)
    gain = torch.where(used, logprobs, 0) - torch.where(used, batch.ref_logprobs, 0)
    side = segment_sum(torch.where(used, batch.advantages, 0), batch.seq_ids, sequences).sign()
    # A prefix belongs to no pair, a side without tokens has sign 0: neither adds anything, whatever its group.
    group = batch.group_ids.clamp(min=0)
    reward = cfg.beta * segment_sum(gain, batch.seq_ids, sequences)
    margin = segment_sum(side.to(reward.dtype) * reward, group, pairs)
    chosen, rejected = side > 0, side < 0
    total = segment_sum(torch.where(used, logprobs.detach(), 0), batch.seq_ids, sequences)
    every = torch.ones_like(margin, dtype=torch.bool)
    stats = {
        "rewards/chosen": Stat.mean(reward, chosen),
        "rewards/rejected": Stat.mean(reward, rejected),
        "rewards/margins": Stat.mean(margin, every),
        "rewards/accuracies": Stat.mean((margin > 0).float(), every),
        "logps/chosen": Stat.mean(total, chosen),
        "logps/rejected": Stat.mean(total, rejected),
    }
    return (-F.logsigmoid(margin) * batch.group_weight).sum(), stats
