"""What a step or an update needs to know as a whole before it is made: passes without gradient over all of it.

Of a step: KL in the reward, before advantages are estimated. Of each update, by the policy that it starts from: what a
loss file's `prepare` asks for (an entropy quantile, the baseline of KTO).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """What `prepare` of a loss file may ask about an update; `rlft.types.StepView` is the contract."""

    policy: Policy
    plan: PackPlan
    rollouts: Sequence[Rollout]
    """Those of the update that are in the loss."""
    batches: Sequence[Batch]
    """All micro-batches of the update, those that are not run too."""

    def entropy_quantile(self, share: float) -> float:
        """Entropy that `share` of the update's trained tokens stay below, over all ranks, interpolated; in nats."""
        own = [self.policy.entropy(batch).double().cpu()[batch.train_mask] for batch in self.batches]
        values = gather_tensor(torch.cat(own) if own else torch.zeros(0, dtype=torch.float64)).sort().values
        if not len(values):
            return 0.0
        # torch.quantile refuses more than 16 million values.
        at = share * (len(values) - 1)
        low = values[int(at)]
        return float(low + (values[min(int(at) + 1, len(values) - 1)] - low) * (at - int(at)))

    def log_ratios(self, rollouts: Sequence[Rollout]) -> Tensor:
        """log of policy over reference of each completion given its prompt, [N] float64: the sum over its tokens."""
        found = torch.zeros(len(rollouts), dtype=torch.float64)
        for batch in _packed(rollouts, self.plan):
            d = self.policy.score(batch) - self.policy.score(batch, weights="reference")
            _into(found, d, batch)
        return found

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over ranks."""
        return sum_tensor(values)


def _packed(rollouts: Sequence[Rollout], plan: PackPlan) -> list[Batch]:
    plan = replace(plan, keep=(True,) * len(rollouts), whole_groups=False)
    return pack(rollouts, torch.zeros(len(rollouts)), plan, count(rollouts, plan))


def _into(found: Tensor, values: Tensor, batch: Batch) -> None:
    """Sums of `values` [T] over the trained tokens of each rollout, put at its place in `found` [N]."""
    values = torch.where(batch.train_mask, values.double().cpu(), 0)
    sums = segment_sum(values, batch.seq_ids, len(batch.prefix))
    found[list(batch.rows)] = sums[batch.group_ids >= 0]


def kl_in_reward(
    policy: Policy, algorithm: Algorithm, plan: PackPlan, rollouts: Sequence[Rollout], rewards: Tensor
) -> tuple[Tensor, Stats]:
    """The rewards less kl_coef times the sum of k1 over each completion, where the algorithm wants its KL there, and
    the KL per token as it is logged. rewards: [N], nan stays nan."""
    cfg = algorithm.config
    if getattr(cfg, "kl", None) != "reward" or not cfg.kl_coef:
        return rewards, {}
    k1 = torch.zeros(len(rollouts), dtype=torch.float64)
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in _packed(rollouts, plan):
        d = difference(policy.score(batch), policy.score(batch, weights="reference")).double().cpu()
        _into(k1, d, batch)
        d = d[batch.train_mask]
        sums += torch.stack([d.sum(), k3(d).sum(), torch.tensor(float(len(d)))])
    stats = {"kl": Stat("mean", sums[1], sums[2]), "kl/k1": Stat("mean", sums[0], sums[2])}
    return (rewards.double() - cfg.kl_coef * k1).float(), stats


def estimator_inputs(
    rollouts: Sequence[Rollout], parts: RewardBreakdown, weights: dict[str, float], kept: Sequence[bool]
) -> dict[str, Tensor]:
    """What estimators may ask for by name: lengths [N] int64, parts [N, K] and weights [K] float64, of kept rollouts.

    weights: of each reward function. kept: one flag per rollout that `parts` is about.
    """
    rows = torch.tensor(kept)
    columns = [torch.tensor(parts.outcomes[name].values, dtype=torch.float64)[rows] for name in weights]
    return {
        "lengths": torch.tensor([int(r.trained.sum()) for r in rollouts]),
        "parts": torch.stack(columns, 1) if columns else torch.zeros(len(rollouts), 0, dtype=torch.float64),
        "weights": torch.tensor(list(weights.values()), dtype=torch.float64),
    }
