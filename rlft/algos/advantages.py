"""Advantage estimators: how much better a completion is than its group, or than the batch.

Every estimator takes rewards [N] (float, nan = invalid) and group_ids [N] int64, optional keyword arguments (lengths
[N], trained tokens; parts [N, K], each reward function's values, and weights [K]), and returns advantages [N] float32.
"Over the batch" means over the whole step on all ranks.

Invalid rewards are excluded from all statistics and get advantage 0. An incomplete group is compared over its valid
rewards, and gets 0 with fewer than two of them. Truncated completions that the loss masks (overlong.mask) stay in the
statistics. Groups of equal rewards get exactly 0, decided by max == min, since dividing by a tiny std would amplify
float noise.

Legend: g the statistics of each rollout's group.

    group_norm         (R - mean) / (std + 1e-4), unbiased std           GRPO 2402.03300, eps as TRL's
    group_mean         R - mean                                          Dr. GRPO 2503.20783
    leave_one_out      R - mean of the others                            RLOO 2402.14740
    batch_std          (R - mean) / (std over the batch + 1e-4)          "lite PPO" 2508.08221, ScaleRL 2510.13786
    max_rl             (R - mean) / mean, R >= 0                         MaxRL 2602.02710
    opo                R - mean weighted by length                       OPO 2505.23585
    gdpo               sum_k w_k group_norm(R_k), over its batch std     GDPO 2601.05242
    reinforce_plus_plus, reinforce_plus_plus_baseline                    2501.03262
                       R, or R - mean, whitened over all tokens of the batch
    best_and_worst     +1 for a group's best, -1 for its worst, else 0   pairs for online DPO
    identity           R                                                 SFT (1), DPO (+1, -1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlft.errors import RewardError

EPS = 1e-4
"""Added to a std, as in TRL."""


class Groups(NamedTuple):
    """Statistics of each rollout's group over its valid rewards, all [N] float64."""

    size: Tensor
    mean: Tensor
    std: Tensor
    """Unbiased; 0 for a group of one."""
    equal: Tensor
    """bool: all valid rewards of the group are equal, or this rollout's is invalid."""


def group_statistics(rewards: Tensor, group_ids: Tensor) -> Groups:
    """Compute size, mean, std and equality of the valid rewards of each rollout's group."""
    valid = ~rewards.isnan()
    values = torch.where(valid, rewards, 0).double()
    size = _per_group(valid.double(), group_ids)
    mean = _per_group(values, group_ids) / size.clamp(min=1)
    squares = _per_group(torch.where(valid, (values - mean) ** 2, 0), group_ids)
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    inf = torch.full((_groups(group_ids),), float("inf"), dtype=torch.float64)
    low = inf.scatter_reduce(0, group_ids, torch.where(valid, values, float("inf")), "amin")
    high = (-inf).scatter_reduce(0, group_ids, torch.where(valid, values, float("-inf")), "amax")
    return Groups(size, mean, std, (high <= low)[group_ids] | ~valid)


def _groups(group_ids: Tensor) -> int:
    return int(group_ids.max()) + 1 if len(group_ids) else 0


def _per_group(values: Tensor, group_ids: Tensor) -> Tensor:
    """Sum `values` over each rollout's group, [N]."""
    sums = torch.zeros(_groups(group_ids), dtype=torch.float64).index_add(0, group_ids, values)
    return sums[group_ids]


def group_mean(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Return the reward minus the mean of its group.

    >>> group_mean(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))
    tensor([ 0.5000, -0.5000,  0.0000])
    """
    g = group_statistics(rewards, group_ids)
    return torch.where(g.equal, 0, rewards - g.mean).float()


def group_norm(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Return the reward minus the mean of its group, divided by the group's unbiased std + 1e-4.

    >>> group_norm(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    tensor([ 0.7070, -0.7070])
    """
    g = group_statistics(rewards, group_ids)
    return torch.where(g.equal, 0, (rewards - g.mean) / (g.std + EPS)).float()


def leave_one_out(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Return the reward minus the mean of the others in its group, G / (G - 1) times `group_mean`.

    >>> leave_one_out(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 0, 0]))
    tensor([ 1.0000, -0.5000, -0.5000])
    """
    g = group_statistics(rewards, group_ids)
    return torch.where(g.equal, 0, (rewards - g.mean) * g.size / (g.size - 1).clamp(min=1)).float()


def batch_std(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Return the reward minus its group's mean, divided by the unbiased std of all rewards of the batch + 1e-4."""
    g = group_statistics(rewards, group_ids)
    _, std = _mean_and_std(rewards.double(), (~rewards.isnan()).double(), unbiased=True)
    return torch.where(g.equal, 0, (rewards - g.mean) / (std + EPS)).float()


