"""Compute numbers over a whole step or update before it runs, in passes without gradient.

Per step: the KL in the reward, before advantages are estimated. Per update, under its initial policy: what `prepare`
of a loss file asks for (an entropy quantile, the baseline of KTO). Micro-batches are dealt out to the ranks, and every
rank gets all results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlft import dist
from rlft.algos.algorithm import Algorithm
from rlft.algos.kl import difference, k3
from rlft.batch import group_numbers, pack_all, samples_of, segment_sum
from rlft.models.policy import Policy
from rlft.types import Batch, Group, PackPlan, Rollout, Sample, Stat, Stats


@dataclass(frozen=True)
class PackedStep:
    """Implementation of `rlft.types.StepView`: what `prepare` of a loss may ask about an update."""

    policy: Policy
    plan: PackPlan
    rollouts: Sequence[Rollout]
    """Rollouts of the update that are in the loss."""
    batches: Sequence[Batch]
    """All micro-batches of the update and of all ranks, including those that are not run."""
    adapted: Mapping[str, float] = field(default_factory=dict)
    """The numbers of the loss's `adapt` after the last step; empty in an evaluation."""

    def entropy_quantile(self, share: float) -> float:
        """Return the interpolated `share` quantile of the entropy of trained tokens over all ranks, in nats."""
        entropies = [self.policy.entropy(batch).double().cpu()[batch.train_mask] for batch in dealt(self.batches)]
        own = torch.cat(entropies) if entropies else torch.zeros(0, dtype=torch.float64)
        values = dist.gather_tensor(own).sort().values
        if not len(values):
            return 0.0
        # torch.quantile refuses more than 16 million values.
        place = share * (len(values) - 1)
        low = values[int(place)]
        return float(low + (values[min(int(place) + 1, len(values) - 1)] - low) * (place - int(place)))

    def log_ratios(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return log(policy / reference) of each completion, [N] float64, summed over its tokens."""

        def difference_of(batch: Batch) -> Tensor:
            return self.policy.score(batch) - self.policy.score(batch, weights="reference")

        return per_completion(rollouts, self.plan, difference_of)


def dealt(batches: Sequence[Batch]) -> list[Batch]:
    """Return the micro-batches that this rank computes."""
    return [batches[i] for i in dist.deal([len(batch.input_ids) for batch in batches])]


def per_completion(rollouts: Sequence[Rollout], plan: PackPlan, values_of: Callable[[Batch], Tensor]) -> Tensor:
    """Sum a value per token over each completion's trained tokens, [N] float64. values_of: micro-batch -> [T].

    Called with the micro-batches of this rank; all ranks get all sums.
    """
    sums = {id(rollout): 0.0 for rollout in rollouts}
    for batch in dealt(pack_all(rollouts, plan)):
        values = torch.where(batch.train_mask, values_of(batch).double().cpu(), 0)
        of_sequences = segment_sum(values, batch.seq_ids, len(batch.prefix))[batch.group_ids >= 0]
        sums |= zip((id(sample.rollout) for sample in batch.samples), of_sequences.tolist(), strict=True)
    # A completion is on one rank, so the sum over ranks adds zeros to its own.
    return dist.sum_tensor(torch.tensor([sums[id(rollout)] for rollout in rollouts], dtype=torch.float64))


def kl_in_reward(
    policy: Policy, algorithm: Algorithm, plan: PackPlan, samples: Sequence[Sample]
) -> tuple[Tensor, Stats]:
    """Return the rewards less kl_coef times the sum of k1 over each completion, if `kl = "reward"`.

    Returns [N] float32, nan where invalid, and the stats of the KL per token.
    """
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float32)
    kl_coef = algorithm.loss.kl_in_reward
    if not kl_coef:
        return rewards, {}
    sums = torch.zeros(3, dtype=torch.float64)

    def k1_of(batch: Batch) -> Tensor:
        differences = difference(policy.score(batch), policy.score(batch, weights="reference")).double().cpu()
        trained = differences[batch.train_mask]
        sums.add_(torch.stack([trained.sum(), k3(trained).sum(), torch.tensor(float(len(trained)))]))
        return differences

    k1 = per_completion([sample.rollout for sample in samples], plan, k1_of)
    stats = {"kl": Stat("mean", sums[1], sums[2]), "kl/k1": Stat("mean", sums[0], sums[2])}
    return (rewards.double() - kl_coef * k1).float(), stats


def estimator_inputs(samples: Sequence[Sample], weights: dict[str, float]) -> dict[str, Tensor]:
    """Return the optional arguments of estimators: lengths [N] int64, parts [N, K] and weights [K] float64.

    weights: of each reward function.
    """
    columns = [
        torch.tensor([sample.outcomes[name].value for sample in samples], dtype=torch.float64) for name in weights
    ]
    return {
        "lengths": torch.tensor([int(sample.rollout.trained.sum()) for sample in samples]),
        "parts": torch.stack(columns, 1) if columns else torch.zeros(len(samples), 0, dtype=torch.float64),
        "weights": torch.tensor(list(weights.values()), dtype=torch.float64),
    }


def assign_advantages(
    policy: Policy, algorithm: Algorithm, plan: PackPlan, groups: Sequence[Group], weights: dict[str, float]
) -> Stats:
    """Estimate the advantage of every sample, and return the stats of a KL in the reward.

    weights: of each reward function. Raises RewardError and ConfigError as the estimator does.
    """
    samples = samples_of(groups)
    rewards, stats = kl_in_reward(policy, algorithm, plan, samples)
    advantages = algorithm.advantage(rewards, group_numbers(groups), **estimator_inputs(samples, weights))
    for sample, advantage in zip(samples, advantages.tolist(), strict=True):
        sample.advantage = advantage
    return stats
