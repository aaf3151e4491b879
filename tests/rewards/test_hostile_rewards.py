"""Hostile reward functions: each kind ends in a counted fault or in a RewardError, in a worker and in this process."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_rewards import rollouts

from rlft.config.data import Reward
from rlft.errors import RewardError
from rlft.rewards import protocol
from rlft.rewards.protocol import HEADER, MAGIC, Reply, parsed
from rlft.rewards.score import RewardFunction, build_rewards, score

ROOT = Path(__file__).parents[2]

SOURCE = r"""
import asyncio, itertools, json, os, struct, sys, time

def bad(completions): return "text 1" in completions
def good(completions): return [1.0] * len(completions)

class StrRaises(Exception):
    def __str__(self): raise RuntimeError("no str")
    __repr__ = __str__

class Endless(Exception):
    def __str__(self): return str(self)

class StrExits(Exception):
    def __str__(self): sys.exit(3)

class ReprRaises:
    def __repr__(self): raise RuntimeError("no repr")

class ItemRaises:
    def item(self): raise KeyError("no item")

class Strange(type):
    @property
    def __name__(self): raise RuntimeError("no name")

class NoName(Exception, metaclass=Strange): pass

def str_raises(completions, **_):
    if bad(completions): raise StrRaises
    return good(completions)
def endless_str(completions, **_):
    if bad(completions): raise Endless
    return good(completions)
def str_exits(completions, **_):
    if bad(completions): raise StrExits
    return good(completions)
def no_name(completions, **_):
    if bad(completions): raise NoName("odd")
    return good(completions)
def item_raises(completions, **_):
    return [ItemRaises()] * len(completions) if bad(completions) else good(completions)
def exits(completions, **_):
    if bad(completions): sys.exit(0)
    return good(completions)
async def exits_async(completions, **_):
    if bad(completions): sys.exit(0)
    return good(completions)
async def interrupts_async(completions, **_):
    if bad(completions): raise KeyboardInterrupt
    return good(completions)
async def exits_in_a_task(completions, **_):
    async def one(text):
        if text == "text 1": sys.exit(4)
        return 1.0
    return list(await asyncio.gather(*map(one, completions)))
async def exits_in_a_callback(completions, **_):
    if bad(completions):
        asyncio.get_running_loop().call_soon(sys.exit, 5)
        await asyncio.sleep(60)
    return good(completions)

def repr_raises(completions, **_):
    return [ReprRaises()] * len(completions) if bad(completions) else good(completions)
def no_end(completions, **_):
    return itertools.repeat(1.0) if bad(completions) else good(completions)
def short(completions, **_):
    return [1.0] if bad(completions) else good(completions)
def text_of(completions, **_):
    return ["1.0"] * len(completions) if bad(completions) else good(completions)
def not_a_list(completions, **_):
    return 1.0 if bad(completions) else good(completions)
def short_half(completions, **_):
    if len(completions) > 2: raise ValueError("too many")
    return good(completions)[:1] if bad(completions) else good(completions)
def extra_column(completions, log_extra, **_):
    log_extra("x", itertools.repeat(1) if bad(completions) else completions)
    return good(completions)

def header_without_end(completions, **_):
    if bad(completions):
        os.write(int(sys.argv[2]), struct.pack("!4sQ", b"rlft", 1000))
        time.sleep(60)
    return good(completions)
def huge_header(completions, **_):
    if bad(completions):
        os.write(int(sys.argv[2]), struct.pack("!4sQ", b"rlft", 2**60) + b"x" * 1000)
        time.sleep(60)
    return good(completions)
def pickle_in_the_pipe(completions, **_):
    if bad(completions):
        import pickle
        class E:
            def __reduce__(self): return (os.system, (f"touch {OUT}",))
        data = pickle.dumps(E())
        os.write(int(sys.argv[2]), struct.pack("!4sQ", b"rlft", len(data)) + data)
        time.sleep(60)
    return good(completions)
