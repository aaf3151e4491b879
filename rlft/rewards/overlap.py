"""Score the groups of a step while others are still sampled.

A function with `batch` "group" or "any" has a thread that calls it on finished groups, in the order in which they end;
a group's rewards do not depend on that order. The other functions are called once, on all completions of the step, when
sampling is over. Results are put together in the order of the rollouts.
"""

from __future__ import annotations

import concurrent.futures
import copy
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace, TracebackType
from typing import Any

from rlft.rewards.function import RewardFunction
from rlft.rewards.parts import FunctionScores
from rlft.types import Prompt, Rollout

OURS = ("prompt", "completion", "completion_ids")
"""Columns that are not passed to rewards, as in TRL: these get prompts, completions and completion_ids instead."""


class Lane:
    """The calls of one function in a separate thread."""

    def __init__(self, function: RewardFunction, names: Sequence[str], constants: dict[str, Any]) -> None:
        """Set up the lane. names: of the dataset's columns. constants: arguments besides the columns."""
        self._function, self._names, self._constants = function, names, constants
        self._lock = threading.Lock()
        self._waiting: list[Sequence[Rollout]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rlft-reward")
        self._futures: list[Future[None]] = []
        self.seen: set[int] = set()
        """Ids of the rollouts that were added; they are kept in `results`, so that no other object has the id."""
        self.results: list[tuple[list[Rollout], FunctionScores]] = []

    def add(self, group: Sequence[Rollout]) -> None:
        """Score these completions of one prompt as soon as the function is free."""
        self.seen |= {id(rollout) for rollout in group}
        with self._lock:
            self._waiting.append(group)
        self._futures.append(self._pool.submit(self._score))

    def wait(self) -> None:
        """Wait for all calls. Raises RewardError as the function does."""
        for future in self._futures:
            future.result()

    def stop(self) -> None:
        """End the running call and drop the others."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        while concurrent.futures.wait(self._futures, 0.0).not_done:
            self._function.stop()  # more than once: it may be starting its process
            concurrent.futures.wait(self._futures, 0.05)

    def _score(self) -> None:
        """Call the function on the groups that wait: on one, or on all of them where it scores each row by itself."""
        with self._lock:
            count = len(self._waiting) if self._function.batch == "any" else 1
            groups, self._waiting = self._waiting[:count], self._waiting[count:]
        rollouts = [rollout for group in groups for rollout in group]
        if rollouts:
            self._function.start(columns_of(rollouts, self._names), self._constants)
            self.results.append((rollouts, self._function.finish()))


class Scoring:
    """The scores of a step, a context manager that ends all calls when it is left."""

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        prompts: Sequence[Prompt],
        trainer_state: dict[str, Any],
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Check the functions against the columns of the prompts. Raises RewardError for an argument that is missing.

        progress: called with what the step waits for, and how many of how many functions are done.
        """
        self._functions, self._progress = functions, progress
        self._names = _names(prompts)
        self._state = trainer_state
        for function in functions:
            function.check(columns_of((), self._names))
            function.begin_step()
        self._lanes = {
            function.name: Lane(function, self._names, self._constants())
            for function in functions
            if function.batch != "step"
        }

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for lane in self._lanes.values():
            lane.stop()

    @property
    def overlaps(self) -> bool:
        """True when some function can be called before all completions are sampled."""
        return bool(self._lanes)

    def add(self, group: Sequence[Rollout]) -> None:
        """Score all completions of one prompt with the functions that overlap. Raises nothing."""
        for lane in self._lanes.values():
            lane.add(group)

    def finish(self, rollouts: Sequence[Rollout]) -> dict[str, FunctionScores]:
        """Return the scores of every function by name. Raises RewardError for a function that is itself at fault.

        rollouts: all of the step, in order. Groups that were not added are scored here; groups that were added and are
        not among them, which an engine sampled again, count for nothing.
        """
        for lane in self._lanes.values():
            missing = [rollout for rollout in rollouts if id(rollout) not in lane.seen]
            for group in groups_by_prompt(missing):
                lane.add(group)
        whole = [function for function in self._functions if function.batch == "step"]
        # Functions in other processes are started first and waited for last, so that they overlap with those here.
        apart, here = [each for each in whole if each.apart], [each for each in whole if not each.apart]
        columns = columns_of(rollouts, self._names)
        for function in (*apart, *here):
            function.start(columns, self._constants())
        outcomes: dict[str, FunctionScores] = {}
        overlapping = [function for function in self._functions if function.batch != "step"]
        for function in (*here, *overlapping, *apart):
            if self._progress is not None:
                self._progress(f"reward {function.name}", len(outcomes), len(self._functions))
            outcomes[function.name] = self._outcome(function, rollouts)
            function.settle(outcomes[function.name])
        return {function.name: outcomes[function.name] for function in self._functions}

    def _outcome(self, function: RewardFunction, rollouts: Sequence[Rollout]) -> FunctionScores:
        if function.batch == "step":
            return function.finish()
        lane = self._lanes[function.name]
        lane.wait()
        row_of = {id(rollout): row for row, rollout in enumerate(rollouts)}
        parts = [(rows, part) for found, part in lane.results if (rows := _rows(found, row_of))]
        outcome = FunctionScores([math.nan] * len(rollouts), [False] * len(rollouts))
        for rows, part in sorted(parts, key=lambda each: min(each[0])):
            outcome.place(rows, part)
        return outcome

    def _constants(self) -> dict[str, Any]:
        return {"trainer_state": SimpleNamespace(**copy.deepcopy(self._state))}


def _rows(rollouts: Sequence[Rollout], row_of: dict[int, int]) -> list[int]:
    """Return the rows of these rollouts; nothing for those that an engine sampled again."""
    return [row_of[id(rollout)] for rollout in rollouts if id(rollout) in row_of]


def groups_by_prompt(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """Divide rollouts into neighbours that continue the same prompt, each sample once."""
    groups: list[list[Rollout]] = []
    for rollout in rollouts:
        last = groups[-1][-1] if groups else None
        if last is None or last.prompt is not rollout.prompt or rollout.sample_index <= last.sample_index:
            groups.append([])
        groups[-1].append(rollout)
    return groups


def columns_of(rollouts: Sequence[Rollout], names: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Return the arguments of reward functions, per completion.

    These are TRL's prompts, completions and completion_ids, every other dataset column, and with images a list of them,
    each the path or the bytes of a file. Prompts and completions are message lists for a row whose prompt is messages,
    and strings otherwise. names: of the columns; None for those of the rollouts.
    """
    if names is None:
        names = _names([rollout.prompt for rollout in rollouts])
    columns: dict[str, list[Any]] = {name: [_value(rollout.prompt, name) for rollout in rollouts] for name in names}
    columns["prompts"] = [_prompt(rollout) for rollout in rollouts]
    columns["completions"] = [
        [{"role": "assistant", "content": rollout.text}] if isinstance(_prompt(rollout), list) else rollout.text
        for rollout in rollouts
    ]
    columns["completion_ids"] = [list(rollout.completion_ids) for rollout in rollouts]
    return columns


def _names(prompts: Sequence[Prompt]) -> list[str]:
    """Return the columns of prompts that reward functions get."""
    names = {name for prompt in prompts for name in prompt.row if name not in OURS}
    return sorted(names | {"images"} if any(prompt.images for prompt in prompts) else names)


def _value(prompt: Prompt, name: str) -> Any:
    """Return the value of a column; images in one form, whatever the row has them in."""
    if name == "images" and prompt.images:
        return [image.source for image in prompt.images]
    return prompt.row.get(name)


def _prompt(rollout: Rollout) -> Any:
    """Return what the model was asked: the string of the row, or the messages as they were rendered."""
    prompt, messages = rollout.prompt.row.get("prompt"), rollout.prompt.messages
    if isinstance(prompt, str):
        return prompt
    return "" if messages is None else [dict(message) for message in messages]
