"""Advantages by hand and against TRL, their exact zeros, and what is left out of the statistics."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from trl_code import run_block, trl

from rlft.algos import advantages as adv
from rlft.algos.algorithm import estimator_of
from rlft.errors import RewardError

NAN = float("nan")


def test_advantages_by_hand() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 4.0, 2.0]), torch.tensor([7, 7, 7, 3, 3])
    third, std = 1 / 3, math.sqrt(1 / 3)
    assert adv.group_mean(rewards, groups).tolist() == pytest.approx([2 * third, -third, -third, 1, -1])
    assert adv.leave_one_out(rewards, groups).tolist() == pytest.approx([1, -0.5, -0.5, 2, -2])
    one, two = std + 1e-4, math.sqrt(2) + 1e-4
    want = [2 * third / one, -third / one, -third / one, 1 / two, -1 / two]
    assert adv.group_norm(rewards, groups).tolist() == pytest.approx(want)
    assert adv.identity(rewards, groups).tolist() == rewards.tolist()


def of(name: str, rewards: torch.Tensor, groups: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """An estimator with everything it may ask for: lengths 1 upwards, and two parts that are half the reward each."""
    if lengths is None:
        lengths = torch.arange(1, len(rewards) + 1)
    parts, weights = torch.stack([rewards, rewards], 1).double(), torch.tensor([0.5, 0.5], dtype=torch.float64)
    return estimator_of(name)(rewards, groups, lengths=lengths, parts=parts, weights=weights)


def test_the_list_of_estimators_is_what_the_file_has() -> None:
    made = {n for n, f in vars(adv).items() if getattr(f, "__module__", "") == adv.__name__ and not n.startswith("_")}
    assert set(adv.ESTIMATORS) == made - {"Groups", "group_statistics", "reward_std", "frac_zero_std"}


def test_baselines_over_lengths_and_means_by_hand() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 4.0, 2.0]), torch.tensor([0, 0, 0, 1, 1])
    lengths = torch.tensor([2, 1, 1, 3, 1])
    assert adv.opo(rewards, groups, lengths).tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5, -1.5])
    assert adv.max_rl(rewards, groups).tolist() == pytest.approx([2, -1, -1, 1 / 3, -1 / 3])
    std = torch.tensor([1.0, 0.0, 0.0, 4.0, 2.0]).std().item()
    want = [x / (std + 1e-4) for x in (2 / 3, -1 / 3, -1 / 3, 1, -1)]
    assert adv.batch_std(rewards, groups).tolist() == pytest.approx(want)
    assert adv.best_and_worst(rewards, groups).tolist() == [1, -1, 0, 1, -1]
    with pytest.raises(RewardError, match=r'algo.advantage = "max_rl": a reward is -1, .*give rewards of 0 or more'):
        adv.max_rl(torch.tensor([1.0, -1.0]), torch.tensor([0, 0]))


def test_whitening_is_over_tokens_not_completions() -> None:
    rewards, lengths = torch.tensor([1.0, 0.0, 3.0, 3.0]), torch.tensor([3, 1, 2, 2])
    tokens = torch.tensor([1.0] * 3 + [0.0] + [3.0] * 4, dtype=torch.float64)
    want = ((tokens - tokens.mean()) / tokens.std(unbiased=False))[[0, 3, 4, 6]]
    groups = torch.tensor([0, 0, 1, 1])
    assert adv.reinforce_plus_plus(rewards, groups, lengths).tolist() == pytest.approx(want.tolist(), abs=1e-6)
    centred = torch.tensor([0.5] * 3 + [-0.5] + [0.0] * 4, dtype=torch.float64)
    want = ((centred - centred.mean()) / centred.std(unbiased=False))[[0, 3]]
    made = adv.reinforce_plus_plus_baseline(rewards, groups, lengths).tolist()
    assert made[:2] == pytest.approx(want.tolist(), abs=1e-6) and made[2:] == [0, 0]


def test_gdpo_keeps_apart_what_the_sum_of_rewards_would_mix() -> None:
    """Rewards (1, 0) and (0, 1) have one sum; GDPO still tells both from (1, 1) by each function's own spread."""
    parts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    weights, groups = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    made = adv.gdpo((parts * weights).sum(1), groups, parts, weights)
    normal = (parts - 0.5) / (parts[:, 0].std() + 1e-4)
    total = (normal * weights).sum(1)
    assert made.tolist() == pytest.approx((total / (total.std() + 1e-4)).tolist(), abs=1e-6)


