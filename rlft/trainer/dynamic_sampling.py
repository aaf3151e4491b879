"""Dynamic sampling (DAPO, arXiv 2503.14476): replace groups of equal rewards, which carry no learning signal.

A group is kept when two of its valid rewards differ (max != min, rather than a threshold on the std). Each round asks
for as many prompts as the share of kept groups so far suggests, at most a full step's. Kept groups stay in sampling
order, and the surplus is dropped. After the last round the step trains on the groups it has. Sampling and scoring are
done by the caller's `draw`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlft.batch import group_ids
from rlft.errors import TrainError
from rlft.types import Rollout


@dataclass(frozen=True)
class SampledGroups:
    """Complete groups of rollouts with their scores."""

    rollouts: list[Rollout]
    rewards: Tensor
    """[N] float32, nan where invalid."""
    decides: Tensor
    """[N] float: the values that must differ within a group for it to be kept; nan where invalid."""
    parts: list[Any]
    """The reward breakdown of each round (rlft.rewards.parts.RewardBreakdown)."""
    kept: tuple[bool, ...]
    """One flag per rollout: False for a group that was dropped or was surplus."""
    rounds: int = 0
    """Replacement rounds that were run."""

    def metrics(self, want: int) -> dict[str, float]:
        """Return dynamic_sampling/*: rounds, groups sampled, groups kept, and groups missing after the last round.

        want: groups of a full step.
        """
        groups = group_ids(self.rollouts)
        count = len(set(groups[torch.tensor(self.kept)].tolist()))
        return {
            "dynamic_sampling/rounds": float(self.rounds),
            "dynamic_sampling/drawn": float(len(set(groups.tolist()))),
            "dynamic_sampling/kept": float(count),
            "dynamic_sampling/short": float(want - count),
        }


def varied(decides: Tensor, groups: Tensor) -> list[int]:
    """Return the groups in which two values differ, in order. decides: [N], nan = invalid. groups: [N] int64."""
    informative = []
    for group in dict.fromkeys(groups.tolist()):
        values = decides[groups == group]
        values = values[~values.isnan()]
        if len(values) and values.max() != values.min():
            informative.append(group)
    return informative


def solved(sample: SampledGroups, share: float, threshold: float) -> set[int]:
    """Return the data rows whose group is solved: at least `share` of its valid values are at least `threshold`."""
    groups, indices = group_ids(sample.rollouts), set()
    for group in dict.fromkeys(groups.tolist()):
        rows = groups == group
        values = sample.decides[rows]
        values = values[~values.isnan()]
        # A single division, so that 7 of 10 equals the 0.7 of a config exactly.
        if len(values) and int((values >= threshold).sum()) / len(values) >= share:
            indices.add(sample.rollouts[int(rows.nonzero()[0])].prompt.index)
    return indices


def replace_uninformative(
    first: SampledGroups, draw: Callable[[int, int], SampledGroups], want: int, rounds: int
) -> SampledGroups:
    """Sample up to `rounds` more times until `want` groups are kept; with rounds = 0 return `first`.

    draw: (number of prompts, round from 1) -> SampledGroups, called once per round. Raises TrainError when no group is
    left after the last round.
    """
    if not rounds:
        return first
    sample = first
    informative = varied(first.decides, group_ids(first.rollouts))
    round_, sampled = 0, want
    while len(informative) < want and round_ < rounds:
        round_ += 1
        missing = want - len(informative)
        request = want if not informative else min(want, math.ceil(missing * sampled / len(informative)))
        sampled += request
        sample = _join(sample, draw(request, round_))
        informative = varied(sample.decides, group_ids(sample.rollouts))
    if not informative:
        raise TrainError(
            f"dynamic sampling: every one of {sampled} groups has equal rewards after "
            f"dynamic_sampling.rounds = {rounds} rounds, so there is nothing to learn from; use tasks "
            f"that are solved now and then, or raise sampling.group_size"
        )
    selected = set(informative[:want])
    flags = tuple(group in selected for group in group_ids(sample.rollouts).tolist())
    return SampledGroups(sample.rollouts, sample.rewards, sample.decides, sample.parts, flags, round_)


def _join(first: SampledGroups, second: SampledGroups) -> SampledGroups:
    return SampledGroups(
        first.rollouts + second.rollouts,
        torch.cat([first.rewards, second.rewards]),
        torch.cat([first.decides, second.decides]),
        first.parts + second.parts,
        first.kept + second.kept,
    )


def kept_rollouts(sample: SampledGroups) -> tuple[list[Rollout], Tensor]:
    """Return the kept rollouts and their rewards."""
    rollouts = [rollout for rollout, is_kept in zip(sample.rollouts, sample.kept, strict=True) if is_kept]
    return rollouts, sample.rewards[torch.tensor(sample.kept)]


def spread_back(sample: SampledGroups, values: Sequence[float]) -> list[float]:
    """Spread `values`, one per kept rollout, over all rollouts of the sample, with nan for the dropped ones."""
    remaining = iter(values)
    return [next(remaining) if is_kept else math.nan for is_kept in sample.kept]