def max_rl(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Return (reward - mean) / mean of its group, which maximises the likelihood of success.

    A group of mean 0 gets 0. Raises RewardError for a negative reward, with which the mean could have any sign.

    >>> max_rl(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 0]))
    tensor([ 3., -1., -1., -1.])
    """
    low = float(torch.where(rewards.isnan(), 0, rewards).min()) if len(rewards) else 0.0
    if low < 0:
        raise RewardError(
            f'algo.advantage = "max_rl": a reward is {low:g}, and it divides by the mean of a group; give rewards of '
            f"0 or more (no overlong penalty), or take another estimator"
        )
    g = group_statistics(rewards, group_ids)
    return torch.where(g.equal, 0, (rewards - g.mean) / g.mean).float()


def opo(rewards: Tensor, group_ids: Tensor, lengths: Tensor) -> Tensor:
    """Return the reward minus its group's length-weighted mean, the baseline of least variance for equal token weights.

    >>> opo(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), torch.tensor([3, 1]))
    tensor([ 0.2500, -0.7500])
    """
    g = group_statistics(rewards, group_ids)
    weight = torch.where(rewards.isnan(), 0, lengths).double()
    total = _per_group(weight, group_ids)
    mean = _per_group(torch.where(weight > 0, rewards * weight, 0).double(), group_ids) / total.clamp(min=1)
    return torch.where(g.equal, 0, rewards - torch.where(total > 0, mean, g.mean)).float()


def gdpo(rewards: Tensor, group_ids: Tensor, parts: Tensor, weights: Tensor) -> Tensor:
    """Normalise each reward function within its group, sum with the weights, and divide by the batch's std."""
    valid = ~rewards.isnan()
    # Rewards are fp32: differences below that precision are rounding.
    values = torch.where(valid[:, None], parts.float().double(), torch.nan)
    each = [group_norm(values[:, k], group_ids).double() * weights[k] for k in range(values.shape[1])]
    total = torch.stack(each, 1).sum(1) if each else torch.zeros(len(rewards), dtype=torch.float64)
    # The mean is 0, since each function's values sum to 0 over their group.
    _, std = _mean_and_std(total, valid.double(), unbiased=True)
    return torch.where(valid, total / (std + EPS), 0).float()


def reinforce_plus_plus(rewards: Tensor, group_ids: Tensor, lengths: Tensor) -> Tensor:
    """Return (reward - mean) / std, both over all trained tokens of the batch."""
    return _whiten(rewards.double(), ~rewards.isnan(), lengths)


def reinforce_plus_plus_baseline(rewards: Tensor, group_ids: Tensor, lengths: Tensor) -> Tensor:
    """Return `group_mean` whitened over all trained tokens of the batch.

    A group of equal rewards enters the statistics as 0 and stays 0; in the paper it gets the negative mean.
    """
    g = group_statistics(rewards, group_ids)
    advantages = _whiten(torch.where(g.equal, 0, rewards - g.mean), ~rewards.isnan(), lengths)
    return torch.where(g.equal, 0, advantages)


def best_and_worst(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Return +1 for the first best and -1 for the first worst of each group, 0 for the others and for equal groups.

    >>> best_and_worst(torch.tensor([0.5, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 0]))
    tensor([ 0.,  1., -1.,  0.])
    """
    advantages = torch.zeros(len(rewards))
    equal = group_statistics(rewards, group_ids).equal
    for group in set(group_ids.tolist()):
        rows = ((group_ids == group) & ~equal).nonzero().flatten()
        if len(rows):
            advantages[rows[rewards[rows].argmax()]] = 1.0
            advantages[rows[rewards[rows].argmin()]] = -1.0
    return advantages


def identity(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Return the reward itself: SFT (reward 1), DPO (+1, -1), plain REINFORCE.

    >>> identity(torch.tensor([1.0, float("nan")]), torch.tensor([0, 0]))
    tensor([1., 0.])
    """
    return torch.where(rewards.isnan(), 0, rewards).float()


def _mean_and_std(values: Tensor, weight: Tensor, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Return mean and std (0-dim) of `values` [N] float64, each counted `weight` times.

    Values of weight 0 may be nan and are ignored.
    """
    values = torch.where(weight > 0, values, 0)
    count = weight.sum()
    mean = (weight * values).sum() / count.clamp(min=1)
    squares = (weight * (values - mean) ** 2).sum()
    return mean, (squares / (count - int(unbiased)).clamp(min=1)).sqrt()


def _whiten(values: Tensor, valid: Tensor, lengths: Tensor) -> Tensor:
    """Return (value - mean) / std over all trained tokens of the batch; exactly 0 where all values are equal."""
    ends = torch.where(valid, torch.stack([values, -values]), -torch.inf)
    high, low = torch.cat([ends, torch.full((2, 1), -torch.inf, dtype=torch.float64)], 1).amax(1)
    if high <= -low:
        return torch.zeros(len(values))
    mean, std = _mean_and_std(values, torch.where(valid, lengths, 0).double())
    return torch.where(valid, (values - mean) / (std + 1e-8), 0).float()


def reward_std(rewards: Tensor) -> float:
    """Return TRL's `reward_std`: unbiased std of all valid rewards of the step; 0 for one, nan for none."""
    valid = rewards[~rewards.isnan()].double()
    if not len(valid):
        return float("nan")
    return float(valid.std()) if len(valid) > 1 else 0.0


def frac_zero_std(rewards: Tensor, group_ids: Tensor) -> float:
    """Return TRL's `frac_reward_zero_std`: share of groups whose valid rewards are all equal.

    Groups without a valid reward are excluded; nan when no group has one.
    """
    valid: dict[int, set[float]] = {}
    for group, reward in zip(group_ids.tolist(), rewards.tolist(), strict=True):
        if reward == reward:  # not nan
            valid.setdefault(group, set()).add(reward)
    return sum(len(values) == 1 for values in valid.values()) / len(valid) if valid else float("nan")


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "batch_std": batch_std,
    "best_and_worst": best_and_worst,
    "gdpo": gdpo,
    "group_mean": group_mean,
    "group_norm": group_norm,
    "identity": identity,
    "leave_one_out": leave_one_out,
    "max_rl": max_rl,
    "opo": opo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}
"""Name -> estimator in this file."""
WITHIN_GROUPS = tuple(name for name in ESTIMATORS if name not in ("identity", "reinforce_plus_plus"))
"""Estimators that compare the completions of a prompt, so that a group of one has advantage 0."""
