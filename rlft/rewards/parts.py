"""What reward functions made of a step: values, faults, what they logged; as metrics and as columns of the rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlft.rewards.worker import Reply

OVERLONG = "overlong"
"""Name of the penalty that overlong.penalty_share adds to the reward."""


@dataclass
class Outcome:
    """What one function made of a step."""

    values: list[float]
    """nan where not applicable or invalid."""
    invalid: list[bool]
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    fault: str = ""
    """Text of the first fault that a row was left out for."""
    seconds: float = 0.0
    """Time its calls took, added up."""
    calls: int = 0
    """1, and more where a failed batch was taken apart."""

    def take(self, rows: Sequence[int], reply: Reply) -> None:
        """Put in the rewards of a good call."""
        for row, value in zip(rows, reply.values, strict=True):
            self.values[row] = math.nan if value is None else value
        for name, logged in (reply.metrics or {}).items():
            self.metrics.setdefault(name, []).extend(logged)
        for name, column in (reply.extras or {}).items():
            whole = self.extras.setdefault(name, [None] * len(self.values))
            for row, value in zip(rows, column, strict=True):
                whole[row] = value

    def fail(self, rows: Sequence[int], fault: str) -> None:
        """Mark rows invalid."""
        self.fault = self.fault or fault
        for row in rows:
            self.invalid[row] = True

    def extend(self, other: Outcome) -> None:
        """Put the rows of another round behind these."""
        rows, more = len(self.values), len(other.values)
        self.values, self.invalid = self.values + other.values, self.invalid + other.invalid
        for name, logged in other.metrics.items():
            self.metrics.setdefault(name, []).extend(logged)
        for name in {**self.extras, **other.extras}:
            own, theirs = self.extras.get(name, [None] * rows), other.extras.get(name, [None] * more)
            self.extras[name] = own + theirs
        self.fault = self.fault or other.fault
        self.seconds += other.seconds
        self.calls += other.calls


@dataclass(frozen=True)
class RewardBreakdown:
    """The step's rewards taken apart."""

    total: Tensor
    """[N] float32, nan where invalid."""
    answers: Tensor
    """[N] float32: the same without the overlong penalty. Summed from the functions' values, since taking the penalty
    off `total` again leaves its rounding behind, and equal answers would differ."""
    outcomes: dict[str, Outcome]
    """By function name."""

    @staticmethod
    def join(rounds: Sequence[RewardBreakdown]) -> RewardBreakdown:
        """The parts of several rounds of one step as one. The first ones' outcomes are extended in place."""
        first, *others = rounds
        for other in others:
            for name, outcome in other.outcomes.items():
                first.outcomes[name].extend(outcome)
        total, answers = (torch.cat(each) for each in zip(*((r.total, r.answers) for r in rounds), strict=True))
        return RewardBreakdown(total, answers, first.outcomes)

    def metrics(self) -> dict[str, float]:
        """TRL's reward metrics: over valid rows, before any filtering."""
        logged: dict[str, list[float]] = {}
        for outcome in self.outcomes.values():
            for name, numbers in outcome.metrics.items():
                logged.setdefault(name, []).extend(numbers)
        values = {name: sum(numbers) / len(numbers) for name, numbers in logged.items()}
        values |= {"reward": _mean(self.total), "reward_std": _std(self.total)}
        for name, outcome in self.outcomes.items():
            own = torch.tensor(outcome.values, dtype=torch.float64)
            values |= {
                f"rewards/{name}/mean": _mean(own),
                f"rewards/{name}/std": _std(own),
                f"rewards/{name}/invalid": float(sum(outcome.invalid)),
                f"time/reward/{name}": outcome.seconds,
            }
        return values

    def deciding(self, by: str | None) -> Tensor:
        """[N] float32, what must differ within a group under dynamic sampling: the values of the function `by`, or the
        reward without the overlong penalty, which tells lengths apart and not answers. nan where invalid."""
        return self.answers if by is None else torch.tensor(self.outcomes[by].values, dtype=torch.float32)

    def columns(self) -> dict[str, list[Any]]:
        """For the rollouts file: each function's rewards, and the columns it logged."""
        found: dict[str, list[Any]] = {name: outcome.values for name, outcome in self.outcomes.items()}
        for name, outcome in self.outcomes.items():
            found |= {f"{name}/{column}": values for column, values in outcome.extras.items()}
        return found

    def faults(self) -> list[str]:
        """One line per function that failed on some rows, and one for rows to which no function applied."""
        found = [
            f'reward "{name}" failed on {sum(o.invalid)} of {len(o.invalid)} completions, which are left out: {o.fault}'
            for name, o in self.outcomes.items()
            if any(o.invalid)
        ]
        failed = [any(o.invalid[row] for o in self.outcomes.values()) for row in range(len(self.total))]
        none = sum(math.isnan(total) and not bad for total, bad in zip(self.total.tolist(), failed, strict=True))
        if none:
            found.append(
                f"no reward function applied to {none} of {len(failed)} completions (None), which are left out"
            )
        return found


def _mean(values: Tensor) -> float:
    valid = _valid(values)
    if not valid:
        return math.nan
    # The mean of equal numbers is that number, and their std 0, which rounding would miss.
    return valid[0] if min(valid) == max(valid) else sum(valid) / len(valid)


def _std(values: Tensor) -> float:
    valid = _valid(values)
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in valid) / (len(valid) - 1)) if len(valid) > 1 else 0.0


def _valid(values: Tensor) -> list[float]:
    # Python, since a step has some hundred: each operation of PyTorch takes longer to begin than this to end.
    return [value for value in values.tolist() if value == value]
