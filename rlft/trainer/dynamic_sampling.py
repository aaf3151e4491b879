"""Dynamic sampling (DAPO, 2503.14476): groups of equal rewards teach nothing, so further prompts are drawn for them.

A group is kept when two of its valid rewards differ (max != min, never a small std). A round asks for as many prompts
as the share kept so far says are needed, at most a whole step's. Kept groups stay in the order they were drawn in, the
surplus is dropped. After the last round the step trains on the groups there are. Nothing here samples or scores: `draw`
does.
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
    """Whole groups that were sampled and scored."""

    rollouts: list[Rollout]
    rewards: Tensor
    """[N] float32, nan where invalid."""
    decides: Tensor
    """[N] float: the values that must differ within a group for it to be kept; nan where there is none."""
    parts: list[Any]
    """Of each round: the rewards taken apart (rlft.rewards.parts.Parts)."""
    kept: tuple[bool, ...]
    """One flag per rollout: False for a group that was dropped or is surplus."""
    rounds: int = 0
    """Rounds of replacing."""

    def metrics(self, want: int) -> dict[str, float]:
        """dynamic_sampling/*: rounds, groups drawn, groups kept, and groups missing at the bound. want: groups of a
        full step."""
        groups = group_ids(self.rollouts)
        kept = len(set(groups[torch.tensor(self.kept)].tolist()))
        return {
            "dynamic_sampling/rounds": float(self.rounds),
            "dynamic_sampling/drawn": float(len(set(groups.tolist()))),
            "dynamic_sampling/kept": float(kept),
            "dynamic_sampling/short": float(want - kept),
        }


def varied(decides: Tensor, groups: Tensor) -> list[int]:
    """Groups in which two values differ, in order. decides: [N], nan = none. groups: [N] int64."""
    found = []
    for group in dict.fromkeys(groups.tolist()):
        values = decides[groups == group]
        values = values[~values.isnan()]
        if len(values) and values.max() != values.min():
            found.append(group)
    return found


def solved(drawn: SampledGroups, share: float, threshold: float) -> set[int]:
    """Rows of the data whose group was solved: at least `share` of its valid values are at least `threshold`."""
    groups, found = group_ids(drawn.rollouts), set()
    for group in dict.fromkeys(groups.tolist()):
        rows = groups == group
        values = drawn.decides[rows]
        values = values[~values.isnan()]
        # Divided in one rounding, so that 7 of 10 is the 0.7 that a config says.
        if len(values) and int((values >= threshold).sum()) / len(values) >= share:
            found.add(drawn.rollouts[int(rows.nonzero()[0])].prompt.index)
    return found


def replace_uninformative(
    first: SampledGroups, draw: Callable[[int, int], SampledGroups], want: int, rounds: int
) -> SampledGroups:
    """`first`, and up to `rounds` further draws, until `want` groups are kept; with rounds = 0 just `first`.

    draw: (number of prompts, round from 1) -> SampledGroups, called one round after the other. Raises TrainError when
    no group is left after the last round.
    """
    if not rounds:
        return first
    all_ = first
    good = varied(first.decides, group_ids(first.rollouts))
    done, drawn = 0, want
    while len(good) < want and done < rounds:
        done += 1
        missing = want - len(good)
        ask = want if not good else min(want, math.ceil(missing * drawn / len(good)))
        drawn += ask
        all_ = _joined(all_, draw(ask, done))
        good = varied(all_.decides, group_ids(all_.rollouts))
    if not good:
        raise TrainError(
            f"dynamic sampling: every one of {drawn} groups has equal rewards after "
            f"dynamic_sampling.rounds = {rounds} rounds, so there is nothing to learn from; use tasks "
            f"that are solved now and then, or raise sampling.group_size"
        )
    wanted = set(good[:want])
    kept = tuple(group in wanted for group in group_ids(all_.rollouts).tolist())
    return SampledGroups(all_.rollouts, all_.rewards, all_.decides, all_.parts, kept, done)


def _joined(a: SampledGroups, b: SampledGroups) -> SampledGroups:
    return SampledGroups(
        a.rollouts + b.rollouts,
        torch.cat([a.rewards, b.rewards]),
        torch.cat([a.decides, b.decides]),
        a.parts + b.parts,
        a.kept + b.kept,
    )


def kept_rollouts(drawn: SampledGroups) -> tuple[list[Rollout], Tensor]:
    """The kept rollouts and their rewards."""
    rollouts = [r for r, keep in zip(drawn.rollouts, drawn.kept, strict=True) if keep]
    return rollouts, drawn.rewards[torch.tensor(drawn.kept)]


def spread_back(drawn: SampledGroups, values: Sequence[float]) -> list[float]:
    """`values`, one per kept rollout, over all that were drawn: nan for the dropped ones."""
    found = iter(values)
    return [next(found) if keep else math.nan for keep in drawn.kept]
