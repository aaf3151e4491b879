"""Score rollouts: one call per reward function and step, with faults bisected to the rows that cause them.

A reward is the weighted sum of the functions' results. None or nan means "not applicable". A row on which a function
raised, hung or died is *invalid*: its reward is nan, and it is excluded from the step and counted, never scored 0. A
failed batch is bisected down to the rows at fault, within a deadline for the step. Functions in separate processes and
async functions run concurrently.
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
from rlft.rewards.parts import OVERLONG, FunctionScores, RewardBreakdown
from rlft.rewards.pool import Executor, InProcess, Loop, Subprocess
from rlft.rewards.worker import Reply, Signature
from rlft.types import Rollout, Sample

BUILTIN = "rlft.rewards.builtin"
"""Package with one file per built-in reward."""
OURS = ("prompt", "completion", "completion_ids")
"""Columns that are not passed to rewards, as in TRL: these get prompts, completions and completion_ids instead."""
DEADLINE = 4
"""Deadline of a function per step, in multiples of its timeout, including bisection."""
RESTARTS = 60.0
"""Seconds per step for restarting a function's process, since a file may take long to import."""


class RewardFunction:
    """A reward function with its weight, executor and signature."""

    def __init__(self, name: str, place: Executor, reward: Reward, note: str = "") -> None:
        """Set up the function. reward: weight, timeout and args; its `use` is resolved to `place`."""
        self.name, self.weight, self.timeout, self.args = name, reward.weight, reward.timeout, reward.args
        self.note = note
        """Message for the start of a run; may be empty."""
        self._place = place
        self._signature: Signature | None = None
        self._proven = False
        """True after the first successful call: later faults are attributed to rows, not to the function."""

    def open(self) -> None:
        """Import the function. Raises RewardError when that fails."""
        self._signature = self._place.open()

    def close(self) -> None:
        """Stop the executor."""
        self._place.close()

    def check(self, columns: dict[str, list[Any]]) -> None:
        """Raise RewardError for a required argument that nothing provides, or for args the function does not take."""
        assert self._signature is not None
        rejected = [name for name in self.args if not self._signature.takes(name)]
        if rejected:
            raise RewardError(f'reward "{self.name}" takes no argument {rejected[0]}, which its args give')
        available = {*columns, *self.args, "trainer_state", "log_metric", "log_extra"}
        missing = [name for name in self._signature.required if name not in available]
        if missing:
            raise RewardError(
                f'reward "{self.name}" wants the argument {missing[0]}, and the dataset has no such column; it gets '
                f"{', '.join(sorted(available))}. Map columns with data.columns, or set it in the reward's args"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the function's parameters."""
        assert self._signature is not None
        return self._signature.names

    @property
    def apart(self) -> bool:
        """True when the function runs in a separate process."""
        return self._place.apart

    def start(self, columns: dict[str, list[Any]], constants: dict[str, Any]) -> None:
        """Start the call on all rows of `columns`; `finish` returns the result."""
        assert self._signature is not None
        self._rows = len(columns["completions"])
        self._columns = {name: values for name, values in columns.items() if self._signature.takes(name)}
        constants = {**constants, **self.args}
        self._constants = {name: value for name, value in constants.items() if self._signature.takes(name)}
        if self._rows:
            self._place.start(self._columns, self._constants, self._rows, self.timeout)

    def finish(self) -> FunctionScores:
        """Return the rewards of all rows. Raises RewardError when the function itself is at fault."""
        outcome = FunctionScores([math.nan] * self._rows, [False] * self._rows)
        if not self._rows:
            return outcome
        all_rows = list(range(self._rows))
        reply = self._place.finish()
        remaining, restarts = DEADLINE * self.timeout - reply.seconds, RESTARTS
        queue = deque([all_rows] if not self._store(all_rows, reply, outcome) else [])
        # Breadth first, so that a good half is not delayed by the cost of the other half.
        while queue:
            rows = queue.popleft()
            for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if len(rows) > 1 else ():
                if min(remaining, restarts) <= 0:
                    spent = f"{DEADLINE} x {self.timeout:g} s, and {RESTARTS:g} s to start its process again"
                    outcome.fail(half, f"no time left: a step allows {spent}")
                    continue
                start = time.monotonic()
                subset = {name: [values[row] for row in half] for name, values in self._columns.items()}
                self._place.start(subset, self._constants, len(half), min(self.timeout, remaining))
                reply = self._place.finish()
                if not self._store(half, reply, outcome):
                    queue.append(half)
                remaining -= reply.seconds
                restarts -= time.monotonic() - start - reply.seconds
        if all(outcome.invalid) and not self._proven:
            raise RewardError(f'reward "{self.name}" failed on every completion of its first call: {outcome.fault}')
        self._proven = self._proven or not all(outcome.invalid)
        return outcome

    def _store(self, rows: list[int], reply: Reply, outcome: FunctionScores) -> bool:
        """Store the result of a call. Returns True when it succeeded or had a single row, which is then invalid."""
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
    """Build the reward functions, imported and with distinct names.

    rewards: one or several names, callables or Reward objects, whose `use` may be a callable. Raises RewardError and
    ConfigError for functions that do not exist or cannot be called, after closing those already started.
    """
    if isinstance(rewards, Reward | str) or callable(rewards):
        rewards = [rewards]
    functions: list[RewardFunction] = []
    loop = Loop()
    try:
        for reward in rewards:
            function = _make(reward if isinstance(reward, Reward) else Reward(reward), loop)
            used_names = [other.name for other in functions]
            names = itertools.chain([function.name], (f"{function.name}_{i}" for i in itertools.count(2)))
            function.name = next(name for name in names if name not in used_names)
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
        raise RewardError(f'reward "{name}": memory_mb needs a separate process; put it in a file, as file.py:{name}')
    note = (
        f'reward "{name}" can only be called in this process (a closure, a lambda, an object or a function of '
        f"__main__), so it cannot be stopped when it hangs; put it in a file and name it file.py:{name} to change that"
    )
    return RewardFunction(name, InProcess(use, loop), reward, note)


def _importable(function: Callable[..., Any]) -> str | None:
    """Return "module:name" if another process can import this very function by it; None otherwise."""
    name, qualname = str(getattr(function, "__module__", "")), str(getattr(function, "__qualname__", ""))
    module = sys.modules.get(name)
    if module is None or name == "__main__" or not qualname.isidentifier():
        return None
    if getattr(module, qualname, None) is not function:
        return None
    # sys.modules is not enough: a file may have been loaded under a name that cannot be imported.
    path, origin = None, None
    parts = name.split(".")
    for i in range(len(parts)):
        specs = (finder.find_spec(".".join(parts[: i + 1]), path) for finder in sys.meta_path)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None:
            return None
        path, origin = spec.submodule_search_locations, spec.origin
    return f"{name}:{qualname}" if origin == getattr(module, "__file__", None) else None


def score_samples(
    samples: Sequence[Sample], functions: Sequence[RewardFunction], trainer_state: dict[str, Any]
) -> RewardBreakdown:
    """Set reward, answer and outcomes of the samples, and return the breakdown by function. Raises as `score`."""
    _, parts = score([sample.rollout for sample in samples], functions, trainer_state)
    parts.store(samples)
    return parts


def score(
    rollouts: Sequence[Rollout], functions: Sequence[RewardFunction], trainer_state: dict[str, Any]
) -> tuple[Tensor, RewardBreakdown]:
    """Compute the reward of each rollout, [N] float32, nan where invalid, and its breakdown.

    Without functions these are the recorded rewards. A row is invalid when a function failed on it, or when no function
    except the overlong penalty applies to it. Raises RewardError for a function that is itself at fault.
    """
    if not functions:
        recorded_rewards = [rollout.recorded_reward for rollout in rollouts]
        assert None not in recorded_rewards, "no reward function and no recorded reward"
        total = torch.tensor(recorded_rewards, dtype=torch.float32)
        return total, RewardBreakdown(total, total, {})
    columns = columns_of(rollouts)
    constants = {"trainer_state": SimpleNamespace(**trainer_state)}
    for function in functions:
        function.check(columns)
    # Functions in other processes are started first and waited for last, so that they overlap with those here.
    apart, here = [each for each in functions if each.apart], [each for each in functions if not each.apart]
    for function in (*apart, *here):
        function.start(columns, constants)
    by_name = {function.name: function.finish() for function in (*here, *apart)}
    outcomes = {function.name: by_name[function.name] for function in functions}
    total, answers = [], []
    for row in range(len(rollouts)):
        weighted = {each.name: each.weight * outcomes[each.name].values[row] for each in functions}
        applicable = {name: value for name, value in weighted.items() if not math.isnan(value)}
        penalty = applicable.pop(OVERLONG, 0.0)
        # A penalty alone is not a reward, since there is nothing to subtract it from.
        invalid = not applicable or any(outcomes[each.name].invalid[row] for each in functions)
        answers.append(math.nan if invalid else sum(applicable.values()))
        total.append(math.nan if invalid else sum(applicable.values()) + penalty)
    rewards = torch.tensor(total, dtype=torch.float32)
    return rewards, RewardBreakdown(rewards, torch.tensor(answers, dtype=torch.float32), outcomes)


def columns_of(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """Return the arguments of reward functions, per completion.

    These are TRL's prompts, completions and completion_ids, and every other dataset column. Prompts and completions are
    message lists for a row whose prompt is messages, and strings otherwise.
    """
    names = {name for rollout in rollouts for name in rollout.prompt.row if name not in OURS}
    columns: dict[str, list[Any]] = {
        name: [rollout.prompt.row.get(name) for rollout in rollouts] for name in sorted(names)
    }
    columns["prompts"] = [_prompt(rollout) for rollout in rollouts]
    columns["completions"] = [
        [{"role": "assistant", "content": rollout.text}] if isinstance(_prompt(rollout), list) else rollout.text
        for rollout in rollouts
    ]
    columns["completion_ids"] = [list(rollout.completion_ids) for rollout in rollouts]
    return columns


def _prompt(rollout: Rollout) -> Any:
    """Return what the model was asked: the string of the row, or the messages as they were rendered."""
    prompt, messages = rollout.prompt.row.get("prompt"), rollout.prompt.messages
    if isinstance(prompt, str):
        return prompt
    return "" if messages is None else [dict(message) for message in messages]


def check_invalid(history: list[float], share: float, faults: Sequence[str] = ()) -> None:
    """Append the share of invalid rewards of a step to `history` (the last five steps), and stop if it is too high.

    Raises RewardError (exit code 3) when all rewards of the step, or more than half of the last five steps', are
    invalid.
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
