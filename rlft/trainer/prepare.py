"""Compute numbers over a whole step or update before it runs, in passes without gradient.

Per step: the KL in the reward, before advantages are estimated. Per update, under its initial policy: what `prepare` of
a loss asks for (an entropy quantile, the baseline of KTO).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlft.algos.algorithm import Algorithm
from rlft.algos.kl import difference, k3
from rlft.batch import count, pack, segment_sum
from rlft.dist import gather_tensor, sum_tensor
from rlft.models.policy import Policy
from rlft.rewards.parts import RewardBreakdown
from rlft.types import Batch, PackPlan, Rollout, Stat, Stats


@dataclass(frozen=True)
class PackedStep:
    """Implementation of `rlft.types.StepView`: what `prepare` of a loss may ask about an update."""

    policy: Policy
    plan: PackPlan
    rollouts: Sequence[Rollout]
    """Rollouts of the update that are in the loss."""
    batches: Sequence[Batch]
    """All micro-batches of the update, including those that are not run."""
    adapted: Mapping[str, float] = field(default_factory=dict)
    """The numbers of the loss's `adapt` after the last step; empty in an evaluation."""

    def entropy_quantile(self, share: float) -> float:
        """Return the interpolated `share` quantile of the entropy of trained tokens over all ranks, in nats."""
        entropies = [self.policy.entropy(batch).double().cpu()[batch.train_mask] for batch in self.batches]
        values = gather_tensor(torch.cat(entropies) if entropies else torch.zeros(0, dtype=torch.float64)).sort().values
        if not len(values):
            return 0.0
        # torch.quantile refuses more than 16 million values.
        place = share * (len(values) - 1)
        low = values[int(place)]
        return float(low + (values[min(int(place) + 1, len(values) - 1)] - low) * (place - int(place)))

    def log_ratios(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return log(policy / reference) of each completion, [N] float64, summed over its tokens."""
        ratios = torch.zeros(len(rollouts), dtype=torch.float64)
        for batch in _packed(rollouts, self.plan):
            differences = self.policy.score(batch) - self.policy.score(batch, weights="reference")
            _into(ratios, differences, batch)
        return ratios

    def sum(self, values: Tensor) -> Tensor:
        """Return `values` summed over ranks."""
        return sum_tensor(values)


def _packed(rollouts: Sequence[Rollout], plan: PackPlan) -> list[Batch]:
    plan = replace(plan, keep=(True,) * len(rollouts), whole_groups=False)
    return pack(rollouts, torch.zeros(len(rollouts)), plan, count(rollouts, plan))


def _into(sums: Tensor, values: Tensor, batch: Batch) -> None:
    """Sum `values` [T] over the trained tokens of each rollout, and write the sum to its row of `sums` [N]."""
    values = torch.where(batch.train_mask, values.double().cpu(), 0)
    segment_sums = segment_sum(values, batch.seq_ids, len(batch.prefix))
    sums[list(batch.rows)] = segment_sums[batch.group_ids >= 0]


def kl_in_reward(
    policy: Policy, algorithm: Algorithm, plan: PackPlan, rollouts: Sequence[Rollout], rewards: Tensor
) -> tuple[Tensor, Stats]:
    """Subtract kl_coef times the sum of k1 over each completion from its reward, if `kl = "reward"`.

    Returns the rewards and the stats of the KL per token. rewards: [N]; nan stays nan.
    """
    kl_coef = algorithm.loss.kl_in_reward
    if not kl_coef:
        return rewards, {}
    k1 = torch.zeros(len(rollouts), dtype=torch.float64)
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in _packed(rollouts, plan):
        differences = difference(policy.score(batch), policy.score(batch, weights="reference")).double().cpu()
        _into(k1, differences, batch)
        differences = differences[batch.train_mask]
        sums += torch.stack([differences.sum(), k3(differences).sum(), torch.tensor(float(len(differences)))])
    stats = {"kl": Stat("mean", sums[1], sums[2]), "kl/k1": Stat("mean", sums[0], sums[2])}
    return (rewards.double() - kl_coef * k1).float(), stats


def estimator_inputs(
    rollouts: Sequence[Rollout], parts: RewardBreakdown, weights: dict[str, float], kept: Sequence[bool]
) -> dict[str, Tensor]:
    """Return the optional arguments of estimators: lengths [N] int64, parts [N, K] and weights [K] float64.

    rollouts: the kept ones. weights: of each reward function. kept: one flag per rollout in `parts`.
    """
    rows = torch.tensor(kept)
    columns = [torch.tensor(parts.outcomes[name].values, dtype=torch.float64)[rows] for name in weights]
    return {
        "lengths": torch.tensor([int(rollout.trained.sum()) for rollout in rollouts]),
        "parts": torch.stack(columns, 1) if columns else torch.zeros(len(rollouts), 0, dtype=torch.float64),
        "weights": torch.tensor(list(weights.values()), dtype=torch.float64),
    }
