"""Reward functions under TRL's contract, in real worker processes: what they get, may return, how they fail."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import records
import torch

from rlft.config import resolve
from rlft.config.data import Reward
from rlft.errors import ConfigError, RewardError
from rlft.rewards.builtin.number import number
from rlft.rewards.score import BUILTIN, RewardFunction, build_rewards, check_invalid, score
from rlft.types import Prompt, Rollout

USER_FILE = """
import os, subprocess, time
print("noise on stdout while importing")
calls = 0

def count(completions, **kwargs):
    global calls
    calls += 1
    print("noise while scoring")
    return [float(calls)] * len(completions)

def pid(completions, **kwargs):
    return [float(os.getpid())] * len(completions)

def columns(prompts, completions, completion_ids, answer, trainer_state, level=7):
    assert prompts[0] == "q0" and completions[1] == "text 1" and completion_ids[1] == [1, 2] and level == 9
    return [float(a) + trainer_state.global_step for a in answer]

def logs(completions, log_metric, log_extra):
    log_metric("longest", max(len(c) for c in completions))
    log_extra("upper", [c.upper() for c in completions])
    return [0.0] * len(completions)

async def slow_but_async(completions, **kwargs):
    import asyncio
    await asyncio.sleep(0.01)
    return [2.0] * len(completions)

def some_none(completions, **kwargs):
    return [None if "1" in c else 1.0 for c in completions]

def guilty(completions, **kwargs):
    for c in completions:
        if c == "text 2": raise ValueError("cannot read text 2")
        if c == "text 5": os._exit(3)
        if c == "text 6": time.sleep(60)
    return [1.0] * len(completions)

def hangs(completions, **kwargs):
    child = subprocess.Popen(["sleep", "321"])
    open(os.environ["CHILD_FILE"], "w").write(str(child.pid))
    time.sleep(60)

def alarm(completions, **kwargs):
    import signal
    def stop(*_): raise TimeoutError
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try: time.sleep(60)
    except TimeoutError: return [4.0] * len(completions)

def greedy(completions, **kwargs):
    return [float(len(bytearray(10**9)))] * len(completions)

def short(completions, **kwargs): return [1.0]
def words(completions, **kwargs): return ["good"] * len(completions)
def one(completions, **kwargs): return 1.0
def all_fail(completions, **kwargs): raise KeyError("solution")
def wants(completions, solution): return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def user_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(USER_FILE)
    return path


@pytest.fixture
def make(user_file: Path):
    """A function of the user's file (or any callable) in its place, closed at the end."""
    opened: list[RewardFunction] = []

    def open_(use: Any, **options: Any) -> RewardFunction:
        reward = Reward(f"{user_file}:{use}", **{"timeout": 5.0, **options}) if isinstance(use, str) else use
        opened.extend(build_rewards([reward]))
        return opened[-1]

    yield open_
    for function in opened:
        function.close()


def rollouts(n: int = 8, texts: list[str] | None = None, **columns: list[Any]) -> list[Rollout]:
    made = []
    for i, text in enumerate(texts or [f"text {i}" for i in range(n)]):
        row = {"prompt": f"q{i}", "answer": str(i)} | {name: values[i] for name, values in columns.items()}
        prompt = Prompt((5,), row, i, ({"role": "user", "content": f"q{i}"},))
        made.append(Rollout(prompt, (1, 2), (True, True), None, text, "stop", 0, 0, 0))
    return made


def values(function: RewardFunction, made: list[Rollout] | None = None, **state: Any) -> list[float]:
    return score(made or rollouts(3), [function], {"global_step": 0} | state)[0].tolist()


# ---- what a function gets and may return -------------------------------------------------------------------------


def test_columns_arrive_by_name_and_only_those_it_takes(make) -> None:
    assert values(make("columns", args={"level": 9}), global_step=10) == [10.0, 11.0, 12.0]


