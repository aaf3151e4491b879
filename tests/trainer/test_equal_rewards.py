"""Equal rewards are equal: no rounding of sums, weights, penalties or means makes a difference, or hides one."""

from __future__ import annotations

import math
import random

import pytest
import records
import torch

from rlft.algos import advantages
from rlft.config.data import Reward
from rlft.rewards.builtin.length import length
from rlft.rewards.parts import OVERLONG, RewardBreakdown
from rlft.rewards.pool import InProcess
from rlft.rewards.score import RewardFunction, score
from rlft.trainer.dynamic_sampling import deciding, is_informative, solved
from rlft.types import Group, Prompt, Rollout

NAN = math.nan
DRAWS = 200


def completions(lengths: list[int], prompt: int = 0) -> list[Rollout]:
    return [
        Rollout(Prompt((1,), {}, prompt), (2,) * n, (True,) * n, None, "", "stop", i, 0, 0)
        for i, n in enumerate(lengths)
    ]


def scored(
    rollouts: list[Rollout], values: dict[str, tuple[float, list[float | None]]], buffer: int = 0
) -> RewardBreakdown:
    """What `score` makes of functions that return these values. values: name -> (weight, one value per rollout).
    buffer: of an overlong penalty at 40 tokens, 0 for none."""
    functions = [
        RewardFunction(name, InProcess(lambda completions, own=own, **_: own), Reward(name, weight=weight))
        for name, (weight, own) in values.items()
    ]
    if buffer:
        args = {"max_tokens": 40, "buffer": buffer}
        functions.append(RewardFunction(OVERLONG, InProcess(length), Reward(OVERLONG, args=args)))
    for function in functions:
        function.open()
    return score(rollouts, functions, {})[1]


def group_of(rollouts: list[Rollout], parts: RewardBreakdown) -> Group:
    (group,) = records.groups(rollouts)
    parts.store(group.samples)
    return group


def decides(group: Group) -> list[float]:
    return [deciding(sample, None) for sample in group.samples]


def test_a_penalty_for_length_leaves_equal_answers_equal() -> None:
    """Over many answers, weights, buffers and lengths: one value decides, the same as without the penalty."""
    rng = random.Random(0)
    for _ in range(DRAWS):
        buffer, lengths = rng.randint(1, 40), [rng.randint(1, 40) for _ in range(8)]
        values = {
            name: (rng.choice([0.1, 0.3, 1.0, 1 / 3, rng.uniform(-2, 2)]), [rng.choice([0.1, 0.7, rng.random()])] * 8)
            for name in ("a", "b", "c")
        }
        rollouts = completions(lengths)
        drawn, plain = (group_of(rollouts, scored(rollouts, values, b)) for b in (buffer, 0))
        assert decides(drawn) == decides(plain) == [plain.samples[0].reward] * 8
        assert not is_informative(drawn)
        # What the reward is, is what solves it.
        threshold = sum(weight * own[0] for weight, own in values.values())  # type: ignore[operator]
        assert solved([drawn], 1.0, threshold) == {0}
        assert [sample.reward for sample in drawn.samples] == pytest.approx(
            [threshold - min(1.0, max(0.0, (n - 40 + buffer) / buffer)) for n in lengths], abs=1e-6
        )


def test_answers_that_differ_stay_different_under_a_penalty() -> None:
    """Rewards of 1 with the penalty -1 and of 0 without one are equal in total and no equal answers."""
    rollouts = completions([40, 1])
    parts = scored(rollouts, {"a": (1.0, [1.0, 0.0])}, buffer=10)
    assert parts.total.tolist() == [0.0, 0.0] and is_informative(group_of(rollouts, parts))


@pytest.mark.parametrize("values", [(0.1, 0.2), (0.7, 0.1), (0.1, 0.7, 0.05)])
def test_sums_that_are_equal_on_paper_solve_the_threshold_that_they_are_on_paper(values: tuple[float, ...]) -> None:
    """0.1 + 0.7 is 0.7999999999999999 in float64."""
    rollouts = completions([5, 40])
    parts = scored(rollouts, {f"f{i}": (1.0, [value] * 2) for i, value in enumerate(values)}, buffer=20)
    assert solved([group_of(rollouts, parts)], 1.0, round(sum(values), 6)) == {0}


@pytest.mark.parametrize("n", range(1, 33))
def test_a_share_of_completions_is_the_number_that_a_config_says(n: int) -> None:
    rollouts = completions([1] * n)
    for good in range(n + 1):
        values = torch.tensor([1.0] * good + [0.0] * (n - good))
        drawn = [group_of(rollouts, RewardBreakdown(values, values, {}))]
        assert bool(solved(drawn, good / n, 1.0)) and not solved(drawn, math.nextafter(good / n, 2), 1.0)


