"""No function changes what another gets, nor the dataset: each gets copies, in a worker and in this process."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest

from rlft.config.data import Reward
from rlft.rewards.score import build_rewards, score
from rlft.types import FinishReason, Prompt, Rollout


def changes_all(completions: list[Any], trainer_state: Any, **columns: Any) -> list[float]:
    count = len(completions)
    trainer_state.global_step = -1
    for name, column in columns.items():
        if not isinstance(column, list):
            continue
        for value in column:
            if isinstance(value, list):
                value.append("changed")
                if isinstance(value[0], dict):
                    value[0]["content"] = name
            elif isinstance(value, dict):
                value["changed"] = {"deep": 1}
            elif isinstance(value, np.ndarray):
                value[:] = 9
        column.clear()
    completions.clear()
    return [1.0] * count


async def changes_all_async(**columns: Any) -> list[float]:
    return changes_all(**columns)


def made(conversational: bool) -> list[Rollout]:
    found = []
    for i in range(2):
        chat = [{"role": "user", "content": f"q{i}"}]
        row = {
            "prompt": chat if conversational else f"q{i}",
            "answer": ["a", ["b"]],
            "facts": {"list": [1, 2], "set": {1}},
            "array": np.arange(3),
            "pair": ([1], "x"),
        }
        prompt = Prompt((1,), row, i, tuple(chat))
        found += [
            Rollout(prompt, (1, 2), (True, True), None, f"text {i}", FinishReason.STOP, j, 0, 0) for j in range(2)
        ]
    return found


def shown(rollouts: list[Rollout]) -> str:
    return repr(
        [(rollout.prompt.row, rollout.prompt.messages, rollout.text, rollout.completion_ids) for rollout in rollouts]
    )


@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("first", [changes_all, changes_all_async])
def test_what_a_function_changes_no_other_one_sees(first: Any, conversational: bool) -> None:
    seen: list[str] = []

    def looks(**arguments: Any) -> list[float]:
        named = {name: value for name, value in sorted(arguments.items()) if not name.startswith("log_")}
        seen.append(repr(named))
        return [1.0] * len(arguments["completions"])

    local = lambda **arguments: first(**arguments)  # noqa: E731  (no other process can import it)
    if first is changes_all_async:

        async def local(**arguments: Any) -> list[float]:
            return await first(**arguments)

    rollouts = made(conversational)
    before = shown(rollouts)
    functions = build_rewards([looks, local, looks])
    state = {"global_step": 3, "deep": [1]}
    for _ in range(2):
        assert score(rollouts, functions, state)[0].tolist() == [3.0] * 4
    assert len(set(seen)) == 1 and len(seen) == 4
    assert shown(rollouts) == before and state == {"global_step": 3, "deep": [1]}
    for function in functions:
        function.close()


def test_rows_that_share_an_object_share_its_copy_as_in_a_worker() -> None:
    same: list[bool] = []

    def looks(answer: list[Any], **_: Any) -> list[float]:
        same.append(answer[0] is answer[1] and answer[0] is not answer[2])
        return [1.0] * len(answer)

    (function,) = build_rewards([looks])
    score(made(False), [function], {})
    assert same == [True]


def test_what_cannot_be_copied_is_given_itself() -> None:
    class Refuses:
        def __deepcopy__(self, memo: Any) -> Any:
            raise KeyError("never")

    rollouts = made(False)
    things = [threading.Lock(), Refuses(), threading.Lock(), Refuses()]
    for rollout, thing in zip(rollouts, things, strict=True):
        rollout.prompt.row["thing"] = thing
    got: list[Any] = []
    (function,) = build_rewards([lambda thing, **_: got.extend(thing) or [1.0] * len(thing)])
    assert score(rollouts, [function], {})[0].tolist() == [1.0] * 4
    assert got == [rollout.prompt.row["thing"] for rollout in rollouts]


def test_args_of_a_function_are_its_memory() -> None:
    """They are the function's alone, so what it keeps there is there in the next step."""
    cache: dict[str, int] = {}

    def counts(completions: list[str], cache: dict[str, int], **_: Any) -> list[float]:
        cache["calls"] = cache.get("calls", 0) + 1
        return [float(cache["calls"])] * len(completions)

    (function,) = build_rewards([Reward(counts, args={"cache": cache})])  # type: ignore[arg-type]
    assert [score(copy.copy(made(False)), [function], {})[0][0] for _ in range(2)] == [1.0, 2.0]
