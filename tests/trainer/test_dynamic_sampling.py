"""Dynamic sampling: which groups are kept, how many are asked for, and where it ends."""

from __future__ import annotations

import pytest

from rlft.errors import TrainError
from rlft.trainer.dynamic_sampling import is_informative, kept_groups, metrics, replace_uninformative
from rlft.types import FinishReason, Group, Outcome, Prompt, Rollout, Sample

NAN = float("nan")


def group(rewards: list[float], index: int = 0) -> Group:
    rollouts = [
        Rollout(Prompt((1,), {}, index), (2,), (True,), None, "", FinishReason.STOP, i, 0, 0)
        for i in range(len(rewards))
    ]
    return Group([Sample(r, reward, reward) for r, reward in zip(rollouts, rewards, strict=True)])


class Source:
    """Draws the groups of the first round, and then from a list of further ones; notes what it was asked for."""

    def __init__(self, first: list[Group], more: list[list[float]]) -> None:
        self.first, self.more, self.asked, self.at = first, more, [], 100

    def __call__(self, count: int, round_: int) -> list[Group]:
        if round_ == 0:
            return self.first
        self.asked.append((count, round_))
        taken, self.more = self.more[:count], self.more[count:]
        self.at += count
        return [group(rewards, self.at - count + i) for i, rewards in enumerate(taken)]


def drawn(rewards: list[list[float]], more: list[list[float]]) -> Source:
    return Source([group(values, i) for i, values in enumerate(rewards)], more)


GOOD, EQUAL = [0.0, 1.0], [1.0, 1.0]


def kept(groups: list[Group]) -> list[int]:
    return [group.prompt.index for group in kept_groups(groups)]


def test_a_full_step_is_not_refilled_and_rounds_0_keeps_everything() -> None:
    source = drawn([GOOD] * 3, [])
    assert kept(replace_uninformative(source, 3, 5)[0]) == [0, 1, 2]
    source = drawn([EQUAL] * 3, [])
    assert kept(replace_uninformative(source, 3, 0)[0]) == [0, 1, 2] and source.asked == []


def test_kept_groups_stay_in_the_order_drawn_and_the_surplus_is_dropped() -> None:
    source = drawn([GOOD, EQUAL, GOOD, EQUAL], [EQUAL, GOOD, GOOD, GOOD])
    groups, rounds = replace_uninformative(source, 4, 5)
    # Half of four were kept and two are missing: four are asked for. The last good one is surplus.
    assert source.asked == [(4, 1)] and kept(groups) == [0, 2, 101, 102]
    assert metrics(groups, rounds, 4) == {
        "dynamic_sampling/rounds": 1,
        "dynamic_sampling/drawn": 8,
        "dynamic_sampling/kept": 4,
        "dynamic_sampling/short": 0,
    }
    assert [group.prompt.index for group in groups] == [0, 1, 2, 3, 100, 101, 102, 103]
    assert all(sample.kept == (group.prompt.index in (0, 2, 101, 102)) for group in groups for sample in group.samples)


def test_the_bound_is_kept_and_the_step_takes_what_there_is() -> None:
    source = drawn([GOOD, EQUAL, EQUAL], [EQUAL] * 20)
    groups, rounds = replace_uninformative(source, 3, 2)
    assert [round_ for _, round_ in source.asked] == [1, 2] and kept(groups) == [0]
    assert metrics(groups, rounds, 3)["dynamic_sampling/short"] == 2 and rounds == 2


def test_an_error_only_when_no_group_is_left() -> None:
    with pytest.raises(
        TrainError, match=r"every one of 9 groups has equal rewards after dynamic_sampling.rounds = 2 rounds"
    ):
        replace_uninformative(drawn([EQUAL] * 3, [EQUAL] * 6), 3, 2)


def test_zero_variance_is_max_equals_min_over_the_valid_values() -> None:
    # 0.1 three times has a std of 1e-17 in floating point; one valid value alone never varies.
    values = [[0.1, 0.1, 0.1], [NAN, 0.0, 1.0], [NAN, NAN], [0.3, 0.3 + 1e-6]]
    assert [is_informative(group(rewards)) for rewards in values] == [False, True, False, True]


def test_another_value_than_the_reward_may_decide() -> None:
    source = drawn([[0.0, 1.0], [0.2, 0.3]], [EQUAL] * 9)
    for made, values in zip(source.first, ([1.0, 1.0], [0.0, 1.0]), strict=True):
        for sample, value in zip(made.samples, values, strict=True):
            sample.outcomes = {"correct": Outcome(value, False, {})}
    groups, _ = replace_uninformative(source, 2, 0, "correct")
    assert [is_informative(made, "correct") for made in groups] == [False, True]
    with pytest.raises(KeyError):  # those of the second round have no such outcome
        replace_uninformative(source, 2, 1, "correct")
