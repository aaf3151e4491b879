"""A reward function with its executor, and the bisection of failed batches down to the rows at fault."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

from rlft.config import secrets
from rlft.config.data import Reward
from rlft.config.resolve import did_you_mean
from rlft.errors import ConfigError, RewardError
from rlft.rewards.parts import FunctionScores
from rlft.rewards.pool import Executor
from rlft.rewards.protocol import Reply, Signature

DEADLINE = 4
"""Time for faults of a function in a step, in multiples of its timeout: failed calls and the bisection after them."""
RESTARTS = 60.0
"""Seconds per step for restarting a function's process, since a file may take long to import."""


class RewardFunction:
    """A reward function with its weight, executor and signature."""

    def __init__(self, name: str, place: Executor, reward: Reward, note: str = "", batch: str = "step") -> None:
        """Set up the function. reward: weight, timeout and args; its `use` is resolved to `place`.

        Raises ConfigError for args whose secrets cannot be used.
        """
        self.name, self.weight, self.timeout, self.args = name, reward.weight, reward.timeout, reward.args
        self.batch = reward.batch or batch
        """What one call gets, as in `Reward.batch`."""
        self.note = note
        """Message for the start of a run; may be empty."""
        self._where = f'args of reward "{name}"'
        for problem in secrets.problems(self.args, self._where):
            raise ConfigError(problem)
        self._secrets: list[str] = []
        self._place = place
        self._signature: Signature | None = None
        self._proven = False
        """True after a step with a valid row: later faults are attributed to rows, not to the function."""
        self._stopped = False
        self._remaining = self._restarts = 0.0
        """Seconds left in this step for faults, and for restarting the process."""

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
                f"{', '.join(sorted(available))}.{did_you_mean(missing[0], sorted(available), 0.8)} Map columns with "
                f"data.columns, or set it in the reward's args"
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

    def begin_step(self) -> None:
        """Allow this step its time for faults."""
        self._remaining, self._restarts, self._stopped = DEADLINE * self.timeout, RESTARTS, False

    def stop(self) -> None:
        """Make a call that another thread waits for end soon, and let none follow in this step."""
        self._stopped = True
        self._place.interrupt()

    def start(self, columns: dict[str, list[Any]], constants: dict[str, Any]) -> None:
        """Start the call on all rows of `columns`; `finish` returns the result."""
        assert self._signature is not None
        self._rows = len(columns["completions"])
        self._columns = {name: values for name, values in columns.items() if self._signature.takes(name)}
        # Read here, so that the function gets what a reference stands for and no file does.
        constants, self._secrets = {**constants, **secrets.resolved(self.args, self._where)}, secrets.values(self.args)
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
        queue = deque([all_rows] if not self._store(all_rows, reply, outcome) else [])
        self._remaining -= reply.seconds if reply.kind != "ok" else 0.0
        # Breadth first, so that a good half is not delayed by the cost of the other half.
        while queue and not self._stopped:
            rows = queue.popleft()
            for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if len(rows) > 1 else ():
                if min(self._remaining, self._restarts) <= 0:
                    spent = f"{DEADLINE} x {self.timeout:g} s, and {RESTARTS:g} s to start its process again"
                    outcome.fail(half, f"no time left: a step allows {spent}")
                    continue
                start = time.monotonic()
                subset = {name: [values[row] for row in half] for name, values in self._columns.items()}
                self._place.start(subset, self._constants, len(half), min(self.timeout, self._remaining))
                reply = self._place.finish()
                if not self._store(half, reply, outcome):
                    queue.append(half)
                self._remaining -= reply.seconds
                self._restarts -= time.monotonic() - start - reply.seconds
        return outcome

    def settle(self, outcome: FunctionScores) -> None:
        """Take note of the result of a whole step. Raises RewardError when the first one has no valid row."""
        if not outcome.values:
            return
        if all(outcome.invalid) and not self._proven:
            raise RewardError(f'reward "{self.name}" failed on every completion of its first call: {outcome.fault}')
        self._proven = self._proven or not all(outcome.invalid)

    def _store(self, rows: list[int], reply: Reply, outcome: FunctionScores) -> bool:
        """Store the result of a call. Returns True when it succeeded or had a single row, which is then invalid.

        Raises RewardError for a wrong count or type, which is never a matter of rows: halves of a batch would give
        lists of the right length again, with rewards of other rows.
        """
        reply = _without(reply, self._secrets)
        outcome.calls += 1
        outcome.seconds += reply.seconds
        if reply.kind == "bad" or (reply.kind == "infinite" and not self._proven):
            error = RewardError(f'reward "{self.name}" {reply.text}')
            error.exit_code = 3 if self._proven else 2
            raise error
        if reply.kind == "ok":
            outcome.take(rows, reply)
        elif len(rows) == 1:
            outcome.fail(rows, reply.text)
        return reply.kind == "ok" or len(rows) == 1


def _without(reply: Reply, hide: list[str]) -> Reply:
    """Return a reply whose texts, of the fault and in extras, have the secrets masked."""
    if not hide:
        return reply
    extras = {
        name: [secrets.hidden(item, hide) if isinstance(item, str) else item for item in column]
        for name, column in (reply.extras or {}).items()
    }
    return reply._replace(text=secrets.hidden(reply.text, hide), extras=extras)
