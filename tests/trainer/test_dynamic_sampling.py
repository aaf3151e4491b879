"""Dynamic sampling: which groups are kept, how many are asked for, and where it ends."""

from __future__ import annotations

import math

import pytest
import torch

from rlft.errors import TrainError
from rlft.trainer.dynamic_sampling import SampledGroups, kept_rollouts, replace_uninformative, spread_back, varied
from rlft.types import Prompt, Rollout

NAN = float("nan")


def drawn(groups: list[list[float]], first: int = 0) -> SampledGroups:
    """One group per list of rewards; prompts are numbered from `first`."""
    rollouts = [
        Rollout(Prompt((1,), {}, first + g), (2,), (True,), None, "", "stop", i, 0, 0)
        for g, rewards in enumerate(groups)
        for i in range(len(rewards))
    ]
    values = torch.tensor([reward for rewards in groups for reward in rewards])
    return SampledGroups(rollouts, values, values, [first], (True,) * len(rollouts))


class Source:
    """Draws from a list of groups, and notes what it was asked for."""

    def __init__(self, groups: list[list[float]]) -> None:
        self.groups, self.asked, self.at = groups, [], 100

    def __call__(self, count: int, round_: int) -> SampledGroups:
        self.asked.append((count, round_))
        taken, self.groups = self.groups[:count], self.groups[count:]
        self.at += count
        return drawn(taken, self.at - count)


GOOD, EQUAL = [0.0, 1.0], [1.0, 1.0]


def kept(d: SampledGroups) -> list[int]:
    return list(dict.fromkeys(r.prompt.index for r in kept_rollouts(d)[0]))


def test_a_full_step_is_not_refilled_and_rounds_0_keeps_everything() -> None:
    source = Source([])
    assert kept(replace_uninformative(drawn([GOOD] * 3), source, 3, 5)) == [0, 1, 2]
    off = replace_uninformative(drawn([EQUAL] * 3), source, 3, 0)
    assert kept(off) == [0, 1, 2] and source.asked == []


def test_kept_groups_stay_in_the_order_drawn_and_the_surplus_is_dropped() -> None:
    source = Source([EQUAL, GOOD, GOOD, GOOD])
    end = replace_uninformative(drawn([GOOD, EQUAL, GOOD, EQUAL]), source, 4, 5)
    # Half of four were kept and two are missing: four are asked for. The last good one is surplus.
    assert source.asked == [(4, 1)] and kept(end) == [0, 2, 101, 102]
    assert end.metrics(4) == {
        "dynamic_sampling/rounds": 1,
        "dynamic_sampling/drawn": 8,
        "dynamic_sampling/kept": 4,
        "dynamic_sampling/short": 0,
    }
    assert end.parts == [0, 100]


def test_the_bound_is_kept_and_the_step_takes_what_there_is() -> None:
    source = Source([EQUAL] * 20)
    end = replace_uninformative(drawn([GOOD, EQUAL, EQUAL]), source, 3, 2)
    assert [round_ for _, round_ in source.asked] == [1, 2] and kept(end) == [0]
    assert end.metrics(3)["dynamic_sampling/short"] == 2 and end.metrics(3)["dynamic_sampling/rounds"] == 2


def test_an_error_only_when_no_group_is_left() -> None:
    with pytest.raises(
        TrainError, match=r"every one of 9 groups has equal rewards after dynamic_sampling.rounds = 2 rounds"
    ):
        replace_uninformative(drawn([EQUAL] * 3), Source([EQUAL] * 6), 3, 2)


def test_zero_variance_is_max_equals_min_over_the_valid_values() -> None:
    # 0.1 three times has a std of 1e-17 in floating point; one valid value alone never varies.
    values = torch.tensor([0.1, 0.1, 0.1, NAN, 0.0, 1.0, NAN, NAN, 0.3, 0.3 + 1e-6], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    assert varied(values, groups) == [1, 3]


def test_another_value_than_the_reward_may_decide() -> None:
    first = drawn([[0.0, 1.0], [0.2, 0.3]])
    first = SampledGroups(first.rollouts, first.rewards, torch.tensor([1.0, 1.0, 0.0, 1.0]), [0], first.kept)
    end = replace_uninformative(first, Source([EQUAL] * 9), 2, 1)
    assert kept(end) == [1] and kept_rollouts(end)[1].tolist() == pytest.approx([0.2, 0.3])


def test_values_of_kept_rows_are_spread_back_over_all() -> None:
    end = replace_uninformative(drawn([EQUAL, GOOD]), Source([EQUAL] * 9), 2, 1)
    back = spread_back(end, [1.0, 2.0])
    assert [math.isnan(v) for v in back[:2]] == [True, True] and back[2:4] == [1.0, 2.0] and len(back) == len(end.kept)
