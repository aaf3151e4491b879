"""The built-in `code`: the forms of tests, what passes, and hostile programs, of which none passes or stays."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import records

from rlft.config.data import Reward
from rlft.errors import DataError
from rlft.rewards import processes
from rlft.rewards.builtin import code as code_file
from rlft.rewards.builtin.code import check_row, code
from rlft.rewards.programs import contain
from rlft.rewards.programs.launcher import Launcher, Request
from rlft.rewards.score import build_rewards, score
from rlft.types import FinishReason, Prompt, Rollout

DOUBLE = "print(int(input()) * 2)"
ADD = "def add(a, b):\n    return a + b"


def fenced(program: str) -> str:
    return f"Here it is.\n```python\n{program}\n```\nDone."


def reward(program: str, tests: Any, **args: Any) -> float | None:
    (value,) = code([fenced(program)], **{"tests": [tests], "seconds": 5, "memory_mb": 512, "workers": 1, **args})
    return value


@pytest.mark.parametrize(
    ("program", "columns", "value"),
    [
        (DOUBLE, {"tests": [{"input": "2\n", "output": "4"}, {"input": "3", "output": "6 \n\n"}]}, 1.0),
        (DOUBLE, {"test_cases": json.dumps([{"input": "2", "output": "4"}, {"input": "3", "output": "7"}])}, 0.5),
        (DOUBLE, {"tests": {"inputs": ["2", "x"], "outputs": ["4\n", "x"]}}, 0.5),
        (DOUBLE, {"inputs": ["2"], "outputs": ["4"]}, 1.0),
        ("print(4)\nraise SystemExit(1)", {"inputs": ["2"], "outputs": ["4"]}, 0.0),
        ("print('ä≤\U0001f600')", {"inputs": [""], "outputs": ["ä≤\U0001f600"]}, 1.0),
        (
            ADD,
            {"test_list": ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert add([1], [2]) == [1, 2]"]},
            2 / 3,
        ),
        (
            ADD,
            {"test": "def check(candidate):\n    assert abs(candidate(.1, .2) - .3) < 1e-6\n", "entry_point": "add"},
            1.0,
        ),
        (ADD, {"asserts": "from solution import *\nimport math\nassert math.isclose(add(1, 2), 3)"}, 1.0),
        (ADD, {"test_list": ["assert add(*ONE) == 3"], "test_setup_code": "ONE = (1, 2)"}, 1.0),
        (ADD, {"tests": {"fn_name": "add", "inputs": [[1, 2], ["a", "b"]], "outputs": [3, ["ab"]]}}, 1.0),
        (
            "class Solution:\n def f(self, x): return x[::-1]",
            {"tests": [{"fn_name": "f", "input": "[1, 2]", "output": "[2, 1]"}]},
            1.0,
        ),
        ("def sum(a, b): return 6", {"test_list": ["assert sum(10, 15) == 6"]}, 1.0),
        ("def s(x): x.sort(); x.append(9)", {"tests": ["x = [3, 1]\ns(x)\nassert x == [1, 3, 9]"]}, 1.0),
        (
            "def g(n):\n for i in range(n): yield (i, {i})",
            {"tests": ["assert list(g(2)) == [(0, {0}), (1, {1})]"]},
            1.0,
        ),
        ("def f(c, x): return c(x) + 1", {"tests": ["assert f(lambda v: v * 10, 2) == 21"]}, 1.0),
        (
            "def f(x): raise KeyError(x)",
            {"tests": ["try:\n    f(1)\n    assert False\nexcept KeyError:\n    pass"]},
            1.0,
        ),
        (
            "class Stack:\n    def __init__(self): self.items = []\n"
            "    def push(self, x): self.items += [x]; return self\n"
            "    def __eq__(self, x): return self.items == x.items\n"
            "    def __len__(self): return len(self.items)",
            {
                "tests": [
                    "s = Stack().push(1).push('b')\n"
                    "assert len(s) == 2 and s.items == [1, 'b']\nassert isinstance(s, Stack)\n"
                    "assert s == Stack().push(1).push('b') and s != Stack()"
                ]
            },
            1.0,
        ),
        (
            "from collections import Counter\ndef f(x): return Counter(x)",
            {"tests": ["assert f('aab') == {'a': 2, 'b': 1}"]},
            1.0,
        ),
        ("import numpy as np\ndef f(x): return np.array(x).mean()", {"tests": ["assert f([1, 2]) == 1.5"]}, 1.0),
        ("def f(n): return 1 if n == 0 else n * f(n - 1)", {"tests": ["assert f(900) > 0"]}, 1.0),
    ],
)
def test_the_forms_of_public_datasets(program: str, columns: dict[str, Any], value: float) -> None:
    check_row(columns, {})
    (found,) = code([fenced(program)], seconds=10, workers=1, **{name: [each] for name, each in columns.items()})
    assert found == pytest.approx(value)


def test_the_program_is_the_last_block_of_python_and_without_one_the_reward_is_0() -> None:
    tests = [{"input": "2", "output": "4"}]
    texts = [f"```\nprint(1)\n```\n```py\n{DOUBLE}\n```\n```text\n4\n```", DOUBLE, f"```python\n{DOUBLE}", ""]
    logged: dict[str, list[str]] = {}
    values = code(texts, tests=[tests] * 4, workers=1, log_extra=logged.__setitem__)
    assert values == [1.0, 0.0, 1.0, 0.0] and logged["outcome"] == ["passed", "no program", "passed", "no program"]


def test_all_or_nothing_and_rows_without_tests() -> None:
    tests = [{"input": "2", "output": "4"}, {"input": "2", "output": "5"}]
    assert code([fenced(DOUBLE)] * 2, tests=[tests, None], all_or_nothing=True) == [0.0, None]


def test_data_without_a_column_of_tests_says_which_there_may_be() -> None:
    with pytest.raises(DataError, match="no column of tests: name one tests, test_cases, "):
        code([fenced(DOUBLE)])
    with pytest.raises(DataError, match="no column of tests"):
        check_row({"answer": "4"}, {})
    check_row({"tests": None}, {})


@pytest.mark.parametrize(
    "tests",
    [
        5,
        "[1",
        [],
        [{"input": "1"}],
        {"inputs": ["1"], "outputs": []},
        {"a": 1},
        [{"fn_name": "a b", "input": "1", "output": "1"}],
    ],
)
def test_tests_that_cannot_be_read_are_a_fault_of_the_row(tests: Any) -> None:
    with pytest.raises(DataError, match=r"tests (holds no tests|is empty)"):
        check_row({"tests": tests}, {})


HELP = "import os, sys, time, signal, ctypes, socket, subprocess, threading, builtins, resource, atexit\n"
DETACH = "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"


def programs(name: str) -> dict[str, str]:
    """Programs of a file by their names."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return dict(each.split("\n", 1) for each in text.split("\n#### ")[1:])