def forged(completions, **_):
    if bad(completions):
        reply = ["ok", [9.0] * len(completions), "", {}, {}, 0.0]
        data = json.dumps({"call": "0" * 32, "reply": reply}).encode()
        os.write(int(sys.argv[2]), struct.pack("!4sQ", b"rlft", len(data)) + data)
    return good(completions)

class S(str):
    def __reduce__(self): return (os.system, (f"touch {OUT}",))
    def __str__(self): return self
    def __iter__(self): raise RuntimeError("no iter")
def logs_a_subclass(completions, log_extra, **_):
    log_extra("x", [S("a\ud83d")] * len(completions)); return good(completions)
def colours(completions, **_):
    if bad(completions): raise ValueError("\ud83d \x1b[31mred\x1b]0;title\x07")
    return good(completions)
"""

FAULTS = {
    "str_raises": "StrRaises: <StrRaises whose str raises>",
    "endless_str": "Endless: <Endless whose str raises>",
    "str_exits": "StrExits: <StrExits whose str raises>",
    "no_name": "NoName: odd",
    "item_raises": "KeyError: 'no item'",
    "exits": "SystemExit: 0",
    "exits_async": "SystemExit: 0",
    "interrupts_async": "KeyboardInterrupt",
    "exits_in_a_task": "SystemExit: 4",
    "colours": r"ValueError: \ud83d \x1b[31mred\x1b]0;title\x07",
}
"""Functions of which row 1 alone is invalid, and what the message of the fault holds."""
STOPS = {
    "repr_raises": "returned <ReprRaises whose repr raises> for completion 0",
    "no_end": "returned more than 4 rewards for 4 completions",
    "short": "returned 1 rewards for 4 completions",
    "text_of": "returned '1.0' for completion 0, want a float or None",
    "not_a_list": "returned float, want a list",
    "short_half": "returned 1 rewards for 2 completions",
    "extra_column": "log_extra('x') got more than 4 values for 4 completions",
}
"""Functions whose result is wrong in count or type, and what the error says."""
PIPE = {
    "header_without_end": "took longer than 0.5 s",
    "huge_header": "sent garbage (a message of",
    "pickle_in_the_pipe": "sent garbage",
    "forged": "sent garbage (no answer to this call)",
}
"""Functions that write to the pipe of their worker."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile.py").write_text(f"OUT = {str(folder / 'executed')!r}\n{SOURCE}")
    return folder


@pytest.fixture
def make(folder: Path):
    opened: list[RewardFunction] = []
    space: dict[str, Any] = {}

    def open_(name: str, place: str, timeout: float = 5.0) -> RewardFunction:
        if place == "worker":
            reward = Reward(f"{folder}/hostile.py:{name}", timeout=timeout)
        else:
            exec(compile((folder / "hostile.py").read_text(), "hostile.py", "exec"), space)
            reward = Reward(space[name], timeout=timeout)
        opened.extend(build_rewards([reward]))
        return opened[-1]

    yield open_
    for function in opened:
        function.close()
    assert not (folder / "executed").exists()


def rewards(function: RewardFunction, texts: list[str] | None = None) -> tuple[list[float], str]:
    total, parts = score(rollouts(4, texts), [function], {})
    return total.tolist(), " ".join(parts.faults())


GOOD = ["text 0", "text 2", "text 3", "text 4"]


