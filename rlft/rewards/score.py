"""Rollouts -> rewards: one call per function per step, faults narrowed down to the rows that cause them.

A reward is what the functions returned, weighted and summed. None or nan means "not applicable". A row on which a
function raised, hung or died is *invalid*: its reward is nan, it is left out of the step and counted, never scored 0.
A failed batch is halved until only the guilty rows are left, within a deadline for the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlft import resolve
from rlft.config import Reward
from rlft.errors import RewardError
from rlft.rewards.pool import InThread, InWorker, Place
from rlft.rewards.worker import Reply, Signature
from rlft.types import Rollout

PARTS = ("score", "pool", "worker")
"""Files of rlft.rewards that are not rewards."""
RECORDED = ("prompt", "completion", "chosen", "rejected", "messages", "text")
"""Columns that made the prompt and the recorded completions: rewards get prompts and completions instead."""
OVERLONG = "overlong"
"""Name of the penalty that overlong.penalty_share adds to the reward."""
DEADLINE = 4
"""A function may take this many times its timeout in one step, bisection included."""


class RewardFunction:
    """A reward function with its weight, where it runs, and what it takes."""

    def __init__(self, name: str, place: Place, reward: Reward, note: str = "") -> None:
        """reward: weight, timeout and args; `use` was resolved to `place`."""
        self.name, self.weight, self.timeout, self.args = name, reward.weight, reward.timeout, reward.args
        self.note = note
        """Said once at the start of a run; empty where there is nothing to say."""
        self._place = place
        self._signature: Signature | None = None
        self._proven = False
        """True after its first good call: what goes wrong from then on is the fault of rows, not of the function."""

    def open(self) -> None:
        """Import it. Raises RewardError when that fails."""
        self._signature = self._place.open()

    def close(self) -> None:
        """End its process."""
        self._place.close()

    def check(self, columns: dict[str, list[Any]]) -> None:
        """Raise RewardError when it wants an argument that nothing provides, or does not take one from its args."""
        assert self._signature is not None
        unused = [name for name in self.args if not self._signature.takes_all and name not in self._signature.names]
        if unused:
            raise RewardError(f'reward "{self.name}" takes no argument {unused[0]}, which its args give')
        given = {*columns, *self.args, "trainer_state", "log_metric", "log_extra"}
        missing = [name for name in self._signature.required if name not in given]
        if missing:
            raise RewardError(
                f'reward "{self.name}" wants the argument {missing[0]}, and the dataset has no such column; it gets '
                f"{', '.join(sorted(given))}. Map columns with data.columns, or set it in the reward's args"
            )

    def score(self, columns: dict[str, list[Any]], constants: dict[str, Any]) -> Outcome:
        """Rewards of all rows of `columns`. Raises RewardError where the function itself is at fault."""
        rows = len(columns["completions"])
        outcome = Outcome([math.nan] * rows, [False] * rows)
        deadline = time.monotonic() + DEADLINE * self.timeout
        constants = {**constants, **self.args}
        self._narrow(list(range(rows)), columns, constants, deadline, outcome)
        if rows and all(outcome.invalid) and not self._proven:
            raise RewardError(f'reward "{self.name}" failed on every completion of its first call: {outcome.fault}')
        self._proven = self._proven or not all(outcome.invalid)
        return outcome

    def _narrow(self, rows: list[int], columns: dict[str, list[Any]], constants: dict[str, Any], deadline: float,
                outcome: Outcome) -> None:  # fmt: skip
        """Score `rows`, halving them where the call fails."""
        left = deadline - time.monotonic()
        if left <= 0:
            outcome.fail(rows, f"no time left: the step allows {DEADLINE} x {self.timeout:g} s")
            return
        some = {name: [values[row] for row in rows] for name, values in columns.items()}
        reply = self._place.call(some, constants, min(self.timeout, left))
        if reply.kind == "bad" and not self._proven:
            raise RewardError(f'reward "{self.name}" {reply.text}')
        if reply.kind == "ok":
            outcome.take(rows, reply)
        elif len(rows) == 1:
            outcome.fail(rows, reply.text)
        else:
            half = len(rows) // 2
            self._narrow(rows[:half], columns, constants, deadline, outcome)
            self._narrow(rows[half:], columns, constants, deadline, outcome)


@dataclass
class Outcome:
    """What one function made of a step."""

    values: list[float]
    """nan where not applicable or invalid."""
    invalid: list[bool]
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    fault: str = ""
    """Text of the last fault."""
    seconds: float = 0.0

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
        self.fault = fault
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
        self.fault = other.fault or self.fault
        self.seconds += other.seconds


@dataclass(frozen=True)
class Parts:
    """The step's rewards taken apart."""

    total: Tensor
    """[N] float32, nan where invalid."""
    outcomes: dict[str, Outcome]
    """By function name."""

    @staticmethod
    def join(rounds: Sequence[Parts]) -> Parts:
        """The parts of several rounds of one step as one. The first ones' outcomes are extended in place."""
        first, *others = rounds
        for other in others:
            for name, outcome in other.outcomes.items():
                first.outcomes[name].extend(outcome)
        return Parts(torch.cat([part.total for part in rounds]), first.outcomes)

    def metrics(self) -> dict[str, float]:
        """TRL's reward metrics: over valid rows, before any filtering."""
        values = {"reward": _mean(self.total), "reward_std": _std(self.total)}
        for name, outcome in self.outcomes.items():
            own = torch.tensor(outcome.values, dtype=torch.float64)
            values |= {
                f"rewards/{name}/mean": _mean(own),
                f"rewards/{name}/std": _std(own),
                f"rewards/{name}/invalid": float(sum(outcome.invalid)),
                f"time/reward/{name}": outcome.seconds,
            }
            values |= {key: sum(logged) / len(logged) for key, logged in outcome.metrics.items()}
        return values

    def deciding(self, by: str | None) -> Tensor:
        """[N], what must differ within a group under dynamic sampling: the values of the function `by`, or the reward
        without the overlong penalty, which tells lengths apart and not answers. nan where invalid."""
        if by is not None:
            return torch.tensor(self.outcomes[by].values)
        penalty = self.outcomes.get(OVERLONG)
        return self.total if penalty is None else self.total - torch.tensor(penalty.values)

    def columns(self) -> dict[str, list[Any]]:
        """For the rollouts file: each function's rewards, and the columns it logged."""
        found: dict[str, list[Any]] = {name: outcome.values for name, outcome in self.outcomes.items()}
        for name, outcome in self.outcomes.items():
            found |= {f"{name}/{column}": values for column, values in outcome.extras.items()}
        return found

    def faults(self) -> list[str]:
        """One line per function that failed on some rows."""
        return [
            f'reward "{name}" failed on {sum(o.invalid)} of {len(o.invalid)} completions, which are left out: {o.fault}'
            for name, o in self.outcomes.items()
            if any(o.invalid)
        ]