HOSTILE, FORGED = programs("hostile_programs.txt"), programs("forged_programs.txt")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    folder = tmp_path / "canary"
    folder.mkdir()
    (folder / "answer").write_text("4")
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained_in_time_and_leaves_nothing(name: str, canary: Path, monkeypatch) -> None:
    monkeypatch.setenv("CANARY", "CANARY")
    before = set(processes.descendants(os.getpid()))
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_serve, args=(server,), daemon=True).start()
        head = f"{HELP}CANARY, PORT = {str(canary)!r}, {server.getsockname()[1]}\n"
        start = time.monotonic()
        value = reward(head + HOSTILE[name], [{"input": "", "output": "4"}] * 2, seconds=2, memory_mb=256)
        taken = time.monotonic() - start
        server.shutdown(socket.SHUT_RDWR)
    assert value == 0.0
    assert taken < 15
    assert set(processes.descendants(os.getpid())) == before
    assert [path.name for path in canary.iterdir()] == ["answer"] and (canary / "answer").read_text() == "4"
    assert not list(Path("/tmp").glob("rlft-program-*"))


def _serve(server: socket.socket) -> None:
    try:
        while True:
            server.accept()[0].sendall(b"4")
    except OSError:
        pass


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize(
    "test", ["assert f(2) == 4", "assert abs(f(2) - 4.0) < 1e-6", "assert 4 in [f(2)] or 4 in f(2)"]
)
def test_no_program_passes_a_test_falsely(name: str, test: str) -> None:
    assert reward(HELP + FORGED[name], [test], seconds=2) == 0.0


def test_a_program_that_takes_its_launcher_with_it_fails_and_the_next_one_runs(monkeypatch) -> None:
    """Only a system without namespaces and without Landlock's scope of signals lets a program do that."""
    ended = iter([None])
    run = Launcher.run
    monkeypatch.setattr(
        Launcher,
        "run",
        lambda self, request: (self.close(), next(ended))[1] if "bad" in request.program else run(self, request),
    )
    tests = [[{"input": "2", "output": "4"}]] * 2
    assert code([fenced("bad"), fenced(DOUBLE)], tests=tests, workers=1) == [0.0, 1.0]


WITHIN = """
import json, os, sys
from rlft.rewards import processes
from rlft.rewards.programs import contain
given = json.load(sys.stdin)
system = contain.System(*given["system"])
limits = contain.Limits(seconds=2, memory_mb=256)
contain.kernel.adopt_orphans()
contain.kernel.allow_inspection(False)
if not given["as_root"]:
    contain.os.getuid = lambda: 1
ended = []
for text in given["texts"]:
    stdin = os.open("/dev/null", os.O_RDONLY)
    running = contain.start(["program.py"], {"program.py": text}, stdin, limits, system)
    ended.append(contain.supervise([running], limits, system))
    assert processes.descendants(os.getpid()) == []
print(json.dumps([[*each[:2], each[2][:9], ""] for each in ended]))
"""