@pytest.mark.parametrize("place", ["worker", "here"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_leaves_out_its_row_and_the_function_goes_on(name: str, place: str, make) -> None:
    function = make(name, place)
    for _ in range(2):
        values, faults = rewards(function)
        assert values[0] == values[2] == values[3] == 1.0 and math.isnan(values[1])
        assert FAULTS[name] in faults and "\x1b" not in faults


@pytest.mark.parametrize("place", ["worker", "here"])
@pytest.mark.parametrize("name", STOPS)
def test_a_wrong_count_or_type_stops_at_any_step(name: str, place: str, make) -> None:
    function = make(name, place)
    if name != "short_half":
        assert rewards(function, GOOD)[0] == [1.0] * 4  # so that it is proven
    with pytest.raises(RewardError) as caught:
        rewards(function)
    assert STOPS[name] in str(caught.value)
    assert caught.value.exit_code == (2 if name == "short_half" else 3)


@pytest.mark.parametrize("name", PIPE)
def test_what_is_written_to_the_pipe_is_garbage_in_time_and_never_executed(name: str, make) -> None:
    function = make(name, "worker", timeout=0.5)
    rewards(function, GOOD)
    start = time.monotonic()
    values, faults = rewards(function)
    assert values[0] == values[2] == values[3] == 1.0 and math.isnan(values[1])
    assert PIPE[name] in faults
    assert time.monotonic() - start < 3 * 0.5 + 10  # three calls hang; the rest is starting the worker again
    assert rewards(function, GOOD)[0] == [1.0] * 4


@pytest.mark.parametrize("place", ["worker", "here"])
def test_a_subclass_of_str_is_logged_as_plain_text(place: str, make) -> None:
    _, parts = score(rollouts(4), [make("logs_a_subclass", place)], {})
    (column,) = parts.outcomes["logs_a_subclass"].extras.values()
    assert column == ["a\ufffd"] * 4 and {type(value) for value in column} == {str}


@pytest.mark.parametrize("place", ["worker", "here"])
def test_a_callback_that_exits_ends_no_loop(place: str, make) -> None:
    function = make("exits_in_a_callback", place, timeout=0.4)
    for _ in range(2):
        values, faults = rewards(function)
        assert values[0] == values[2] == values[3] == 1.0 and math.isnan(values[1])
        assert "took longer than 0.4 s" in faults


def test_an_async_function_that_blocks_the_loop_does_not_hold_up_the_others() -> None:
    release = threading.Event()

    async def blocks(completions: list[str], **_: Any) -> list[float]:
        if "text 1" in completions:
            release.wait(30)
        return [1.0] * len(completions)

    async def innocent(completions: list[str], **_: Any) -> list[float]:
        return [2.0] * len(completions)

    functions = build_rewards([Reward(blocks, timeout=0.3)])  # type: ignore[arg-type]
    assert score(rollouts(2, ["a", "b"]), functions, {})[0].tolist() == [1.0, 1.0]
    total, _ = score(rollouts(2), functions, {})
    assert total[0] == 1.0 and math.isnan(total[1])
    others = build_rewards([Reward(innocent, timeout=5)])  # type: ignore[arg-type]
    assert score(rollouts(2), others, {})[0].tolist() == [2.0, 2.0]
    release.set()
    for function in (*functions, *others):
        function.close()


def test_ctrl_c_of_the_user_ends_a_call_in_this_process_and_in_a_worker(folder: Path) -> None:
    code = (
        "import signal, sys, time, threading, os\n"
        "sys.path[:0] = sys.argv[1:3]\n"
        "from test_rewards import rollouts\n"
        "from rlft.rewards.score import build_rewards, score\n"
        "def here(completions, **_): time.sleep(60)\n"
        "async def later(completions, **_):\n"
        "    import asyncio; await asyncio.sleep(60)\n"
        "for use in (here, later, sys.argv[3]):\n"
        "    functions = build_rewards([use])\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    try: score(rollouts(2), functions, {})\n"
        "    except KeyboardInterrupt: print('interrupted')\n"
        "    functions[0].close()\n"
    )
    (folder / "sleeps.py").write_text("import time\ndef sleeps(completions, **_): time.sleep(60)\n")
    run = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(ROOT / "tests" / "rewards"), f"{folder}/sleeps.py:sleeps"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])},
    )
    assert run.stdout == "interrupted\n" * 3, run.stderr


# ---- messages ----------------------------------------------------------------------------------------------------

