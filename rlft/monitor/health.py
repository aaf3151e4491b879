"""Health rules: check the metrics of a run, and report problems with the number and the remedy.

A history is the list of metrics of a run, newest last: one dict per step or evaluation, as returned by `Run.metrics()`.
A number that was not finite is nan, inf or (read from JSON) None. A reward that does not move is not reported, since
hard tasks start slowly. Limits are based on values that other libraries publish for healthy runs.

The loop has a `HealthMonitor` check each step and evaluation, and passes its messages to the console and the trackers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any, NamedTuple

History = Sequence[Mapping[str, Any]]
WINDOW = 200
"""Largest number of history rows that rules use."""
MISMATCH = "sampling/sampling_logp_difference/mean"
FIRST = 10
"""Number of steps that count as the start of a run."""


class Message(NamedTuple):
    """A health message."""

    name: str
    """Name of the rule."""
    text: str


@dataclass(frozen=True)
class Rule:
    """A rule: if `condition(history)` is true, report "sentence: advice", formatted with the newest metrics."""

    name: str
    metric: str
    """The metric that the rule is about, whose curve the report marks."""
    sentence: str
    advice: str
    condition: Callable[[History], bool]
    not_for: str | None = None
    """Algorithm to which the rule does not apply."""


def finite(history: History, name: str) -> list[float]:
    """Return the finite values of a metric, oldest first."""
    values = (row.get(name) for row in history)
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def newest(history: History, name: str) -> float | None:
    """Return the metric at the newest step; None if not logged or not finite."""
    value = history[-1].get(name) if history else None
    return float(value) if value is not None and math.isfinite(value) else None


def at_least(name: str, limit: float) -> Callable[[History], bool]:
    """Return the condition that the newest value is `limit` or more."""
    return lambda history: (value := newest(history, name)) is not None and value >= limit


def above(name: str, limit: float) -> Callable[[History], bool]:
    """Return the condition that the newest value is above `limit`."""
    return lambda history: (value := newest(history, name)) is not None and value > limit


def below(name: str, limit: float) -> Callable[[History], bool]:
    """Return the condition that the newest value is below `limit`."""
    return lambda history: (value := newest(history, name)) is not None and value < limit


def at_start(history: History) -> bool:
    """Return True when the newest row is one of the first steps."""
    return (newest(history, "step") or math.inf) <= FIRST


def truncated_at_start(history: History) -> bool:
    """Return True when more than half of all completions in the first steps were truncated.

    Applies to the third to tenth step, if at least 30% of the newest completions were truncated; from 90% on the rule
    `truncation` applies.
    """
    shares, now = finite(history, "completions/clipped_ratio"), newest(history, "completions/clipped_ratio")
    return at_start(history) and now is not None and len(shares) >= 3 and mean(shares) > 0.5 and 0.3 <= now < 0.9


def too_hard(history: History) -> bool:
    """Return True when all rewards of at least the last ten steps are 0."""
    rewards, spread = finite(history, "reward"), finite(history, "reward_std")
    nothing = len(rewards) >= FIRST and not any(rewards) and not any(spread)
    return nothing and newest(history, "reward") == 0


def equal_rewards(history: History) -> bool:
    """Return True when all groups have equal rewards and nothing but a KL term moves the weights.

    A run with one completion per prompt (SFT, KTO, REINFORCE) has equal groups at every step and still learns.
    """
    judged = any(newest(history, f"rewards/{side}") is not None for side in ("chosen", "rejected"))
    learns = newest(history, "grad_norm") != 0 and (judged or newest(history, "kl") is None)
    return newest(history, "frac_reward_zero_std") == 1 and not learns and not too_hard(history)


def equal_share(history: History, rows: int) -> float:
    """Return the mean share of groups with equal rewards over the last `rows` steps; 0 with fewer steps.

    Also 0 if all groups of the newest step are equal, which another rule covers, or which is normal with one completion
    per prompt.
    """
    shares, now = finite(history, "frac_reward_zero_std")[-rows:], newest(history, "frac_reward_zero_std")
    return mean(shares) if len(shares) == rows and now is not None and now < 1 else 0.0


def too_easy(history: History) -> bool:
    """Return True when from the start over 80% of groups have equal rewards, and these are mostly high."""
    return at_start(history) and equal_share(history, 5) > 0.8 and mean(finite(history, "reward")) > 0.5


def few_groups(history: History) -> bool:
    """Return True when after the start, over ten steps, over 80% of groups have equal rewards."""
    return not at_start(history) and equal_share(history, 10) > 0.8


def mismatch_is_high(history: History) -> bool:
    """Return True when the mean mismatch is above half of the limit that stops the run."""
    size, limit = newest(history, MISMATCH), newest(history, "parity/limit")
    return size is not None and limit is not None and size > 0.5 * limit


def update_skipped(history: History) -> bool:
    """Return True when an update was skipped, except while fp16 searches for its loss scale."""
    return bool(newest(history, "skipped_updates")) and (newest(history, "loss_scale") or 1.0) <= 1.0


def not_finite(history: History) -> bool:
    """Return True when loss or gradient norm is not finite although the update was not skipped."""
    row = history[-1] if history else {}
    bad = any(name in row and newest(history, name) is None for name in ("loss", "grad_norm"))
    return bad and not newest(history, "skipped_updates")


def gradient_explodes(history: History) -> bool:
    """Return True when the gradient norm is above 1 and ten times the median of at least five earlier steps."""
    now, before = newest(history, "grad_norm"), finite(history[:-1], "grad_norm")
    return now is not None and len(before) >= 5 and now > 1 and now > 10 * median(before)


def takes_most(phase: str) -> Callable[[History], bool]:
    """Return the condition that a phase takes over 90% of each of the last five steps, in a run that samples."""

    def condition(history: History) -> bool:
        if newest(history, MISMATCH) is None or newest(history, phase) is None:
            return False
        steps = [row for row in history[-10:] if row.get(phase) is not None and row.get("step_time")][-5:]
        return len(steps) == 5 and all(row[phase] > 0.9 * row["step_time"] for row in steps)

    return condition


def memory_grows(history: History) -> bool:
    """Return True when peak memory keeps growing.

    Over at least 30 steps in five equal parts, the peak of each part is 1% above that of the previous part, and that of
    the last part is 10% above the first.
    """
    peaks = finite(history, "perf/peak_GiB")
    if newest(history, "perf/peak_GiB") is None or len(peaks) < 30:
        return False
    part = len(peaks) // 5
    tops = [max(peaks[len(peaks) - (5 - i) * part :][:part]) for i in range(5)]
    return tops[4] > 1.1 * tops[0] and all(later > 1.01 * earlier for earlier, later in pairwise(tops))


def eval_falls(history: History) -> bool:
    """Return True when the held-out reward falls and the training reward does not.

    The held-out reward is two standard errors below an earlier one, and the training reward fell by less than a quarter
    of that, if at all.
    """
    now = newest(history, "eval/reward")
    before = [(row["eval/reward"], i) for i, row in enumerate(history[:-1]) if finite([row], "eval/reward")]
    if now is None or not before:
        return False
    best, at = max(before)
    errors = finite([history[at], history[-1]], "eval/reward_stderr")
    fall = 2 * math.hypot(*errors) if len(errors) == 2 else 0.05 * abs(best)
    rewards = finite(history, "reward")
    then = finite(history[: at + 1], "reward")[-10:] or rewards[:10]
    return now < best - fall and len(rewards) > 0 and mean(rewards[-10:]) > mean(then) - 0.25 * (best - now)


RULES = [
    Rule(
        "truncation",
        "completions/clipped_ratio",
        "{completions/clipped_ratio:.0%} of completions hit max_tokens",
        "raise sampling.max_tokens",
        at_least("completions/clipped_ratio", 0.9),
    ),
    Rule(
        "truncation_at_start",
        "completions/clipped_ratio",
        "over half of the completions of the first steps hit max_tokens (now {completions/clipped_ratio:.0%}), so "
        "their answers are missing",
        "raise sampling.max_tokens, unless the reward is to teach shorter answers",
        truncated_at_start,
    ),
    Rule(
        "too_hard",
        "reward",
        "no completion of the last ten steps or more had a reward above 0",
        "start with easier tasks or a larger model, give part of the reward for partial success, or check the reward "
        "function with a right answer",
        too_hard,
    ),
    Rule(
        "too_easy",
        "frac_reward_zero_std",
        "{frac_reward_zero_std:.0%} of groups have equal rewards from the start, at a mean of {reward:.3g}, so most "
        "tasks are solved already",
        "use harder tasks, or set dynamic_sampling.rounds to draw others in their place",
        too_easy,
    ),
    Rule(
        "equal_rewards",
        "frac_reward_zero_std",
        "every group has equal rewards (mean {reward:.3g}), so they teach nothing",
        "use tasks that are solved now and then but not always, raise sampling.group_size, or check the reward",
        equal_rewards,
    ),
    Rule(
        "few_groups",
        "frac_reward_zero_std",
        "over 80% of groups had equal rewards in the last ten steps, so little of each step teaches",
        "set dynamic_sampling.rounds to draw other prompts in their place, or use tasks that are solved now and then",
        few_groups,
    ),
    Rule(
        "dynamic_sampling",
        "dynamic_sampling/short",
        "after {dynamic_sampling/rounds:.0f} rounds of dynamic sampling {dynamic_sampling/short:.0f} groups are still "
        "missing: {dynamic_sampling/kept:.0f} of {dynamic_sampling/drawn:.0f} drawn had rewards that differ",
        "raise dynamic_sampling.rounds, or use tasks that are solved now and then but not always",
        above("dynamic_sampling/short", 0),
    ),
    Rule(
        "entropy",
        "entropy",
        "entropy collapsed to {entropy:.2g} nat, so all samples of a prompt are becoming the same",
        "lower optim.lr, or stop here if the reward is where you want it",
        below("entropy", 0.01),
    ),
    Rule(
        "mismatch",
        MISMATCH,
        f"engine and trainer disagree by {{{MISMATCH}:.2g}} nat per token, and the run stops at {{parity/limit:.2g}}",
        "if it keeps growing, lower optim.lr or set dtype to a more precise type",
        mismatch_is_high,
    ),
    Rule(
        "clipping",
        "clip_ratio/region_mean",
        "the ratio of {clip_ratio/region_mean:.0%} of tokens is clipped, so their gradient is lost",
        "lower optim.lr, or take fewer updates per step (optim.minibatches, optim.passes)",
        above("clip_ratio/region_mean", 0.1),
        not_for="gspo",  # its clip range is so narrow that many sequences are clipped by design
    ),
    Rule(
        "invalid_rewards",
        "frac_reward_invalid",
        "{frac_reward_invalid:.0%} of rewards are invalid: a reward function failed, or none applies",
        "see rewards/*/invalid for which, and raise its timeout or fix it",
        above("frac_reward_invalid", 0.05),
    ),
    Rule(
        "nonfinite_logprobs",
        "sampling/nonfinite_logprobs",
        "{sampling/nonfinite_logprobs:.0f} sampled tokens have a log-prob that is not finite, so they are not trained",
        "look for what the engine computes otherwise: its dtype, quantised weights, or kernels",
        above("sampling/nonfinite_logprobs", 0),
    ),
    Rule(
        "skipped_updates",
        "grad_norm",
        "the gradient was not finite and the update was skipped ({skipped_updates:.0f} in a row)",
        "lower optim.lr, or look for extreme rewards",
        update_skipped,
    ),
    Rule(
        "not_finite",
        "loss",
        "loss {loss:.3g} and gradient norm {grad_norm:.3g} are not both finite",
        "lower optim.lr, or look for extreme rewards",
        not_finite,
    ),
    Rule(
        "gradient",
        "grad_norm",
        "the gradient norm jumped to {grad_norm:.3g}, over ten times what is usual in this run",
        "if it happens again, lower optim.lr or optim.max_grad_norm",
        gradient_explodes,
    ),
    Rule(
        "eval_falls",
        "eval/reward",
        "the held-out reward fell to {eval/reward:.3g} and the training reward did not, as when a policy learns the "
        "reward's weakness or the training rows by heart",
        "read the newest completions, compare the rewards of both, and keep the checkpoint before the fall",
        eval_falls,
    ),
    Rule(
        "slow_sampling",
        "time/generate",
        "sampling took {time/generate:.3g} of {step_time:.3g} s",
        "raise engine.batch_size where memory allows, lower sampling.max_tokens, or learn more from each batch with "
        "optim.minibatches",
        takes_most("time/generate"),
    ),
    Rule(
        "slow_training",
        "time/train",
        "training took {time/train:.3g} of {step_time:.3g} s",
        "raise packing.tokens_per_micro_batch where memory allows, or lower optim.passes if it is above 1",
        takes_most("time/train"),
    ),
    Rule(
        "memory",
        "perf/peak_GiB",
        "peak memory keeps growing and is {perf/peak_GiB:.3g} GiB now",
        "look for what a reward function or a callback keeps; completions that grow longer need more too",
        memory_grows,
    ),
]


class _Numbers(dict[str, float]):
    """The metrics of a row as numbers, with nan for missing ones."""

    def __missing__(self, name: str) -> float:
        return math.nan


def check(history: History, algorithm: str = "") -> list[Message]:
    """Return the health messages for the newest row of `history`. algorithm: `algo.name` of the run."""
    recent = history[-WINDOW:]
    if not recent:
        return []
    numbers = _Numbers({name: value for name, value in recent[-1].items() if isinstance(value, int | float)})
    return [
        Message(rule.name, f"{rule.sentence}: {rule.advice}".format_map(numbers))
        for rule in RULES
        if rule.not_for != algorithm and rule.condition(recent)
    ]


class HealthMonitor:
    """The health rules over a run, as it goes: the loop calls `step` and `evaluation` and passes the messages on."""

    def __init__(self, algorithm: str = "") -> None:
        """Start with an empty history, also for a resumed run. algorithm: `algo.name`, which some rules are not for."""
        self.active: list[Message] = []
        """Messages that apply now: those of the newest step and of an evaluation after it."""
        self._algorithm = algorithm
        self._rows: list[Mapping[str, Any]] = []
        self._reported: set[str] = set()
        """Names of the rules that were returned as new."""

    def step(self, step: int, values: Mapping[str, float]) -> list[Message]:
        """Check a finished step. Returns the messages of rules that apply for the first time in this run.

        values: the step's metrics, as in metrics.jsonl.
        """
        self.active = self._check(step, values)
        return self._new(self.active)

    def evaluation(self, step: int, values: Mapping[str, float]) -> list[Message]:
        """Check an evaluation after `step`; returns as `step` does. values: its eval/* metrics."""
        messages = self._check(step, values)
        self.active = [*self.active, *messages]
        return self._new(messages)

    def _new(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages of rules that were not reported yet, and remember them.

        A rule that comes and goes, or takes turns with another one, would fill a log with the same sentence.
        """
        new = [message for message in messages if message.name not in self._reported]
        self._reported |= {message.name for message in new}
        return new

    def _check(self, step: int, values: Mapping[str, float]) -> list[Message]:
        self._rows = [*self._rows, {**values, "step": float(step)}][-WINDOW:]
        return check(self._rows, self._algorithm)
