"""Each rule speaks at its own trouble, with the number in it, and at nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlft.monitor import health
from rlft.monitor.health import RULES, HealthMonitor, check

HEALTHY: dict[str, Any] = {
    "step": 1,
    "loss": 0.01,
    "reward": 0.4,
    "reward_std": 0.4,
    "frac_reward_zero_std": 0.5,
    "entropy": 0.35,
    "completions/clipped_ratio": 0.2,
    "sampling/sampling_logp_difference/mean": 1e-6,
    "parity/limit": 0.02,
    "frac_reward_invalid": 0.0,
    "skipped_updates": 0.0,
    "grad_norm": 0.8,
    "clip_ratio/region_mean": 0.01,
    "dynamic_sampling/rounds": 2.0,
    "dynamic_sampling/drawn": 20.0,
    "dynamic_sampling/kept": 16.0,
    "dynamic_sampling/short": 0.0,
    "perf/peak_GiB": 20.0,
    "time/generate": 6.0,
    "time/train": 3.0,
    "step_time": 10.0,
}
History = list[dict[str, Any]]


def history(steps: int = 18, **last: Any) -> History:
    """Healthy steps; the newest one with changes."""
    rows = [{**HEALTHY, "step": i + 1, "grad_norm": 0.6 + 0.1 * (i % 3)} for i in range(steps)]
    rows[-1] |= {k.replace("__", "/"): v for k, v in last.items()}
    return rows


def every(steps: int = 18, **changes: Any) -> History:
    """The changes at all steps; a function gets the step."""
    changes = {k.replace("__", "/"): v for k, v in changes.items()}
    return [row | {k: v(row["step"]) if callable(v) else v for k, v in changes.items()} for row in history(steps)]


def evaluated(before: float, now: float, reward_before: float = 0.4, reward_now: float = 0.6) -> History:
    """Ten steps, an evaluation, ten more, another one."""
    rows = [row | {"reward": reward_before if row["step"] <= 10 else reward_now} for row in history(20)]
    first, second = ({"step": s, "eval/reward": v, "eval/reward_stderr": 0.02} for s, v in ((10, before), (20, now)))
    return [*rows[:10], first, *rows[10:], second]


TROUBLE: dict[str, tuple[History, str]] = {
    "truncation": (
        history(completions__clipped_ratio=0.97),
        "97% of completions hit max_tokens: raise sampling.max_tokens",
    ),
    "truncation_at_start": (
        every(4, completions__clipped_ratio=0.6),
        "over half of the completions of the first steps hit max_tokens (now 60%), so their answers are missing: raise",
    ),
    "too_hard": (
        every(10, reward=0.0, reward_std=0.0, frac_reward_zero_std=1.0, grad_norm=0.0),
        "no completion of the last ten steps or more had a reward above 0: start with easier tasks",
    ),
    "too_easy": (
        every(6, reward=0.9, frac_reward_zero_std=0.85),
        "85% of groups have equal rewards from the start, at a mean of 0.9, so most tasks are solved already: use",
    ),
    "equal_rewards": (
        history(frac_reward_zero_std=1.0, reward=0.0, grad_norm=0.0),
        "every group has equal rewards (mean 0), so they teach nothing: use tasks",
    ),
    "few_groups": (every(frac_reward_zero_std=0.9), "over 80% of groups had equal rewards in the last ten steps, so"),
    "dynamic_sampling": (
        history(**{f"dynamic_sampling__{k}": v for k, v in dict(rounds=3.0, short=5.0, kept=11.0, drawn=64.0).items()}),
        "after 3 rounds of dynamic sampling 5 groups are still missing: 11 of 64 drawn had rewards that differ: raise",
    ),
    "entropy": (history(entropy=0.004), "entropy collapsed to 0.004 nat"),
    "mismatch": (
        history(sampling__sampling_logp_difference__mean=0.012),
        "engine and trainer disagree by 0.012 nat per token, and the run stops at 0.02:",
    ),
    "clipping": (
        history(clip_ratio__region_mean=0.16),
        "the ratio of 16% of tokens is clipped, so their gradient is lost: lower optim.lr",
    ),
    "invalid_rewards": (history(frac_reward_invalid=0.25), "25% of rewards are invalid"),
    "nonfinite_logprobs": (
        history(sampling__nonfinite_logprobs=3.0),
        "3 sampled tokens have a log-prob that is not finite, so they are not trained: look",
    ),
    "skipped_updates": (
        history(skipped_updates=2.0, grad_norm=math.nan),
        "the gradient was not finite and the update was skipped (2 in a row): lower optim.lr",
    ),
    "not_finite": (history(loss=math.inf), "loss inf and gradient norm 0.8 are not both finite"),
    "gradient": (
        history(grad_norm=9.0),
        "the gradient norm jumped to 9, over ten times what is usual in this run: if it",
    ),
    "eval_falls": (
        evaluated(0.6, 0.5),
        "the held-out reward fell to 0.5 and the training reward did not, as when a policy learns",
    ),
    "slow_sampling": (every(time__generate=9.5), "sampling took 9.5 of 10 s: raise engine.batch_size"),
    "slow_training": (every(time__train=9.5), "training took 9.5 of 10 s: raise packing.tokens_per_micro_batch"),
    "memory": (
        every(60, perf__peak_GiB=lambda step: 20.0 + 0.1 * step),
        "peak memory keeps growing and is 26 GiB now: look for what a reward function or a callback keeps",
    ),
}


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_each_trouble_is_told_by_its_rule_alone_with_its_number(name: str) -> None:
    rows, text = TROUBLE[name]
    messages = check(rows)
    assert [m.name for m in messages] == [name]
    assert messages[0].text.startswith(text)


def test_every_trouble_here_has_a_rule() -> None:
    assert [rule.name for rule in RULES] == list(TROUBLE)


QUIET: dict[str, History] = {
    "healthy": history(),
    "healthy from the first step": history(1),
    "long and healthy": history(150),
    "truncation below the limit": history(completions__clipped_ratio=0.89),
    "one truncated step at the start": history(3, completions__clipped_ratio=0.8),
    "truncation that is over": [*every(4, completions__clipped_ratio=0.9), {**HEALTHY, "step": 5}],
    "truncation after the start": every(completions__clipped_ratio=0.6),
    "too early to call it hard": every(9, reward=0.0, reward_std=0.0),
    "mean 0 of rewards that differ": every(reward=0.0, reward_std=1.0),
    "a reward that does not move": every(reward=0.0),
    "easy steps, but not all": every(6, reward=0.9, frac_reward_zero_std=lambda step: 0.85 if step % 2 else 0.6),
    "equal at the start because nothing is solved": every(6, reward=0.05, frac_reward_zero_std=0.85),
    "a group that differs": history(frac_reward_zero_std=0.99, grad_norm=0.0),
    "one completion per prompt, as in SFT": every(frac_reward_zero_std=1.0, reward=1.0, reward_std=0.0),
    "few groups, but just now": history(frac_reward_zero_std=0.95),
    "refilled to the last group": history(dynamic_sampling__rounds=9.0),
    "entropy at the limit": history(entropy=0.01),
    "mismatch below half the limit": history(sampling__sampling_logp_difference__mean=0.0099),
    "clipping at the limit": history(clip_ratio__region_mean=0.1),
    "invalid at the limit": history(frac_reward_invalid=0.05),
    "fp16 looking for its loss scale": history(skipped_updates=2.0, grad_norm=math.nan, loss_scale=16384.0),
    "gradient below ten times": history(grad_norm=6.9),
    "held-out reward within the noise": evaluated(0.6, 0.56),
    "held-out and training reward fall together": evaluated(0.6, 0.4, reward_now=0.3),
    "held-out reward rises": evaluated(0.5, 0.6),
    "one slow step": history(time__generate=9.5),
    "training all the time, nothing to sample": [
        {k: v for k, v in row.items() if not k.startswith("sampling/")} for row in every(time__train=9.9)
    ],
    "memory that found its level": every(60, perf__peak_GiB=lambda step: 20.0 + min(step, 20)),
    "memory that creeps by less than 10%": every(60, perf__peak_GiB=lambda step: 20.0 + 0.03 * step),
    "memory in a short run": every(20, perf__peak_GiB=lambda step: 20.0 + step),
}


@pytest.mark.parametrize("name", QUIET)
def test_a_healthy_run_is_left_in_peace(name: str) -> None:
    assert check(QUIET[name]) == []


def test_every_rule_is_about_a_metric_that_its_trouble_has() -> None:
    for rule in RULES:
        assert any(rule.metric in row for row in TROUBLE[rule.name][0]), rule.name


def test_a_clipped_share_is_no_trouble_for_gspo() -> None:
    rows = history(clip_ratio__region_mean=0.3)
    assert check(rows, "gspo") == [] and [m.name for m in check(rows, "grpo")] == ["clipping"]


def test_a_held_out_reward_below_that_before_the_first_step_is_told() -> None:
    rows = [{"step": 0, "eval/reward": 0.5, "eval/reward_stderr": 0.02}]
    rows += every(20, reward=lambda step: 0.02 * step)
    assert [m.name for m in check([*rows, {"step": 20, "eval/reward": 0.3, "eval/reward_stderr": 0.02}])] == [
        "eval_falls"
    ]


def test_equal_rewards_beside_a_kl_term_are_told_though_the_gradient_is_not_zero() -> None:
    assert [m.name for m in check(history(frac_reward_zero_std=1.0, kl=0.01))] == ["equal_rewards"]


def test_null_read_back_from_json_is_not_finite() -> None:
    messages = check(history(loss=None))
    assert [m.name for m in messages] == ["not_finite"] and messages[0].text.startswith(
        "loss nan and gradient norm 0.8"
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


def test_each_rule_is_new_once_in_a_run_though_two_take_turns() -> None:
    monitor = HealthMonitor()
    shares = {1: 0.1, 2: 0.97, 3: 0.8, 4: 0.97, 5: 0.8, 6: 0.1, 7: 0.95}
    new = {step: monitor.step(step, {**HEALTHY, "completions/clipped_ratio": share}) for step, share in shares.items()}
    assert {step: [message.name for message in messages] for step, messages in new.items() if messages} == {
        2: ["truncation"],
        3: ["truncation_at_start"],
    }
    assert [message.name for message in monitor.active] == ["truncation"]  # still in the panel


def test_kto_learns_though_its_groups_have_one_completion() -> None:
    row = {**HEALTHY, "frac_reward_zero_std": 1.0, "kl": 0.1}
    assert [message.name for message in check([row])] == ["equal_rewards"]
    assert check([row | {"rewards/rejected": -0.5}]) == []


def test_what_applies_now_is_that_of_the_newest_step_and_of_an_evaluation_after_it() -> None:
    monitor = HealthMonitor()
    assert monitor.evaluation(0, {"eval/reward": 0.5, "eval/reward_stderr": 0.01}) == []
    for step in range(1, 7):
        monitor.step(step, {**HEALTHY, "reward": 0.1 * step, "completions/clipped_ratio": 0.97})
    assert [message.name for message in monitor.active] == ["truncation"]
    fell = monitor.evaluation(6, {"eval/reward": 0.3, "eval/reward_stderr": 0.01})
    assert [message.name for message in fell] == ["eval_falls"] and fell[0].text.startswith(
        "the held-out reward fell to 0"
    )
    assert [message.name for message in monitor.active] == ["truncation", "eval_falls"]
    assert monitor.evaluation(6, {"eval/reward": 0.2, "eval/reward_stderr": 0.01}) == []  # each rule once per run
    assert monitor.step(7, {**HEALTHY, "completions/clipped_ratio": 0.97}) == []  # not new: the evaluation is no step
    assert [message.name for message in monitor.active] == ["truncation"]


def test_the_monitor_knows_the_algorithm_and_numbers_the_steps_itself() -> None:
    row = {**HEALTHY, "clip_ratio/region_mean": 0.5}
    assert [len(HealthMonitor(algorithm).step(1, row)) for algorithm in ("grpo", "gspo")] == [1, 0]
    assert HealthMonitor().step(12, {"completions/clipped_ratio": 0.5, "step": 1.0}) == []


def test_the_monitor_keeps_no_more_rows_than_the_rules_use() -> None:
    monitor = HealthMonitor()
    for step in range(1, health.WINDOW + 50):
        monitor.step(step, HEALTHY)
    assert len(monitor._rows) == health.WINDOW and monitor._rows[-1]["step"] == health.WINDOW + 49