ESTIMATORS = [name for name in adv.WITHIN_GROUPS]


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_equal_rewards_and_groups_of_one_give_exactly_zero(estimate: str) -> None:
    # The mean of three times 0.1 is 0.10000000000000002: subtracting it does not give 0.
    rewards, groups = torch.tensor([0.1] * 3 + [5.0], dtype=torch.float64), torch.tensor([0] * 3 + [1])
    assert sum([0.1] * 3) / 3 != 0.1
    assert of(estimate, rewards, groups).tolist() == [0.0] * 4
    assert of(estimate, torch.tensor([]), torch.tensor([], dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("estimate", adv.ESTIMATORS)
def test_an_invalid_reward_gets_zero_and_leaves_its_group_as_if_it_were_not_there(estimate: str) -> None:
    rewards, groups = torch.tensor([1.0, NAN, 0.0, 0.5, NAN, 2.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    lengths = torch.arange(1, 7)
    out = of(estimate, rewards, groups, lengths)
    keep = ~rewards.isnan()
    assert out.dtype == torch.float32 and out[~keep].tolist() == [0, 0]
    assert torch.equal(out[keep], of(estimate, rewards[keep], groups[keep], lengths[keep]))


def test_spread_of_rewards_as_logged() -> None:
    rewards, groups = torch.tensor([1.0, 1.0, 0.0, 2.0, NAN, 3.0, NAN]), torch.tensor([0, 0, 1, 1, 1, 2, 3])
    assert adv.frac_zero_std(rewards, groups) == pytest.approx(2 / 3)  # groups 0 and 2 of 0, 1 and 2
    assert adv.reward_std(rewards) == pytest.approx(math.sqrt((0.16 + 0.16 + 1.96 + 0.36 + 2.56) / 4))
    assert adv.reward_std(torch.tensor([2.0])) == 0 and math.isnan(adv.reward_std(torch.tensor([NAN])))
    assert math.isnan(adv.frac_zero_std(torch.tensor([NAN]), torch.tensor([0])))


@pytest.mark.parametrize(
    ("aggregation", "scale", "name"),
    [
        ("sum_then_normalize", "batch", "batch_std"),
        ("sum_then_normalize", "group", "group_norm"),
        ("sum_then_normalize", "none", "group_mean"),
        ("normalize_then_sum", "group", "gdpo"),
    ],
)
def test_advantages_equal_trls(aggregation: str, scale: str, name: str) -> None:
    g = torch.Generator().manual_seed(2)
    parts, weights = torch.rand(12, 2, generator=g), torch.tensor([1.0, 0.5])
    parts[3], parts[8:, 1] = float("nan"), 1.0  # a row without any reward, and a part that is equal in its group
    rewards = torch.where(parts.isnan().all(1), parts[:, 0], (parts * weights).nansum(1))
    names = {
        "self": SimpleNamespace(
            multi_objective_aggregation=aggregation,
            scale_rewards=scale,
            reward_weights=weights,
            reward_funcs=["a", "b"],
        ),
        "rewards_per_func": parts,
        "unscorable_mask": parts.isnan().all(1),
        "num_generations": 4,
        "device": "cpu",
    }
    condition = "self.multi_objective_aggregation == 'sum_then_normalize'"
    want = run_block(
        "trainer.grpo_trainer", "GRPOTrainer", "_generate_and_score_completions", condition, "advantages", names
    ).nan_to_num(0)
    groups = torch.arange(3).repeat_interleave(4)
    got = estimator_of(name)(rewards, groups, parts=parts.double(), weights=weights.double())
    assert got.tolist() == pytest.approx(want.tolist(), abs=1e-5) and want.abs().max() > 0.3


def test_group_norm_and_the_logged_spread_equal_trl() -> None:
    nanstd = trl("trainer.utils", "nanstd")

    rewards = torch.tensor([[1.0, 0.0, 0.25, 1.0], [0.5, float("nan"), -2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    want = (rewards - rewards.nanmean(dim=1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    groups = torch.arange(3).repeat_interleave(4)
    assert adv.group_norm(rewards.flatten(), groups).tolist() == pytest.approx(
        want.nan_to_num(0).flatten().tolist(), abs=1e-6
    )
    assert adv.reward_std(rewards.flatten()) == pytest.approx(nanstd(rewards.flatten()).item(), abs=1e-6)
    assert adv.frac_zero_std(rewards.flatten(), groups) == pytest.approx(1 / 3)
