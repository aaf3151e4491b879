"""What an estimator makes of rewards: how much better a completion was than its group.

Every estimator takes rewards [N] (float, nan = invalid) and group_ids [N] int64 and returns advantages [N] float32.
Invalid rewards are left out of the statistics and get advantage 0. A group whose rewards are all equal gets exactly 0,
decided by max == min and not by a small std, which float noise would blow up.

Sources: group_norm GRPO (2402.03300) with TRL's unbiased std and eps; group_mean Dr. GRPO (2503.20783); leave_one_out
RLOO (2402.14740).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Statistics of each rollout's group over its valid rewards, all [N] float64."""

    size: Tensor
    mean: Tensor
    std: Tensor
    """Unbiased; 0 for a group of one."""
    equal: Tensor
    """bool: all valid rewards of the group are equal, or the own one is invalid."""


def group_statistics(rewards: Tensor, group_ids: Tensor) -> Groups:
    """Size, mean, std and equality of the valid rewards of each rollout's group."""
    valid = ~rewards.isnan()
    values = torch.where(valid, rewards, 0).double()
    groups = int(group_ids.max()) + 1 if len(group_ids) else 0

    def total(x: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float64).index_add(0, group_ids, x)

    size = total(valid.double())
    mean = total(values) / size.clamp(min=1)
    squares = total(torch.where(valid, (values - mean[group_ids]) ** 2, 0))
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    inf = torch.full((groups,), float("inf"), dtype=torch.float64)
    low = inf.scatter_reduce(0, group_ids, torch.where(valid, values, float("inf")), "amin")
    high = (-inf).scatter_reduce(0, group_ids, torch.where(valid, values, float("-inf")), "amax")
    equal = (high <= low)[group_ids] | ~valid
    return Groups(size[group_ids], mean[group_ids], std[group_ids], equal)


def group_mean(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Reward minus the mean of its group.

    >>> group_mean(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))
    tensor([ 0.5000, -0.5000,  0.0000])
    """
    g = group_statistics(rewards, group_ids)
    return torch.where(g.equal, 0, rewards - g.mean).float()


def group_norm(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Reward minus the mean of its group, over the group's unbiased std + 1e-4.

    >>> group_norm(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    tensor([ 0.7070, -0.7070])
    """
    g = group_statistics(rewards, group_ids)
    return torch.where(g.equal, 0, (rewards - g.mean) / (g.std + 1e-4)).float()


def leave_one_out(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Reward minus the mean of the others of its group, G / (G - 1) times `group_mean`.

    >>> leave_one_out(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 0, 0]))
    tensor([ 1.0000, -0.5000, -0.5000])
    """
    g = group_statistics(rewards, group_ids)
    return torch.where(g.equal, 0, (rewards - g.mean) * g.size / (g.size - 1).clamp(min=1)).float()


def reward_std(rewards: Tensor) -> float:
    """TRL's `reward_std`: unbiased std of all valid rewards of the step, 0 for one, nan when none is valid."""
    valid = rewards[~rewards.isnan()].double()
    if not len(valid):
        return float("nan")
    return float(valid.std()) if len(valid) > 1 else 0.0


def frac_zero_std(rewards: Tensor, group_ids: Tensor) -> float:
    """TRL's `frac_reward_zero_std`: share of groups whose valid rewards are all equal, so that nothing is learnt from
    them. Groups without a valid reward are left out; nan when there is no other."""
    valid: dict[int, set[float]] = {}
    for group, reward in zip(group_ids.tolist(), rewards.tolist(), strict=True):
        if reward == reward:  # not nan
            valid.setdefault(group, set()).add(reward)
    return sum(len(values) == 1 for values in valid.values()) / len(valid) if valid else float("nan")


def identity(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """The reward itself: SFT (reward 1), DPO (+1, -1), plain REINFORCE.

    >>> identity(torch.tensor([1.0, float("nan")]), torch.tensor([0, 0]))
    tensor([1., 0.])
    """
    return torch.where(rewards.isnan(), 0, rewards).float()
