"""How reward functions are called: overlap, event loops, decorators, odd results, and what is left of a worker."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import records
import torch
from test_rewards import rollouts

from rlft.config import resolve
from rlft.config.data import Reward
from rlft.errors import RewardError
from rlft.rewards.score import RewardFunction, build_rewards, score

USER_FILE = """
import asyncio, functools, os, subprocess, sys, time

def meet(mine, other):
    open(os.path.join(FOLDER, mine), "w").close()
    while not os.path.exists(os.path.join(FOLDER, other)):
        time.sleep(0.005)

def left(completions, **kwargs):
    meet("left", "right")
    return [1.0] * len(completions)

def right(completions, **kwargs):
    meet("right", "left")
    return [2.0] * len(completions)

loops = []
async def loop(completions, **kwargs):
    loops.append(asyncio.get_running_loop())
    return [float(loops[0] is loops[-1] and not loops[0].is_closed())] * len(completions)

def runs_a_loop(completions, **kwargs):
    async def one(text): return float(len(text))
    async def every(): return await asyncio.gather(*map(one, completions))
    return asyncio.run(every())

def hangs_on_0(completions, **kwargs):
    while "text 0" in completions: time.sleep(1)
    return [1.0] * len(completions)

def breaks_on_1(completions, log_metric, log_extra, **kwargs):
    log_metric("seen", len(completions))
    log_extra("upper", [c.upper() for c in completions])
    if "text 1" in completions: raise ValueError("no text 1")
    return [1.0] * len(completions)

def per_row(function):
    @functools.wraps(function)
    def rows(completions, answer, **columns):
        return [function(completion=c, answer=a) for c, a in zip(completions, answer)]
    return rows

@per_row
def wrapped(completion, answer): return float(answer in completion)

def timed(function):
    @functools.wraps(function)
    def with_time(*args, **kwargs): return function(*args, **kwargs)
    return with_time

@timed
def two_arguments(completions, answer): return [float(a) for a in answer]

def leaves_a_child(completions, **kwargs):
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(write, str(os.getpid()).encode())
            time.sleep(300)
        os._exit(0)
    return [float(os.read(read, 100))] * len(completions)

def ends_beside_a_child(completions, **kwargs):
    if os.fork() == 0: time.sleep(300)
    os._exit(4)

def forks_and_returns_twice(completions, **kwargs):
    os.fork()
    return [float(os.getpid())] * len(completions)

def starts_python(completions, **kwargs):
    code = "import os; print(os.environ.get('PYTHONPATH', 'none'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    return [float(out == os.environ.get("WANTED", "none") + "\\\\n")] * len(completions)

def answer_only(completions, answer): return [float(a) for a in answer]
def takes_all(completions, **kwargs): return [0.0] * len(completions)

class Grader:
    def __call__(self, completions): return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def user_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calls")
    path = folder / "call_rewards.py"
    path.write_text(f"FOLDER = {str(folder)!r}\n" + USER_FILE.replace("\\\\n", "\\n"))
    return path


@pytest.fixture
def make(user_file: Path):
    """Functions of the user's file by name, or callables; closed at the end."""
    opened: list[RewardFunction] = []

    def open_(*uses: Any, **options: Any) -> list[RewardFunction]:
        made = [
            Reward(f"{user_file}:{use}", **{"timeout": 5.0, **options}) if isinstance(use, str) else use for use in uses
        ]
        opened.extend(build_rewards(made))
        return opened[-len(uses) :]

    yield open_
    for function in opened:
        function.close()


def values(functions: list[RewardFunction], n: int = 3, **columns: list[Any]) -> list[float]:
    return score(rollouts(n, **columns), functions, {"global_step": 0})[0].tolist()


# ---- overlap -----------------------------------------------------------------------------------------------------


def test_functions_in_workers_run_at_the_same_time(make) -> None:
    """Each waits for the other, so one after the other would never end."""
    assert values(make("left", "right")) == [3.0] * 3


def test_async_functions_here_run_at_the_same_time_on_one_loop_beside_a_plain_one(make) -> None:
    events: list[asyncio.Event] = []

    def waiting(mine: int, other: int) -> Any:
        async def reward(completions: list[str], **_: Any) -> list[float]:
            while len(events) < 2:
                events.append(asyncio.Event())
            events[mine].set()
            await events[other].wait()
            return [float(mine)] * len(completions)

        return reward

    functions = make(waiting(0, 1), waiting(1, 0), lambda completions, **_: [5.0] * len(completions))
    assert values(functions) == [6.0] * 3 and values(functions) == [6.0] * 3


def test_the_loop_of_an_async_function_lives_as_long_as_its_worker(make) -> None:
    functions = make("loop")
    assert [values(functions) for _ in range(2)] == [[1.0] * 3] * 2


def test_a_plain_function_may_run_a_loop_of_its_own(make) -> None:
    assert values(make("runs_a_loop")) == [6.0] * 3

    def closed(completions: list[str], **_: Any) -> list[float]:
        async def every() -> list[float]:
            return [float(len(text)) for text in completions]

        return asyncio.run(every())

    assert values(make(closed)) == [6.0] * 3