def run_within(system: contain.System, texts: list[str], as_root: bool = True) -> list[contain.Ended]:
    """Run programs in a process that is what a launcher is, on a system that allows only `system`."""
    given = json.dumps({"system": list(system), "texts": texts, "as_root": as_root})
    ran = subprocess.run([sys.executable, "-c", WITHIN], input=given, capture_output=True, text=True, check=True)
    return [contain.Ended(*each) for each in json.loads(ran.stdout)]


def readable() -> tuple[str, ...]:
    with Launcher(contain.Limits(seconds=2, memory_mb=256)) as launcher:
        return launcher.system.readable


def test_hostile_programs_where_nothing_can_be_mounted(canary: Path, monkeypatch) -> None:
    """As in a reward's worker, which is under Landlock."""
    monkeypatch.setenv("CANARY", "CANARY")
    system = contain.System(True, False, contain.kernel.landlock_version(), readable())
    head = f"{HELP}CANARY, PORT = {str(canary)!r}, 1\n"
    ended = run_within(system, [head + text for text in HOSTILE.values()])
    assert [name for name, each in zip(HOSTILE, ended, strict=True) if each[:3] == ("exit", 0, "4\n")] == []
    assert dict(zip(HOSTILE, ended, strict=True))["many files"].outcome == "files"
    assert [path.name for path in canary.iterdir()] == ["answer"]
    assert not list(Path("/tmp").glob("rlft-program-*"))


def test_without_namespaces_and_landlock_the_limits_hold() -> None:
    """As on a system that allows neither. As root, a program would run as another user, who may not reach Python."""
    texts = ["while True: pass", DETACH + "        time.sleep(1000)", "print(4)", "while True: print('4' * 10000)"]
    ended = run_within(contain.System(False, False, 0, ()), [HELP + text for text in texts], as_root=False)
    assert [each.outcome for each in ended] == ["seconds", "exit", "exit", "output"]


def test_a_killed_launcher_leaves_no_process_and_its_folder_to_the_next_one() -> None:
    before = set(processes.descendants(os.getpid()))
    launcher = Launcher(contain.Limits(seconds=60, memory_mb=256))
    thread = threading.Thread(target=launcher.run, args=(Request(f"{HELP}{DETACH}        pass\ntime.sleep(60)"),))
    thread.start()
    while len(set(processes.descendants(os.getpid())) - before) < 3 or not list(Path("/tmp").glob("rlft-program-*")):
        time.sleep(0.01)
    started = set(processes.descendants(os.getpid())) - before
    launcher._process.kill()
    thread.join()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    (folder,) = Path("/tmp").glob("rlft-program-*")
    os.utime(folder, (0, 0))
    Launcher(contain.Limits(seconds=2, memory_mb=256)).close()
    assert not list(Path("/tmp").glob("rlft-program-*"))


def test_what_the_system_or_the_limits_do_not_allow_is_a_fault_and_never_0() -> None:
    with Launcher(contain.Limits(seconds=5, memory_mb=256, file_mb=1)) as launcher:
        with pytest.raises(OSError, match=r"a program cannot be contained: .*No space"):
            launcher.run(Request("print(1)" * 10**6))
        assert launcher.run(Request("print(1)")).stdout == "1\n"  # type: ignore[union-attr]
    with pytest.raises(OSError, match=r"a program that prints 1 fails within .*memory_mb=8.* raise memory_mb"):
        reward(DOUBLE, [{"input": "2", "output": "4"}], memory_mb=8)


def test_full_isolation_is_refused_where_the_system_lacks_it(monkeypatch, capfd) -> None:
    start = Launcher.__init__

    def without(self: Launcher, limits: contain.Limits) -> None:
        start(self, limits)
        self.system = contain.System(False, False, 7, ())

    monkeypatch.setattr(Launcher, "__init__", without)
    monkeypatch.setattr(code_file, "_tried", set())
    tests = [[{"input": "2", "output": "4"}]]
    with pytest.raises(OSError, match="this system has no user namespaces"):
        code([fenced(DOUBLE)], tests=tests, isolation="full")
    assert code([fenced(DOUBLE)], tests=tests) == [1.0]
    assert "code: this system allows no user namespaces" in capfd.readouterr().err
    with pytest.raises(ValueError, match='isolation = "none"'):
        code([fenced(DOUBLE)], tests=tests, isolation="none")


def test_code_by_name_in_its_worker() -> None:
    (function,) = build_rewards([Reward("code", args={"seconds": 5})])
    row = {"prompt": "double", "tests": [{"input": "2", "output": "4"}]}
    made = [
        Rollout(Prompt((1,), row, 0), (1,), (True,), None, text, FinishReason.STOP, i, 0, 0)
        for i, text in enumerate([fenced(DOUBLE), fenced("print(input())")])
    ]
    try:
        _, parts = score(made, [function], {})
    finally:
        function.close()
    assert records.columns(parts) == {"code": [1.0, 0.0], "code/outcome": ["passed", "wrong output"]}
