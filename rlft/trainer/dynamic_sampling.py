"""Dynamic sampling (DAPO, arXiv 2503.14476): replace groups of equal rewards, which carry no learning signal.

A group is kept when two of its valid rewards differ (max != min, rather than a threshold on the std). Each round asks
for as many prompts as the share of kept groups so far suggests, at most a full step's. Kept groups stay in sampling
order, and the surplus is dropped. After the last round the step trains on the groups it has. Sampling and scoring are
done by the caller's `draw`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from rlft.errors import TrainError
from rlft.types import Group, LeftOut, Sample


def deciding(sample: Sample, by: str | None) -> float:
    """Return the value that must differ within a group for it to be kept, as float32; nan where invalid.

    It is the value of the reward function `by`, or the reward without the overlong penalty, which distinguishes lengths
    and not answers.
    """
    return _float32(sample.answer if by is None else sample.outcomes[by].value)


def _float32(value: float) -> float:
    """Round to float32, in which sums that are equal on paper are equal: 0.1 + 0.7 and 0.8."""
    return float(np.float32(value))


def _valid(group: Group, by: str | None) -> list[float]:
    values = [deciding(sample, by) for sample in group.samples]
    return [value for value in values if not math.isnan(value)]


def is_informative(group: Group, by: str | None = None) -> bool:
    """Return True when two valid rewards of the group differ. by: as in `deciding`."""
    values = _valid(group, by)
    return bool(values) and max(values) != min(values)


def solved(groups: Sequence[Group], share: float, threshold: float, by: str | None = None) -> set[int]:
    """Return the data rows whose group is solved: at least `share` of its valid values are at least `threshold`."""
    rows = set()
    for group in groups:
        values = _valid(group, by)
        # A single division, so that 7 of 10 equals the 0.7 of a config exactly.
        if values and sum(value >= _float32(threshold) for value in values) / len(values) >= share:
            rows.add(group.prompt.index)
    return rows


def replace_uninformative(
    draw: Callable[[int, int], list[Group]], want: int, rounds: int, by: str | None = None
) -> tuple[list[Group], int]:
    """Sample `want` groups, and up to `rounds` more times until as many are informative; leave out the others.

    Returns all groups that were sampled, those left out included, and the number of rounds after the first sample. With
    rounds = 0 nothing is left out. draw: (number of prompts, round from 0) -> scored groups, called once per round.
    Raises TrainError when no group is left after the last round.
    """
    groups = draw(want, 0)
    if not rounds:
        return groups, 0
    groups, round_, sampled = list(groups), 0, want
    informative = [group for group in groups if is_informative(group, by)]
    while len(informative) < want and round_ < rounds:
        round_ += 1
        missing = want - len(informative)
        request = want if not informative else min(want, math.ceil(missing * sampled / len(informative)))
        sampled += request
        more = draw(request, round_)
        groups += more
        informative += [group for group in more if is_informative(group, by)]
    if not informative:
        raise TrainError(
            f"dynamic sampling: every one of {sampled} groups has equal rewards after "
            f"dynamic_sampling.rounds = {rounds} rounds, so there is nothing to learn from; use tasks "
            f"that are solved now and then, or raise sampling.group_size"
        )
    selected = {id(group) for group in informative[:want]}
    for group in groups:
        if id(group) not in selected:
            for sample in group.samples:
                sample.left_out = LeftOut.FILTERED
    return groups, round_


def kept_groups(groups: Sequence[Group]) -> list[Group]:
    """Return the groups that dynamic sampling has not dropped."""
    return [group for group in groups if group.samples[0].left_out != LeftOut.FILTERED]


def metrics(groups: Sequence[Group], rounds: int, want: int) -> dict[str, float]:
    """Return dynamic_sampling/*: rounds, groups sampled, groups kept, and groups missing after the last round.

    want: groups of a full step.
    """
    kept = len(kept_groups(groups))
    return {
        "dynamic_sampling/rounds": float(rounds),
        "dynamic_sampling/drawn": float(len(groups)),
        "dynamic_sampling/kept": float(kept),
        "dynamic_sampling/short": float(want - kept),
    }
