"""Kahneman-Tversky optimisation (KTO, 2402.01306): a loss on completions labelled good or bad, without pairs.

    g = logprob - ref_logprob summed over the completion
    loss of a desirable completion   = desirable_weight   (1 - sigmoid(beta (g - z0)))
    loss of an undesirable one       = undesirable_weight (1 - sigmoid(beta (z0 - g)))
    z0 = max(0, mean of g over completions paired with another row's prompt), per update over all ranks, no gradient

z0 estimates the KL of the current policy from the reference, as in the paper. It is recomputed before every update of a
step (`optim.minibatches`, `optim.passes`), over all completions of the update. TRL 1.16 computes it per micro-batch
(over ranks), which is noisier and depends on the size of a micro-batch. The sign of the advantage marks a completion as
good or bad: recorded rewards +1 and -1 (pairs, or rows with a column `label`), or rewards of sampled completions. Keep
desirable_weight x good rows / (undesirable_weight x bad rows) between 1 and 4/3.
The five choices: log-ratio per sequence against the reference; no clip; KL in z0; advantage = sign of the reward; mean
over sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlft.algos.pairs import CLAMP, check_above_zero
from rlft.batch import group_ids, segment_sum
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Rollout, Stat, Stats, StepView

ADVANTAGE = "identity"
AGGREGATION: Aggregation = "sequence_mean"
RATIO = False
NEEDS_REFERENCE = True
WHOLE_GROUPS = False
NEEDS_SAMPLER = False
ZERO_ADV_ZERO_GRAD = True
ENTROPY_GRAD = False


@dataclass(frozen=True)
class Config:
    """Settings of [algo] for kto."""

    advantage: str = ADVANTAGE
    """Estimator whose sign marks a completion as good or bad: "identity" for recorded labels, "group_mean" for
    rewards."""
    beta: float = 0.1
    """Factor of the gain: small values let the policy move further from the reference."""
    desirable_weight: float = 1.0
    """Factor of the good completions."""
    undesirable_weight: float = 1.0
    """Factor of the bad completions."""

    def __post_init__(self) -> None:
        check_above_zero(
            beta=self.beta, desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight
        )


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"log-ratio per sequence against the reference and z0, no clip, beta {cfg.beta:g}"


def mismatched(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Pair each prompt with a completion of the next group, so that the two are unrelated.

    Raises ConfigError when there is only one group.
    """
    groups = group_ids(rollouts).tolist()
    by_group: dict[int, list[Rollout]] = {}
    for group, rollout in zip(groups, rollouts, strict=True):
        by_group.setdefault(group, []).append(rollout)
    if len(by_group) == 1:
        raise ConfigError(
            "an update of one prompt: kto compares completions with those behind another row's prompt; set "
            "prompts_per_step to at least twice optim.minibatches, and eval.rows to 2 or more"
        )
    pairs = []
    for group, members in by_group.items():
        others = by_group[(group + 1) % len(by_group)]
        for i, rollout in enumerate(members):
            other = others[i % len(others)]
            pairs.append(
                replace(
                    rollout,
                    completion_ids=other.completion_ids,
                    completion_mask=other.completion_mask,
                    sampler_logprobs=other.sampler_logprobs,
                    text=other.text,
                )
            )
    return pairs


def prepare(look: StepView, cfg: Config) -> dict[str, float]:
    """Return z0 of the update under its initial policy."""
    gains = look.log_ratios(mismatched(look.rollouts)) if look.rollouts else torch.zeros(0, dtype=torch.float64)
    total, count = look.sum(torch.stack([gains.sum(), torch.tensor(float(len(gains)), dtype=torch.float64)])).tolist()
    return {"z0": max(0.0, total / max(1.0, count))}


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and TRL's metrics. logprobs: [T] with gradient."""
    assert batch.ref_logprobs is not None
    z0 = batch.prepared["z0"]
    used = batch.train_mask & (batch.weight != 0)
    now = torch.where(used, logprobs, 0)
    gain = (now - torch.where(used, batch.ref_logprobs, 0)).clamp(-CLAMP, CLAMP)
    sequences = len(batch.prefix)
    g = segment_sum(gain, batch.seq_ids, sequences)
    side = segment_sum(torch.where(used, batch.advantages, 0), batch.seq_ids, sequences).sign()
    good, bad = side > 0, side < 0
    value = torch.where(good, cfg.desirable_weight * (1 - torch.sigmoid(cfg.beta * (g - z0))), 0)
    value = value + torch.where(bad, cfg.undesirable_weight * (1 - torch.sigmoid(cfg.beta * (z0 - g))), 0)
    total = segment_sum(now.detach(), batch.seq_ids, sequences)
    stats = {"kl": Stat("mean", z0)}
    for name, rows in (("chosen", good), ("rejected", bad)):
        stats |= {f"rewards/{name}": Stat.mean(cfg.beta * g, rows), f"logps/{name}": Stat.mean(total, rows)}
    # The token weights of a sequence sum to its weight: 1 / sequences under the mean over sequences.
    return (value[batch.seq_ids] * batch.weight).sum(), stats
