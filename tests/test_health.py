"""Each rule speaks at its own trouble, with the number in it, and at nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlft import health
from rlft.health import RULES, check

HEALTHY: dict[str, Any] = {
    "step": 1, "loss": 0.01, "reward": 0.4, "reward_std": 0.4, "frac_reward_zero_std": 0.5, "entropy": 0.35,
    "completions/clipped_ratio": 0.2, "sampling/sampling_logp_difference/mean": 1e-6, "parity/limit": 0.02,
    "frac_reward_invalid": 0.0, "skipped_updates": 0.0, "grad_norm": 0.8,
}  # fmt: skip


def history(steps: int = 8, **last: Any) -> list[dict[str, Any]]:
    """Healthy steps; the newest one with changes."""
    rows = [{**HEALTHY, "step": i + 1, "grad_norm": 0.6 + 0.1 * (i % 3)} for i in range(steps)]
    rows[-1] |= {k.replace("__", "/"): v for k, v in last.items()}
    return rows


TROUBLE = {
    "truncation": (
        {"completions__clipped_ratio": 0.97},
        "97% of completions hit max_tokens: raise sampling.max_tokens",
    ),
    "equal_rewards": (
        {"frac_reward_zero_std": 1.0, "reward": 0.0, "grad_norm": 0.0},
        "every group has equal rewards (mean 0), so they teach nothing: use tasks",
    ),
    "entropy": ({"entropy": 0.004}, "entropy collapsed to 0.004 nat"),
    "mismatch": (
        {"sampling__sampling_logp_difference__mean": 0.012},
        "engine and trainer disagree by 0.012 nat per token, and the run stops at 0.02:",
    ),
    "invalid_rewards": ({"frac_reward_invalid": 0.25}, "25% of rewards are invalid"),
    "skipped_updates": (
        {"skipped_updates": 2.0, "grad_norm": math.nan},
        "the gradient was not finite and the update was skipped (2 in a row): lower optim.lr",
    ),
    "not_finite": ({"loss": math.inf}, "loss inf and gradient norm 0.7 are not both finite"),
    "gradient": ({"grad_norm": 9.0}, "the gradient norm jumped to 9, over ten times what is usual in this run: if it"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_each_trouble_is_told_by_its_rule_alone_with_its_number(name: str) -> None:
    changes, text = TROUBLE[name]
    messages = check(history(**changes))
    assert [m.name for m in messages] == [name]
    assert messages[0].text.startswith(text)


def test_every_rule_has_a_trouble_here() -> None:
    assert [rule.name for rule in RULES] == list(TROUBLE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"completions__clipped_ratio": 0.89},
        {"frac_reward_zero_std": 0.99, "grad_norm": 0.0},
        {"frac_reward_zero_std": 1.0},  # one completion per prompt, as in SFT: the gradient is not 0
        {"entropy": 0.01},
        {"sampling__sampling_logp_difference__mean": 0.0099},
        {"frac_reward_invalid": 0.05},
        {"grad_norm": 6.9},
        {"reward": 0.0},  # a reward that does not move is no alarm
    ],
)
def test_a_healthy_run_is_left_in_peace(changes: dict[str, Any]) -> None:
    assert check(history(**changes)) == []


def test_equal_rewards_beside_a_kl_term_are_told_though_the_gradient_is_not_zero() -> None:
    assert [m.name for m in check(history(frac_reward_zero_std=1.0, kl=0.01))] == ["equal_rewards"]


def test_null_read_back_from_json_is_not_finite() -> None:
    messages = check(history(loss=None))
    assert [m.name for m in messages] == ["not_finite"] and messages[0].text.startswith(
        "loss nan and gradient norm 0.7"
    )


def test_a_gradient_is_judged_by_the_run_and_not_before_five_steps() -> None:
    assert check(history(steps=5, grad_norm=50.0)) == []
    assert [m.name for m in check(history(steps=6, grad_norm=50.0))] == ["gradient"]
    assert check([{**HEALTHY, "grad_norm": 40.0}] * 6 + [{**HEALTHY, "grad_norm": 90.0}]) == []


def test_an_evaluation_an_empty_history_and_missing_metrics_say_nothing() -> None:
    assert check([]) == [] and check([{"step": 1}]) == []
    assert check([*history(entropy=0.001), {"step": 8, "eval/reward": 0.5}]) == []


def test_trouble_further_back_than_the_window_is_forgotten() -> None:
    old = [{**HEALTHY, "grad_norm": 0.001}] * 500
    assert check(old + [{**HEALTHY, "grad_norm": 5.0}] * (health.WINDOW + 1)) == []