CALL = "0" * protocol.TOKEN
OK = Reply("ok", [1.0, None], "", {"m": [1.0]}, {"x": ["a", None]}, 0.5)
BROKEN: dict[str, Any] = {
    "no json": b"\x80\x04K\x01.",
    "deep": b"[" * 100_000,
    "a list": [],
    "another call": {"call": "1" * 32, "reply": OK},
    "no fields": {"call": CALL},
    "a field too few": {"call": CALL, "reply": list(OK)[:-1]},
    "an unknown kind": {"call": CALL, "reply": OK._replace(kind="died")},
    "a value too few": {"call": CALL, "reply": OK._replace(values=[1.0])},
    "values of a fault": {"call": CALL, "reply": OK._replace(kind="raised")},
    "a value that is text": {"call": CALL, "reply": OK._replace(values=["1.0", None])},
    "a value that is infinite": {"call": CALL, "reply": OK._replace(values=[math.inf, None])},
    "a metric that is text": {"call": CALL, "reply": OK._replace(metrics={"m": ["1"]})},
    "a short column": {"call": CALL, "reply": OK._replace(extras={"x": ["a"]})},
    "a column of lists": {"call": CALL, "reply": OK._replace(extras={"x": [[], []]})},
    "a text that is none": {"call": CALL, "reply": OK._replace(text=7)},  # type: ignore[arg-type]
    "a signature of numbers": {"call": CALL, "signature": [[1], [], True]},
}


def test_floats_survive_a_reply_to_the_last_bit() -> None:
    numbers = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 2 / 3, math.nan, None]
    reply = Reply("ok", numbers, "", {"m": [math.inf, 0.1 + 0.2]}, {"x": [None] * 7}, 0.0)
    again = parsed(protocol.reply_message(CALL, reply)[HEADER.size :], CALL, 7)
    assert isinstance(again, Reply) and [repr(value) for value in again.values] == [repr(value) for value in numbers]
    assert again.metrics == reply.metrics and again.extras == reply.extras


@pytest.mark.parametrize("case", BROKEN)
def test_a_message_that_no_worker_sends_is_refused(case: str) -> None:
    message = BROKEN[case]
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    with pytest.raises(ValueError):
        parsed(data, CALL, 2)


def test_a_reply_that_is_too_large_is_a_fault_of_its_rows() -> None:
    reply = OK._replace(extras={"x": ["y" * protocol.LARGEST_REPLY, None]})
    data = protocol.reply_message(CALL, reply)
    magic, size = struct.unpack("!4sQ", data[: HEADER.size])
    again = parsed(data[HEADER.size :], CALL, 2)
    assert magic == MAGIC and size < 1000 and isinstance(again, Reply)
    assert again.kind == "raised" and "logged 32 MiB" in again.text


def test_nothing_but_a_worker_unpickles() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "rlft").rglob("*.py")
        if "pickle.load" in path.read_text() or "Unpickler" in path.read_text()
    ]
    assert found == ["rlft/rewards/worker.py"]


@pytest.mark.parametrize("timeout", [math.inf, 1e300, 3e6])
def test_a_timeout_longer_than_any_wait_is_no_limit(timeout: float, folder: Path, make) -> None:
    async def later(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0.01)
        return [1.0] * len(completions)

    assert rewards(make("str_raises", "worker", timeout), GOOD)[0] == [1.0] * 4
    (function,) = build_rewards([Reward(later, timeout=timeout)])  # type: ignore[arg-type]
    assert rewards(function)[0] == [1.0] * 4
    function.close()
    with pytest.raises(ValueError, match=r"rewards.timeout = nan: want above 0"):
        Reward("number", timeout=math.nan)


def test_a_worker_that_was_stopped_by_a_signal_is_named_by_it(folder: Path) -> None:
    (folder / "dies.py").write_text(
        "import os, signal\ndef dies(completions, **_):\n"
        "    if 'text 1' in completions: os.kill(os.getpid(), signal.SIGRTMIN + 3)\n"
        "    return [1.0] * len(completions)\n"
    )
    (function,) = build_rewards([f"{folder}/dies.py:dies"])
    assert f"killed by signal {signal.SIGRTMIN + 3}" in rewards(function)[1]
    function.close()
