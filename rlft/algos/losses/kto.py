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
from typing import ClassVar

import torch
from torch import Tensor

from rlft.algos.checks import check_above_zero
from rlft.algos.loss import Loss
from rlft.algos.pairs import CLAMP
from rlft.batch import group_ids, segment_sum
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Rollout, Stat, Stats, StepInputs, StepView


@dataclass(frozen=True)
class Kto(Loss):
    """Kahneman-Tversky optimisation of single completions."""

    aggregation: ClassVar[Aggregation] = "sequence_mean"
    needs_reference: ClassVar[bool] = True
    zero_adv_zero_grad: ClassVar[bool] = True

    advantage: str = "identity"
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

    def summary(self) -> str:
        return f"log-ratio per sequence against the reference and z0, no clip, beta {self.beta:g}"

    def prepare(self, view: StepView) -> StepInputs:
        """Return z0 of the update under its initial policy."""
        gains = view.log_ratios(mismatched(view.rollouts)) if view.rollouts else torch.zeros(0, dtype=torch.float64)
        return StepInputs(z0=max(0.0, float(gains.sum()) / max(1, len(gains))))

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        z0 = batch.inputs.z0
        assert batch.ref_logprobs is not None and z0 is not None
        used = batch.train_mask & (batch.weight != 0)
        now = torch.where(used, logprobs, 0)
        gain = (now - torch.where(used, batch.ref_logprobs, 0)).clamp(-CLAMP, CLAMP)
        sequences = len(batch.prefix)
        g = segment_sum(gain, batch.seq_ids, sequences)
        side = segment_sum(torch.where(used, batch.advantages, 0), batch.seq_ids, sequences).sign()
        good, bad = side > 0, side < 0
        value = torch.where(good, self.desirable_weight * (1 - torch.sigmoid(self.beta * (g - z0))), 0)
        value = value + torch.where(bad, self.undesirable_weight * (1 - torch.sigmoid(self.beta * (z0 - g))), 0)
        total = segment_sum(now.detach(), batch.seq_ids, sequences)
        stats = {"kl": Stat("mean", z0)}
        for name, rows in (("chosen", good), ("rejected", bad)):
            stats |= {f"rewards/{name}": Stat.mean(self.beta * g, rows), f"logps/{name}": Stat.mean(total, rows)}
        # The token weights of a sequence sum to its weight: 1 / sequences under the mean over sequences.
        return (value[batch.seq_ids] * batch.weight).sum(), stats


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
                    routes=None,  # the engine never sampled this completion behind this prompt
                )
            )
    return pairs