def test_an_async_function_here_is_stopped_at_its_timeout(make) -> None:
    async def stuck(completions: list[str], **_: Any) -> list[float]:
        while "text 1" in completions:
            await asyncio.sleep(60)
        return [1.0] * len(completions)

    total, parts = score(rollouts(2), make(Reward(stuck, timeout=0.2)), {})  # type: ignore[arg-type]
    assert total[0] == 1.0 and math.isnan(total[1])
    assert "took longer than 0.2 s" in parts.faults()[0]


def test_a_row_that_hangs_leaves_time_for_the_other_half(make) -> None:
    found = values(make("hangs_on_0", timeout=0.4), 8)
    assert math.isnan(found[0]) and found[4:] == [1.0] * 4


def test_starting_again_costs_a_function_nothing_of_its_time(make, tmp_path: Path) -> None:
    """Importing the file takes longer than four timeouts; still only the row that hangs is invalid."""
    path = tmp_path / "slow.py"
    path.write_text(
        "import time\ntime.sleep(0.6)\n"
        "def hangs(completions, **_):\n"
        "    while 'text 0' in completions: time.sleep(1)\n"
        "    return [1.0] * len(completions)\n"
    )
    found = values(make(Reward(f"{path}:hangs", timeout=0.14)), 2)
    assert math.isnan(found[0]) and found[1] == 1.0


def test_what_a_failed_call_logged_is_discarded_and_the_halves_are_put_together(make) -> None:
    _, parts = score(rollouts(4), make("breaks_on_1"), {})
    # Calls: 4 rows and the first two fail; rows 2 and 3, then row 0 are good, row 1 alone is not.
    assert parts.metrics()["custom/seen"] == (2 + 1) / 2
    assert records.columns(parts)["breaks_on_1/upper"] == ["TEXT 0", None, "TEXT 2", "TEXT 3"]
    assert parts.outcomes["breaks_on_1"].calls == 5