def _mean(values: Tensor) -> float:
    return float(values.nanmean())


def _std(values: Tensor) -> float:
    valid = values[~values.isnan()]
    return float(valid.std()) if len(valid) > 1 else 0.0


def build(rewards: Sequence[Reward | str | Callable[..., Any]]) -> list[RewardFunction]:
    """The functions, imported and ready, with names that differ. Raises RewardError and ConfigError for what is not
    there; what was started until then is closed."""
    functions: list[RewardFunction] = []
    try:
        for reward in rewards:
            function = _make(Reward(reward) if isinstance(reward, str) else reward)
            taken = [f.name for f in functions]
            if function.name in taken:
                function.name += f"_{1 + sum(n.rstrip('_0123456789') == function.name for n in taken)}"
            functions.append(function)
            function.open()
    except BaseException:
        for function in functions:
            function.close()
        raise
    return functions


def _make(reward: Reward | Callable[..., Any]) -> RewardFunction:
    if isinstance(reward, Reward):
        target = reward.use
        if ":" not in target:
            resolve.module(target, "rlft.rewards", "rewards", hide=PARTS)
            target = f"rlft.rewards.{target}:{target}"
        name = target.rpartition(":")[2]
        return RewardFunction(name, InWorker(target, reward.memory_mb), reward)
    name = getattr(reward, "__name__", type(reward).__name__)
    target = _importable(reward)
    if target is not None:
        return RewardFunction(name, InWorker(target), Reward(target))
    note = (
        f'reward "{name}" can only be called in this process (a closure, a lambda or a function of __main__), so it '
        f"cannot be stopped when it hangs; put it in a file and name it file.py:{name} to change that"
    )
    return RewardFunction(name, InThread(reward), Reward(name), note)