def test_a_penalty_alone_is_no_reward() -> None:
    rollouts = completions([40, 5])
    parts = scored(rollouts, {"a": (1.0, [None, 0.5])}, buffer=10)
    assert math.isnan(parts.total[0]) and math.isnan(decides(group_of(rollouts, parts))[0]) and parts.total[1] == 0.5
    assert parts.faults() == ["no reward function applied to 1 of 2 completions (None), which are left out"]


def test_rounds_are_joined_with_their_answers() -> None:
    some, more = (scored(completions([40]), {"a": (1.0, [v])}, buffer=10) for v in (0.1, 0.7))
    joined = RewardBreakdown.join([some, more])
    assert joined.answers.tolist() == torch.tensor([0.1, 0.7]).tolist()
    assert joined.outcomes["a"].values == [0.1, 0.7]


def estimate(name: str, rewards: torch.Tensor, groups: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """An estimator with what else it asks for: lengths, and parts of which two functions add up to the reward."""
    from inspect import signature

    function = getattr(advantages, name)
    weights = torch.tensor([rng.uniform(0.1, 1), rng.uniform(0.1, 1)], dtype=torch.float64)
    given = {
        "lengths": torch.tensor([rng.randint(1, 50) for _ in rewards]),
        "weights": weights,
        "parts": torch.stack([rewards.double(), rewards.double() / 3], 1),
    }
    return function(rewards, groups, **{k: v for k, v in given.items() if k in signature(function).parameters})


@pytest.mark.parametrize("name", [n for n in advantages.ESTIMATORS if n != "identity"])
def test_equal_rewards_have_an_advantage_of_exactly_0(name: str) -> None:
    """Groups of one value each (a whole step of one value for what compares over the batch), some of it invalid."""
    rng = random.Random(1)
    for draw in range(DRAWS):
        sizes = [rng.randint(1, 9) for _ in range(rng.randint(1, 4))]
        one = rng.choice([0.1, 0.7, 1 / 3, rng.random(), 1e6 * rng.random()])
        alike = name in advantages.WITHIN_GROUPS and draw % 2
        values = [one if not alike else rng.random() for _ in sizes]
        rewards = torch.tensor(
            [NAN if rng.random() < 0.1 else v for v, n in zip(values, sizes, strict=True) for _ in range(n)]
        )
        groups = torch.tensor([g for g, n in enumerate(sizes) for _ in range(n)])
        found = estimate(name, rewards, groups, rng)
        assert found.tolist() == [0.0] * len(rewards), (draw, rewards, found)
        statistics = advantages.group_statistics(rewards, groups)
        assert statistics.std.tolist() == [0.0] * len(rewards)
        valid = ~rewards.isnan()
        assert statistics.mean[valid].tolist() == rewards[valid].double().tolist()
        with_valid = {int(g) for g in groups[valid]}
        assert not with_valid or advantages.frac_zero_std(rewards, groups) == 1


def test_a_group_that_differs_in_the_last_bit_is_no_equal_group() -> None:
    low = torch.tensor([0.1])
    rewards = torch.cat([low, low, torch.nextafter(low, torch.ones(1))])
    groups = torch.zeros(3, dtype=torch.long)
    drawn = group_of(completions([1] * 3), RewardBreakdown(rewards, rewards, {}))
    assert is_informative(drawn) and advantages.group_norm(rewards, groups).abs().min() > 0
    assert advantages.frac_zero_std(rewards, groups) == 0


def test_the_noise_of_a_functions_own_float64_is_no_difference() -> None:
    """0.1 + 0.2 beside 0.3: one reward in fp32, so one for gdpo, which looks at the functions' own values."""
    parts = torch.tensor([[0.1 + 0.2], [0.3]], dtype=torch.float64)
    groups, weights = torch.zeros(2, dtype=torch.long), torch.ones(1, dtype=torch.float64)
    assert advantages.gdpo(parts[:, 0].float(), groups, parts, weights).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 1e9 / 7])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64])
def test_the_logged_mean_of_equal_rewards_is_the_reward_and_the_std_is_0(value: float, n: int) -> None:
    rollouts = completions([40] * n)
    logged = scored(rollouts, {"a": (1.0, [value] * n)}).metrics()
    assert (logged["rewards/a/mean"], logged["rewards/a/std"]) == (value, 0.0)
    assert (logged["reward"], logged["reward_std"]) == (torch.tensor(value).item(), 0.0)
    assert advantages.reward_std(torch.full((n,), value)) == 0
