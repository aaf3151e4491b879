"""Results of the reward functions in a step: values, faults and logs, as metrics and as outcomes of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlft.rewards.protocol import Reply
from rlft.types import Outcome, Sample

OVERLONG = "overlong"
"""Name of the penalty that overlong.penalty_share adds to the reward."""
CUSTOM = "custom/"
"""Prefix of the metrics that reward functions log. No metric of rlft has it, so that none can be replaced."""


@dataclass
class FunctionScores:
    """Result of one reward function for a step."""

    values: list[float]
    """nan where not applicable or invalid."""
    invalid: list[bool]
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    fault: str = ""
    """Text of the first fault that made a row invalid."""
    seconds: float = 0.0
    """Total time of its calls."""
    calls: int = 0
    """Number of calls: 1, or more when a failed batch was bisected or groups were scored one by one."""
    nans: int = 0
    """Rows for which it returned nan, and not None."""

    def take(self, rows: Sequence[int], reply: Reply) -> None:
        """Store the rewards of a successful call."""
        for row, value in zip(rows, reply.values, strict=True):
            self.values[row] = math.nan if value is None else value
            self.nans += value is not None and math.isnan(value)
        for name, numbers in (reply.metrics or {}).items():
            self.metrics.setdefault(name, []).extend(numbers)
        for name, column in (reply.extras or {}).items():
            full_column = self.extras.setdefault(name, [None] * len(self.values))
            for row, value in zip(rows, column, strict=True):
                full_column[row] = value

    def fail(self, rows: Sequence[int], fault: str) -> None:
        """Mark rows invalid."""
        self.fault = self.fault or fault
        for row in rows:
            self.invalid[row] = True

    def outcome(self, row: int) -> Outcome:
        """Return the result for one row."""
        return Outcome(self.values[row], self.invalid[row], {name: column[row] for name, column in self.extras.items()})

    def place(self, rows: Sequence[int], part: FunctionScores) -> None:
        """Store the result of a call on some of the rows, in the order of the call."""
        for row, value, invalid in zip(rows, part.values, part.invalid, strict=True):
            self.values[row], self.invalid[row] = value, invalid
        for name, numbers in part.metrics.items():
            self.metrics.setdefault(name, []).extend(numbers)
        for name, column in part.extras.items():
            full_column = self.extras.setdefault(name, [None] * len(self.values))
            for row, value in zip(rows, column, strict=True):
                full_column[row] = value
        self._count(part)

    def _count(self, other: FunctionScores) -> None:
        self.fault = self.fault or other.fault
        self.seconds += other.seconds
        self.calls += other.calls
        self.nans += other.nans

    def extend(self, other: FunctionScores) -> None:
        """Append the rows of another round."""
        rows, other_rows = len(self.values), len(other.values)
        self.values, self.invalid = self.values + other.values, self.invalid + other.invalid
        for name, numbers in other.metrics.items():
            self.metrics.setdefault(name, []).extend(numbers)
        for name in {**self.extras, **other.extras}:
            first, second = self.extras.get(name, [None] * rows), other.extras.get(name, [None] * other_rows)
            self.extras[name] = first + second
        self._count(other)


@dataclass(frozen=True)
class RewardBreakdown:
    """The rewards of a step and their parts by function."""

    total: Tensor
    """[N] float32, nan where invalid."""
    answers: Tensor
    """[N] float32: the rewards without the overlong penalty. Summed from the functions' values, since subtracting the
    penalty from `total` leaves a rounding error, by which equal answers would differ."""
    outcomes: dict[str, FunctionScores]
    """By function name."""

    @staticmethod
    def join(rounds: Sequence[RewardBreakdown]) -> RewardBreakdown:
        """Concatenate the breakdowns of several rounds of a step. The outcomes of the first are extended in place."""
        first, *others = rounds
        for other in others:
            for name, outcome in other.outcomes.items():
                first.outcomes[name].extend(outcome)
        total, answers = (
            torch.cat(tensors) for tensors in zip(*((round_.total, round_.answers) for round_ in rounds), strict=True)
        )
        return RewardBreakdown(total, answers, first.outcomes)

    def metrics(self) -> dict[str, float]:
        """Return TRL's reward metrics, over valid rows before any filtering, and custom/NAME for log_metric(NAME).

        A custom metric is the mean of all values logged under the name in the step, by whichever function.
        """
        by_name: dict[str, list[float]] = {}
        for outcome in self.outcomes.values():
            for name, numbers in outcome.metrics.items():
                by_name.setdefault(name, []).extend(numbers)
        values = {f"{CUSTOM}{name}": sum(numbers) / len(numbers) for name, numbers in by_name.items()}
        values |= {"reward": _mean(self.total), "reward_std": _std(self.total)}
        for name, outcome in self.outcomes.items():
            rewards = torch.tensor(outcome.values, dtype=torch.float64)
            values |= {
                f"rewards/{name}/mean": _mean(rewards),
                f"rewards/{name}/std": _std(rewards),
                f"rewards/{name}/invalid": float(sum(outcome.invalid)),
                f"time/reward/{name}": outcome.seconds,
            }
        return values

    def store(self, samples: Sequence[Sample]) -> None:
        """Set reward, answer and outcomes of the samples that were scored, in the same order."""
        totals, answers = self.total.tolist(), self.answers.tolist()
        for row, sample in enumerate(samples):
            sample.reward, sample.answer = totals[row], answers[row]
            sample.outcomes = {name: scores.outcome(row) for name, scores in self.outcomes.items()}

    def faults(self) -> list[str]:
        """Return one line per function that failed on some rows, and one for rows to which no function applied."""
        lines = [
            f'reward "{name}" failed on {sum(outcome.invalid)} of {len(outcome.invalid)} completions, '
            f"which are left out: {outcome.fault}"
            for name, outcome in self.outcomes.items()
            if any(outcome.invalid)
        ]
        row_failed = [any(outcome.invalid[row] for outcome in self.outcomes.values()) for row in range(len(self.total))]
        unscored = sum(
            math.isnan(total) and not has_failed
            for total, has_failed in zip(self.total.tolist(), row_failed, strict=True)
        )
        if unscored:
            nans = [f'"{name}"' for name, outcome in self.outcomes.items() if outcome.nans]
            returned = f"nan from {', '.join(nans)}" if nans else "None"
            lines.append(
                f"no reward function applied to {unscored} of {len(row_failed)} completions ({returned}), which are "
                f"left out"
            )
        return lines


def score_columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Return reward, rewards/NAME of each function with what it logged, and advantage: one value per sample."""
    outcomes = reward_columns(samples)
    return {
        "reward": [sample.reward for sample in samples],
        **{f"rewards/{name}": values for name, values in outcomes.items()},
        "advantage": [sample.advantage for sample in samples],
    }


def reward_columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Return the rewards of each function by its name, and the columns it logged (None where it did not)."""
    functions = list(samples[0].outcomes) if samples else []
    columns: dict[str, list[Any]] = {name: [sample.outcomes[name].value for sample in samples] for name in functions}
    for name in functions:
        extras = [sample.outcomes[name].extras for sample in samples]
        for column in dict.fromkeys(column for logged in extras for column in logged):
            # The rewards of a function named "a/b" stay.
            columns.setdefault(f"{name}/{column}", [logged.get(column) for logged in extras])
    return columns


def _mean(values: Tensor) -> float:
    valid = _valid(values)
    if not valid:
        return math.nan
    # For equal numbers the mean must be that number exactly, so that the std is 0 despite rounding.
    return valid[0] if min(valid) == max(valid) else sum(valid) / len(valid)


def _std(values: Tensor) -> float:
    valid = _valid(values)
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in valid) / (len(valid) - 1)) if len(valid) > 1 else 0.0


def _valid(values: Tensor) -> list[float]:
    # In Python, since for a few hundred values the launch overhead of PyTorch operations is larger than this.
    return [value for value in values.tolist() if value == value]