def _importable(function: Callable[..., Any]) -> str | None:
    """ "module:name" when importing that gives this very function in another process too; None otherwise."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or not name.isidentifier():
        return None
    import importlib.util
    import sys

    if importlib.util.find_spec(module) is None or getattr(sys.modules.get(module), name, None) is not function:
        return None
    return f"{module}:{name}"


def score(
    rollouts: Sequence[Rollout], functions: Sequence[RewardFunction], trainer_state: dict[str, Any]
) -> tuple[Tensor, Parts]:
    """The reward of each rollout, [N] float32, nan where invalid, and its parts.

    Without functions: the recorded rewards. A row is invalid when a function failed on it, or when none applies to it.
    Raises RewardError for a function that is itself at fault.
    """
    if not functions:
        recorded = [r.recorded_reward for r in rollouts]
        assert None not in recorded, "no reward function and no recorded reward"
        total = torch.tensor(recorded, dtype=torch.float32)
        return total, Parts(total, {})
    columns = columns_of(rollouts)
    constants = {"trainer_state": SimpleNamespace(**trainer_state)}
    outcomes: dict[str, Outcome] = {}
    for function in functions:
        function.check(columns)
        start = time.monotonic()
        outcomes[function.name] = function.score(columns, constants)
        outcomes[function.name].seconds = time.monotonic() - start
    total = []
    for row in range(len(rollouts)):
        found = [(f.weight, outcomes[f.name].values[row]) for f in functions]
        applied = [weight * value for weight, value in found if not math.isnan(value)]
        invalid = not applied or any(outcomes[f.name].invalid[row] for f in functions)
        total.append(math.nan if invalid else sum(applied))
    rewards = torch.tensor(total, dtype=torch.float32)
    return rewards, Parts(rewards, outcomes)


def columns_of(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """What reward functions are called with, per completion: TRL's prompts, completions, completion_ids, and every
    other dataset column. A row whose prompt was messages gets message lists, one whose prompt was a string strings."""
    names = {name for r in rollouts for name in r.prompt.row if name not in RECORDED}
    columns: dict[str, list[Any]] = {name: [r.prompt.row.get(name) for r in rollouts] for name in sorted(names)}
    columns["prompts"] = [_prompt(r) for r in rollouts]
    columns["completions"] = [
        [{"role": "assistant", "content": r.text}] if isinstance(_prompt(r), list) else r.text for r in rollouts
    ]
    columns["completion_ids"] = [list(r.completion_ids) for r in rollouts]
    return columns


def _prompt(rollout: Rollout) -> Any:
    given = rollout.prompt.row.get("prompt")
    if given is None:
        return [dict(m) for m in rollout.prompt.messages or ()]
    return given


def check_invalid(history: list[float], share: float, faults: Sequence[str] = ()) -> None:
    """Note the share of invalid rewards of a step in `history` (the last five are kept), and stop where it is too much.

    Raises RewardError (exit code 3) when every reward of the step is invalid, or more than half of five steps'.
    """
    history.append(share)
    del history[:-5]
    average = sum(history) / len(history)
    if share < 1 and not (len(history) == 5 and average > 0.5):
        return
    what = "every reward of this step is" if share == 1 else f"{average:.0%} of the rewards of the last five steps are"
    error = RewardError(f"{what} invalid, so there is nothing to learn from. {' '.join(faults)}".rstrip())
    error.exit_code = 3
    raise error