def test_a_worker_is_sticky_and_what_it_prints_is_no_part_of_the_protocol(make) -> None:
    count, pid = make("count"), make("pid")
    assert [values(count)[0] for _ in range(3)] == [1.0, 2.0, 3.0]
    assert values(pid)[0] == values(pid)[0] != float(os.getpid())


def test_async_functions_are_awaited(make) -> None:
    assert values(make("slow_but_async")) == [2.0] * 3
    assert values(make(_local_async)) == [3.0] * 3


async def _local_async(completions, **kwargs):
    return [3.0] * len(completions)


def test_none_is_left_out_of_the_sum_and_a_row_without_any_reward_is_invalid(make) -> None:
    some, other = make("some_none"), make(lambda completions, **_: [0.5] * len(completions))
    assert values(some)[0] == 1.0 and math.isnan(values(some)[1])
    total, parts = score(rollouts(3), [some, other], {})
    assert total.tolist() == [1.5, 0.5, 1.5]
    assert parts.metrics()["rewards/some_none/mean"] == 1.0 and parts.metrics()["rewards/some_none/invalid"] == 0.0


def test_weights_scale_and_names_differ(make, user_file: Path) -> None:
    functions = build_rewards(
        [Reward(f"{user_file}:pid", weight=0.0), Reward(f"{user_file}:slow_but_async", weight=0.25)]
    )
    functions += [make("slow_but_async")]
    assert score(rollouts(1), functions[:2], {})[0].tolist() == [0.5]
    for function in functions[:2]:
        function.close()
    twice = build_rewards([Reward(f"{user_file}:count"), Reward(f"{user_file}:count")])
    assert [f.name for f in twice] == ["count", "count_2"]
    for function in twice:
        function.close()


def test_numpy_and_torch_scalars_and_arrays_are_numbers(make) -> None:
    for result in (
        [np.float32(0.5)] * 3,
        np.full(3, 0.5),
        torch.full((3,), 0.5),
        (0.5, 0.5, 0.5),
        [torch.tensor(0.5)] * 3,
    ):
        assert values(make(lambda completions, result=result, **_: result)) == [0.5] * 3
    assert values(make(lambda completions, **_: [True, 0, 1])) == [1.0, 0.0, 1.0]


def test_a_conversational_row_gives_message_lists(make) -> None:
    seen: list[Any] = []
    chat = [{"role": "user", "content": "hi"}]
    made = rollouts(1)
    made = [Rollout(Prompt((5,), {"prompt": chat}, 0, tuple(chat)), *list(vars(made[0]).values())[1:])]
    values(make(lambda prompts, completions: seen.append((prompts, completions)) or [1.0]), made)
    assert seen == [([chat], [[{"role": "assistant", "content": "text 0"}]])]


def test_metrics_and_columns_that_a_function_logs(make) -> None:
    _, parts = score(rollouts(2), [make("logs")], {})
    assert parts.metrics()["custom/longest"] == 6.0 and records.columns(parts)["logs/upper"] == ["TEXT 0", "TEXT 1"]


def test_a_callable_class_and_a_closure_run_here_with_a_note(make) -> None:
    class Reward2:
        __name__ = "second"

        def __call__(self, completions, **kwargs):
            return [float(os.getpid())] * len(completions)

    function = make(Reward2())
    assert function.name == "second" and values(function)[0] == float(os.getpid())
    assert "cannot be stopped when it hangs" in function.note
    assert make("pid").note == ""


def test_without_functions_the_recorded_reward_is_the_reward() -> None:
    made = [replace(r, recorded_reward=x) for r, x in zip(rollouts(2), (1.0, -1.0), strict=True)]
    assert score(made, [], {})[0].tolist() == [1.0, -1.0]


# ---- faults ------------------------------------------------------------------------------------------------------


def test_only_the_guilty_rows_are_invalid_and_never_scored_zero(make) -> None:
    """Of eight rows one raises, one kills the process, one hangs: those three are nan, the other five keep their 1."""
    total, parts = score(rollouts(8), [make("guilty", timeout=0.6)], {})
    assert [i for i, v in enumerate(total.tolist()) if math.isnan(v)] == [2, 5, 6]
    assert [v for v in total.tolist() if not math.isnan(v)] == [1.0] * 5
    assert parts.metrics()["rewards/guilty/invalid"] == 3.0 and parts.metrics()["reward"] == 1.0
    assert 'reward "guilty" failed on 3 of 8 completions' in parts.faults()[0]