def test_a_metric_that_two_functions_log_is_the_mean_over_both_and_ours_stay(make) -> None:
    def logging(value: float) -> Any:
        def reward(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
            log_metric("shared", value)
            log_metric("reward", 99)
            return [1.0] * len(completions)

        return reward

    _, parts = score(rollouts(2), make(logging(1.0), logging(4.0)), {})
    metrics = parts.metrics()
    assert metrics["custom/shared"] == 2.5 and metrics["custom/reward"] == 99 and metrics["reward"] == 2.0


NAMES = ["step", "loss", "reward", "eval/reward", "train/global_step", "rewards/f/mean", "custom/x"]
NAMES += ["a\nb\0c", "half \ud83d"]  # which cannot be written everywhere


def logs_under(name: Any, value: Any = 7.0) -> Any:
    def f(completions: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        log_metric(name, value)
        log_extra(name, [value] * len(completions))
        return [1.0] * len(completions)

    return f


@pytest.mark.parametrize("name", NAMES)
def test_a_logged_name_stays_as_it_is_under_a_prefix_and_replaces_no_number_of_ours(name: str, make) -> None:
    def quiet(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    quiet.__name__ = "f"
    ours, parts = (score(rollouts(2), make(function), {})[1] for function in (quiet, logs_under(name)))
    shown = name.replace("\n", "\ufffd").replace("\0", "\ufffd").replace("\ud83d", "\ufffd")
    timed = "time/reward/f"
    logged = parts.metrics() | {timed: 0.0}
    assert logged == ours.metrics() | {timed: 0.0, f"custom/{shown}": 7.0}
    assert records.columns(parts) == records.columns(ours) | {f"f/{shown}": [7.0, 7.0]}


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused_at_the_first_call(name: str, make) -> None:
    with pytest.raises(RewardError, match='reward "f" called log_metric with an empty name; give it one'):
        score(rollouts(2), make(logs_under(name)), {})


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308])
def test_values_that_are_not_finite_are_logged_and_change_no_reward(value: float, make) -> None:
    rewards, parts = score(rollouts(2), make(logs_under("x", value), logs_under("x", value)), {})
    assert not math.isfinite(parts.metrics()["custom/x"])  # the sum of 1e308 and 1e308 is infinite too
    assert rewards.tolist() == [2.0, 2.0] and parts.metrics()["reward"] == 2.0


def test_a_logged_column_does_not_replace_the_rewards_of_a_function_whose_name_looks_like_it(make) -> None:
    first, second = logs_under("b"), logs_under("x")
    first.__name__, second.__name__ = "a", "a/b"
    _, parts = score(rollouts(2), make(first, second), {})
    assert records.columns(parts) == {"a": [1.0] * 2, "a/b": [1.0] * 2, "a/b/x": [7.0] * 2}


# ---- what may be given and returned ------------------------------------------------------------------------------


def test_decorated_functions_get_what_decorator_and_function_take(make) -> None:
    assert values(make("wrapped")) == [1.0] * 3
    assert values(make("two_arguments")) == [0.0, 1.0, 2.0]


def test_one_function_a_weight_for_a_function_and_names_that_differ(make) -> None:
    def level2(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    (one,) = build_rewards(level2)
    assert values([one]) == [1.0] * 3
    functions = make(level2, Reward(level2, weight=0.5), level2, functools.partial(level2))  # type: ignore[arg-type]
    assert [f.name for f in functions] == ["level2", "level2_2", "level2_3", "level2_4"]
    assert values(functions) == [3.5] * 3


def test_what_is_no_reward_function_is_said(make, user_file: Path) -> None:
    with pytest.raises(RewardError, match=r"(?s)a class; make an instance of it, for example grader = Grader\(\)"):
        make("Grader")
    with pytest.raises(RewardError, match="a class; make an instance"):
        make(resolve.attribute(f"{user_file}:Grader", "x"))
    with pytest.raises(RewardError, match="Linear is no reward function; give one, which may call a model"):
        make(torch.nn.Linear(1, 1))
    with pytest.raises(RewardError, match='"reward": memory_mb needs a separate process'):

        def reward(completions: list[str]) -> list[float]:
            return []

        make(Reward(reward, memory_mb=100))  # type: ignore[arg-type]


def failing(completions: list[str]) -> Any:
    yield 1.0
    raise ValueError("halfway")


ODD = {
    "a generator that raises": (lambda completions: failing(completions), "ValueError: halfway"),
    "an array without length": (lambda completions: np.array(1.0), "TypeError: iteration over a 0-d array"),
    "rows of two": (lambda completions: np.ones((3, 2)), r"returned array\(\[1\., 1\.\]\) for completion 0"),
    "infinity": (lambda completions: [1.0, math.inf, 0.0], "returned inf for completion 1, want a finite float"),
    "beyond float32": (lambda completions: [1e39] * 3, "returned 1e[+]39 for completion 0"),
    "beyond float": (lambda completions: [10**400] * 3, "for completion 0, want a float or None"),
    "a complex": (lambda completions: [1j] * 3, "returned 1j for completion 0"),
    "a coroutine that raises": (lambda completions: judge(completions), "RuntimeError: the judge is down"),
}


async def judge(completions: list[str]) -> list[float]:
    raise RuntimeError("the judge is down")


@pytest.mark.parametrize("case", ODD)
def test_an_odd_result_is_an_error_that_says_what_it_was(case: str, make) -> None:
    function, message = ODD[case]
    with pytest.raises(RewardError, match=message):
        values(make(function))


def test_other_numbers_are_numbers(make) -> None:
    result = [Decimal("0.5"), np.array([0.5]), torch.tensor([[0.5]], requires_grad=True)]
    assert values(make(lambda completions: result)) == [0.5] * 3


# ---- the process -------------------------------------------------------------------------------------------------


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_in_a_session_of_its_own_lives_between_calls_and_ends_with_the_worker(make) -> None:
    (function,) = make("leaves_a_child")
    child = int(values([function], 1)[0])
    assert running(child)
    function.close()
    assert not running(child)


def test_the_end_of_a_worker_is_seen_while_a_child_holds_its_pipes_open(make) -> None:
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"its process ended \(exit code 4\)"):
        values(make("ends_beside_a_child", timeout=20.0), 1)
    assert time.monotonic() - start < 10


def test_a_function_that_returns_in_a_forked_child_too_is_answered_once(make) -> None:
    functions = make("forks_and_returns_twice")
    first, second = values(functions, 1)[0], values(functions, 1)[0]
    assert first == second


def test_another_python_started_by_a_function_gets_the_users_path_not_ours(make, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/their/own")
    monkeypatch.setenv("WANTED", "/their/own")
    assert values(make("starts_python")) == [1.0] * 3
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.delenv("WANTED")
    assert values(make("starts_python")) == [1.0] * 3


def test_files_beside_the_user_do_not_shadow_what_a_worker_imports(make, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "struct.py").write_text("raise RuntimeError('the wrong one')\n")
    monkeypatch.chdir(tmp_path)
    assert values(make("takes_all")) == [0.0] * 3


def test_a_function_of_a_file_that_no_import_finds_runs_here(make, user_file: Path) -> None:
    function = resolve.attribute(f"{user_file}:takes_all", "x")
    assert function.__module__ == "rlft_file_call_rewards"
    (made,) = make(function)
    assert not made.apart and values([made]) == [0.0] * 3


def test_a_column_that_cannot_be_sent_is_an_error_only_where_it_is_asked_for(make) -> None:
    locks = [threading.Lock(), threading.Lock()]
    with pytest.raises(RewardError, match=r"a column or argument cannot be sent to its process .*'_thread.lock'"):
        values(make("takes_all"), 2, lock=locks)
    assert values(make("answer_only"), 2, lock=locks) == [0.0, 1.0]
