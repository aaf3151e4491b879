"""What a run's numbers say about its health, in plain words with the number and the remedy. The rules are data.

A history is the list of metrics of a run, newest last: one dict per step or evaluation, as `Run.metrics()` gives it. A
number that was not finite is nan, inf or (read back from JSON) None. A reward that does not move is no alarm: hard
tasks start slowly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

History = Sequence[Mapping[str, Any]]
WINDOW = 50
"""Rows of the history that rules look at, at most."""
MISMATCH = "sampling/sampling_logp_difference/mean"


class Message(NamedTuple):
    """One thing to tell the user."""

    name: str
    """The rule it comes from: the same trouble has the same name at every step."""
    text: str


@dataclass(frozen=True)
class Rule:
    """`condition(history)` holds -> "sentence: advice", with metrics of the newest step filled in by name."""

    name: str
    sentence: str
    advice: str
    condition: Callable[[History], bool]


def finite(history: History, name: str) -> list[float]:
    """The finite values of a metric, oldest first."""
    found = (row.get(name) for row in history)
    return [float(v) for v in found if v is not None and math.isfinite(v)]


def newest(history: History, name: str) -> float | None:
    """The metric at the newest step; None where it was not logged or not finite."""
    value = history[-1].get(name) if history else None
    return float(value) if value is not None and math.isfinite(value) else None


def at_least(name: str, limit: float) -> Callable[[History], bool]:
    """The newest value is `limit` or more."""
    return lambda history: (value := newest(history, name)) is not None and value >= limit


def below(name: str, limit: float) -> Callable[[History], bool]:
    """The newest value is less than `limit`."""
    return lambda history: (value := newest(history, name)) is not None and value < limit


def equal_rewards(history: History) -> bool:
    """No group's rewards differ, and nothing but a KL term moves the weights.

    A run with one completion per prompt (SFT, REINFORCE) has equal groups at every step and learns all the same.
    """
    learns = newest(history, "grad_norm") != 0 and newest(history, "kl") is None
    return newest(history, "frac_reward_zero_std") == 1 and not learns


def mismatch_is_high(history: History) -> bool:
    """The mean mismatch is above half of what stops the run."""
    mean, limit = newest(history, MISMATCH), newest(history, "parity/limit")
    return mean is not None and limit is not None and mean > 0.5 * limit


def not_finite(history: History) -> bool:
    """Loss or gradient norm was logged and is no number, and yet the update was taken."""
    row = history[-1] if history else {}
    bad = any(name in row and newest(history, name) is None for name in ("loss", "grad_norm"))
    return bad and not newest(history, "skipped_updates")


def gradient_explodes(history: History) -> bool:
    """The gradient norm is above 1 and ten times the median of the steps before, of which there are at least five."""
    now, before = newest(history, "grad_norm"), finite(history[:-1], "grad_norm")
    return now is not None and len(before) >= 5 and now > 1 and now > 10 * median(before)


RULES = [
    Rule(
        "truncation",
        "{completions/clipped_ratio:.0%} of completions hit max_tokens",
        "raise sampling.max_tokens",
        at_least("completions/clipped_ratio", 0.9),
    ),
    Rule(
        "equal_rewards",
        "every group has equal rewards (mean {reward:.3g}), so they teach nothing",
        "use tasks that are solved now and then but not always, raise sampling.group_size, or check the reward",
        equal_rewards,
    ),
    Rule(
        "entropy",
        "entropy collapsed to {entropy:.2g} nat, so all samples of a prompt are becoming the same",
        "lower optim.lr, or stop here if the reward is where you want it",
        below("entropy", 0.01),
    ),
    Rule(
        "mismatch",
        f"engine and trainer disagree by {{{MISMATCH}:.2g}} nat per token, and the run stops at {{parity/limit:.2g}}",
        "if it keeps growing, lower optim.lr or set dtype to a more precise type",
        mismatch_is_high,
    ),
    Rule(
        "invalid_rewards",
        "{frac_reward_invalid:.0%} of rewards are invalid: a reward function failed, or none applies",
        "see rewards/*/invalid for which, and raise its timeout or mend it",
        lambda history: (share := newest(history, "frac_reward_invalid")) is not None and share > 0.05,
    ),
    Rule(
        "skipped_updates",
        "the gradient was not finite and the update was skipped ({skipped_updates:.0f} in a row)",
        "lower optim.lr, or look for extreme rewards",
        at_least("skipped_updates", 1),
    ),
    Rule(
        "not_finite",
        "loss {loss:.3g} and gradient norm {grad_norm:.3g} are not both finite",
        "lower optim.lr, or look for extreme rewards",
        not_finite,
    ),
    Rule(
        "gradient",
        "the gradient norm jumped to {grad_norm:.3g}, over ten times what is usual in this run",
        "if it happens again, lower optim.lr or optim.max_grad_norm",
        gradient_explodes,
    ),
]


class _Numbers(dict[str, float]):
    """The metrics of a row as numbers; a metric that is missing or null reads as nan."""

    def __missing__(self, name: str) -> float:
        return math.nan


def check(history: History) -> list[Message]:
    """What is wrong at the newest row of `history`; [] when nothing is."""
    recent = history[-WINDOW:]
    if not recent:
        return []
    numbers = _Numbers({k: v for k, v in recent[-1].items() if isinstance(v, int | float)})
    return [
        Message(rule.name, f"{rule.sentence}: {rule.advice}".format_map(numbers))
        for rule in RULES
        if rule.condition(recent)
    ]