def test_a_row_with_one_invalid_function_is_invalid(make) -> None:
    total, _ = score(rollouts(3), [make("guilty"), make(lambda completions, **_: [5.0] * len(completions))], {})
    assert total[:2].tolist() == [6.0, 6.0] and math.isnan(total[2])


def test_a_hanging_function_is_killed_with_its_children(make, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CHILD_FILE", str(tmp_path / "child"))
    with pytest.raises(
        RewardError, match=r'"hangs" failed on every completion of its first call: took longer than 0.5 s'
    ):
        values(make("hangs", timeout=0.5), rollouts(1))
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    pytest.fail(f"the child {child} is still running")


def test_sigalrm_works_in_a_worker(make) -> None:
    assert values(make("alarm")) == [4.0] * 3


def test_a_memory_limit_makes_rows_invalid_instead_of_taking_the_machine(make) -> None:
    with pytest.raises(RewardError, match="MemoryError"):
        values(make("greedy", memory_mb=300), rollouts(1))


def test_the_worker_lives_on_after_a_fault(make) -> None:
    function = make("guilty", timeout=0.6)
    values(function, rollouts(8))
    assert values(function, rollouts(2)) == [1.0, 1.0]


FIRST_CALL = {
    "short": r'reward "short" returned 1 rewards for 3 completions',
    "words": r"returned 'good' for completion 0, want a float or None",
    "one": "returned float, want a list",
    "all_fail": r"failed on every completion of its first call: KeyError: 'solution'",
    "wants": r"wants the argument solution, and the dataset has no such column; it gets answer, completion_ids",
}


@pytest.mark.parametrize("name", FIRST_CALL)
def test_a_function_that_is_wrong_stops_at_the_first_call(name: str, make) -> None:
    with pytest.raises(RewardError, match=FIRST_CALL[name]) as caught:
        values(make(name))
    assert caught.value.exit_code == 2


def test_an_argument_it_does_not_take_is_an_error(make) -> None:
    with pytest.raises(RewardError, match=r'"wants" takes no argument levle'):
        values(make("wants", args={"levle": 1}))


def test_what_cannot_be_imported_is_named(make, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_like_this\n")
    with pytest.raises(RewardError, match=r"(?s)broken.py:f. cannot be imported.*nothing_like_this"):
        build_rewards([Reward(f"{tmp_path}/broken.py:f")])
    with pytest.raises(RewardError, match=r'has no "cuont".*Did you mean "count"'):
        make("cuont")
    with pytest.raises(ConfigError, match=r'rewards = "nubmer".*Did you mean "number"'):
        build_rewards(["nubmer"])


def test_too_many_invalid_rewards_stop_the_run_as_a_guard() -> None:
    history: list[float] = []
    with pytest.raises(RewardError, match=r"every reward of this step is invalid.*grader down") as caught:
        check_invalid(history, 1.0, ["grader down"])
    assert caught.value.exit_code == 3
    history = []
    for _ in range(4):
        check_invalid(history, 0.6)
    with pytest.raises(RewardError, match=r"60% of the rewards of the last five steps"):
        check_invalid(history, 0.6)
    history = []
    for share in (0.9, 0.0, 0.0, 0.9, 0.3, 0.1, 0.2):
        check_invalid(history, share)
    assert history == [0.0, 0.9, 0.3, 0.1, 0.2]


def test_a_worker_loads_no_torch_and_no_numpy_and_dies_with_its_pipe(user_file: Path) -> None:
    code = "import rlft.rewards.worker, sys; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    (function,) = build_rewards([Reward(f"{user_file}:pid")])
    pid = int(values(function)[0])
    os.close(function._place._to)  # the parent's end of the pipe, as when the parent is gone
    function._place._to = os.open(os.devnull, os.O_WRONLY)
    function._place._process.wait(5)
    assert not Path(f"/proc/{pid}").exists()
    function.close()


def test_closing_leaves_no_process_and_no_descriptor(user_file: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        (function,) = build_rewards([Reward(f"{user_file}:pid")])
        pid = int(values(function)[0])
        function.close()
        assert not Path(f"/proc/{pid}").exists()
    assert len(os.listdir("/proc/self/fd")) == before


# ---- built-ins ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("The answer is 12.", "12", 1.0),
        ("12, no, 13", "12", 0.0),
        ("= -5", "-5", 1.0),
        ("12-7", "7", 1.0),
        ("costs $1,250.50 now", "1250.5", 1.0),
        ("3.0", "3", 1.0),
        ("none", "3", 0.0),
        ("x2", "2", 0.0),
        ("1,2", "2", 1.0),
        ("-3 and 4", "-3", 0.0),
    ],
)
def test_number_takes_the_last_number_of_the_text(text: str, answer: str, reward: float | None) -> None:
    assert number(completions=[text], answer=[answer]) == [reward]


BUILTINS: list[tuple[str, dict[str, Any], list[float | None]]] = [
    ("exact", {"completions": [" 5\n", "5."], "answer": ["5", 5]}, [1.0, 0.0]),
    ("exact", {"completions": [[{"role": "assistant", "content": "5"}]], "answer": ["5"]}, [1.0]),
    ("format", {"completions": ["<a>x\ny</a>", "<a>x"], "pattern": "<a>.*</a>"}, [1.0, 0.0]),
    (
        "length",
        {"completion_ids": [[0] * n for n in (60, 80, 90, 100, 120)], "max_tokens": 100, "buffer": 20},
        [0.0, 0.0, -0.5, -1.0, -1.0],
    ),
    ("number", {"completions": ["so 5"], "answer": ["5"]}, [1.0]),
    ("code", {"completions": ["```\nprint(4)\n```"], "tests": [[{"input": "", "output": "4"}]]}, [1.0]),
    ("math", {"completions": [r"\boxed{0.5}"], "answer": ["1/2"]}, [1.0]),
    ("repetition", {"completion_ids": [[1, 2, 1, 2, 1]], "ngram": 2}, [-0.5]),
    ("tags", {"completions": ["<think>1</think>"]}, [0.5]),
    ("reasoning_gym", {"completions": ["7"], "answer": ["7"], "task": ["chain_sum"], "metadata": [{}]}, [1.0]),
]
"""Every built-in: its name, arguments and rewards."""


@pytest.mark.parametrize(("name", "arguments", "rewards"), BUILTINS)
def test_built_ins_by_hand(name: str, arguments: dict[str, Any], rewards: list[float | None]) -> None:
    assert getattr(resolve.module(name, BUILTIN, "rewards"), name)(**arguments) == rewards


FILES = ("judge", "reward_model")
"""Built-ins that need a server or a model, each with a file of tests."""


def test_every_built_in_has_a_row_or_a_file_of_tests() -> None:
    assert {*(name for name, _, _ in BUILTINS), *FILES} == set(resolve.names_in(BUILTIN))
    assert all(Path(__file__).with_name(f"test_{name}.py").is_file() for name in FILES)


def test_built_ins_by_name_and_reasoning_gyms_own_score() -> None:
    functions = build_rewards(["number", "reasoning_gym"])
    made = rollouts(texts=["7", "8"], task=["chain_sum"] * 2, metadata=[{}] * 2)
    made = [Rollout(Prompt((5,), r.prompt.row | {"answer": "7"}, 0), *list(vars(r).values())[1:]) for r in made]
    _, parts = score(made, functions, {})
    assert records.columns(parts)["number"] == [1.0, 0.0]
    assert records.columns(parts)["reasoning_gym"][0] == 1.0 > records.columns(parts)["reasoning_gym"][1]
    for function in functions:
        function.close()
