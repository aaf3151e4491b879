"""Rollouts -> rewards: one call per function per step, faults narrowed down to the rows that cause them.

A reward is what the functions returned, weighted and summed. None or nan means "not applicable". A row on which a
function raised, hung or died is *invalid*: its reward is nan, it is left out of the step and counted, never scored 0.
A failed batch is halved until only the guilty rows are left, within a deadline for the step. Functions that live in
processes of their own, and async ones, work at the same time.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlft.config import resolve
from rlft.config.data import Reward
from rlft.errors import RewardError
from rlft.rewards.parts import OVERLONG, Outcome, RewardBreakdown
from rlft.rewards.pool import Executor, InProcess, Loop, Subprocess
from rlft.rewards.worker import Reply, Signature
from rlft.types import Rollout

BUILTIN = "rlft.rewards.builtin"
"""The package with one file per reward that is named without a file."""
OURS = ("prompt", "completion", "completion_ids")
"""Columns that are not passed on, as in TRL: rewards get prompts, completions and completion_ids instead."""
DEADLINE = 4
"""A function may take this many times its timeout in one step, bisection included."""
RESTARTS = 60.0
"""Seconds of a step that may go into starting a function's process again; a file may take long to import."""


class RewardFunction:
    """A reward function with its weight, where it runs, and what it takes."""

    def __init__(self, name: str, place: Executor, reward: Reward, note: str = "") -> None:
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
        unused = [name for name in self.args if not self._signature.takes(name)]
        if unused:
            raise RewardError(f'reward "{self.name}" takes no argument {unused[0]}, which its args give')
        given = {*columns, *self.args, "trainer_state", "log_metric", "log_extra"}
        missing = [name for name in self._signature.required if name not in given]
        if missing:
            raise RewardError(
                f'reward "{self.name}" wants the argument {missing[0]}, and the dataset has no such column; it gets '
                f"{', '.join(sorted(given))}. Map columns with data.columns, or set it in the reward's args"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The arguments it names."""
        assert self._signature is not None
        return self._signature.names

    @property
    def apart(self) -> bool:
        """True when it runs in a process of its own."""
        return self._place.apart

    def start(self, columns: dict[str, list[Any]], constants: dict[str, Any]) -> None:
        """Begin the call on all rows of `columns`; `finish` gives what came of it."""
        assert self._signature is not None
        self._rows = len(columns["completions"])
        self._columns = {name: values for name, values in columns.items() if self._signature.takes(name)}
        constants = {**constants, **self.args}
        self._constants = {name: value for name, value in constants.items() if self._signature.takes(name)}
        if self._rows:
            self._place.start(self._columns, self._constants, self._rows, self.timeout)

    def finish(self) -> Outcome:
        """Rewards of all rows. Raises RewardError where the function itself is at fault."""
        outcome = Outcome([math.nan] * self._rows, [False] * self._rows)
        if not self._rows:
            return outcome
        every = list(range(self._rows))
        reply = self._place.finish()
        left, restarts = DEADLINE * self.timeout - reply.seconds, RESTARTS
        failed = deque([every] if not self._took(every, reply, outcome) else [])
        # Level by level: a half that is good is not kept waiting for what the other one costs.
        while failed:
            rows = failed.popleft()
            for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if len(rows) > 1 else ():
                if min(left, restarts) <= 0:
                    spent = f"{DEADLINE} x {self.timeout:g} s, and {RESTARTS:g} s to start its process again"
                    outcome.fail(half, f"no time left: a step allows {spent}")
                    continue
                began = time.monotonic()
                some = {name: [values[row] for row in half] for name, values in self._columns.items()}
                self._place.start(some, self._constants, len(half), min(self.timeout, left))
                reply = self._place.finish()
                if not self._took(half, reply, outcome):
                    failed.append(half)
                left -= reply.seconds
                restarts -= time.monotonic() - began - reply.seconds
        if all(outcome.invalid) and not self._proven:
            raise RewardError(f'reward "{self.name}" failed on every completion of its first call: {outcome.fault}')
        self._proven = self._proven or not all(outcome.invalid)
        return outcome

    def _took(self, rows: list[int], reply: Reply, outcome: Outcome) -> bool:
        """True when the call was good, or was of a single row, which then is invalid."""
        outcome.calls += 1
        outcome.seconds += reply.seconds
        if reply.kind == "bad" and not self._proven:
            raise RewardError(f'reward "{self.name}" {reply.text}')
        if reply.kind == "ok":
            outcome.take(rows, reply)
        elif len(rows) == 1:
            outcome.fail(rows, reply.text)
        return reply.kind == "ok" or len(rows) == 1


def build_rewards(rewards: Sequence[Any] | Reward | str | Callable[..., Any]) -> list[RewardFunction]:
    """The functions, imported and ready, with names that differ.

    rewards: one or several of a name, a function or other callable, and Reward, whose `use` may be the function itself.
    Raises RewardError and ConfigError for what is not there or cannot be called; what was started until then is closed.
    """
    if isinstance(rewards, Reward | str) or callable(rewards):
        rewards = [rewards]
    functions: list[RewardFunction] = []
    loop = Loop()
    try:
        for reward in rewards:
            function = _make(reward if isinstance(reward, Reward) else Reward(reward), loop)
            taken = [f.name for f in functions]
            names = itertools.chain([function.name], (f"{function.name}_{i}" for i in itertools.count(2)))
            function.name = next(name for name in names if name not in taken)
            functions.append(function)
            function.open()
    except BaseException:
        for function in functions:
            function.close()
        raise
    return functions


def _make(reward: Reward, loop: Loop) -> RewardFunction:
    use: Any = reward.use
    if isinstance(use, str):
        if ":" not in use:
            resolve.module(use, BUILTIN, "rewards")
            use = f"{BUILTIN}.{use}:{use}"
        return RewardFunction(use.rpartition(":")[2], Subprocess(use, reward.memory_mb), reward)
    if isinstance(use, torch.nn.Module) or not callable(use):
        raise RewardError(
            f"rewards: {type(use).__name__} is no reward function; give one, which may call a model: "
            f"def reward(prompts, completions, **columns) -> list[float]"
        )
    plain = use
    while isinstance(plain, functools.partial):
        plain = plain.func
    name = getattr(plain, "__name__", type(plain).__name__)
    target = _importable(use)
    if target is not None:
        return RewardFunction(name, Subprocess(target, reward.memory_mb), reward)
    if reward.memory_mb is not None:
        raise RewardError(f'reward "{name}": memory_mb needs a process of its own; put it in a file, as file.py:{name}')
    note = (
        f'reward "{name}" can only be called in this process (a closure, a lambda, an object or a function of '
        f"__main__), so it cannot be stopped when it hangs; put it in a file and name it file.py:{name} to change that"
    )
    return RewardFunction(name, InProcess(use, loop), reward, note)


def _importable(function: Callable[..., Any]) -> str | None:
    """ "module:name" when importing that gives this very function in another process too; None otherwise."""
    name, qualified = str(getattr(function, "__module__", "")), str(getattr(function, "__qualname__", ""))
    module = sys.modules.get(name)
    if module is None or name == "__main__" or not qualified.isidentifier():
        return None
    if getattr(module, qualified, None) is not function:
        return None
    # What is loaded says nothing: a file may have been loaded under a name that no import finds.
    path, origin = None, None
    parts = name.split(".")
    for i in range(len(parts)):
        found = (finder.find_spec(".".join(parts[: i + 1]), path) for finder in sys.meta_path)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None:
            return None
        path, origin = spec.submodule_search_locations, spec.origin
    return f"{name}:{qualified}" if origin == getattr(module, "__file__", None) else None


def score(
    rollouts: Sequence[Rollout], functions: Sequence[RewardFunction], trainer_state: dict[str, Any]
) -> tuple[Tensor, RewardBreakdown]:
    """The reward of each rollout, [N] float32, nan where invalid, and its parts.

    Without functions: the recorded rewards. A row is invalid when a function failed on it, or when none applies to it,
    the overlong penalty left aside. Raises RewardError for a function that is itself at fault.
    """
    if not functions:
        recorded = [r.recorded_reward for r in rollouts]
        assert None not in recorded, "no reward function and no recorded reward"
        total = torch.tensor(recorded, dtype=torch.float32)
        return total, RewardBreakdown(total, total, {})
    columns = columns_of(rollouts)
    constants = {"trainer_state": SimpleNamespace(**trainer_state)}
    for function in functions:
        function.check(columns)
    # Those elsewhere are started first and waited for last: a slow one does not add to the others.
    apart, here = [f for f in functions if f.apart], [f for f in functions if not f.apart]
    for function in (*apart, *here):
        function.start(columns, constants)
    finished = {function.name: function.finish() for function in (*here, *apart)}
    outcomes = {function.name: finished[function.name] for function in functions}
    total, answers = [], []
    for row in range(len(rollouts)):
        found = {f.name: f.weight * outcomes[f.name].values[row] for f in functions}
        applied = {name: value for name, value in found.items() if not math.isnan(value)}
        penalty = applied.pop(OVERLONG, 0.0)
        # A penalty alone is no reward: there is nothing that it could be taken off.
        invalid = not applied or any(outcomes[f.name].invalid[row] for f in functions)
        answers.append(math.nan if invalid else sum(applied.values()))
        total.append(math.nan if invalid else sum(applied.values()) + penalty)
    rewards = torch.tensor(total, dtype=torch.float32)
    return rewards, RewardBreakdown(rewards, torch.tensor(answers, dtype=torch.float32), outcomes)


def columns_of(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """What reward functions are called with, per completion: TRL's prompts, completions, completion_ids, and every
    other dataset column. A row whose prompt was messages gets message lists, one whose prompt was a string strings."""
    names = {name for r in rollouts for name in r.prompt.row if name not in OURS}
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
