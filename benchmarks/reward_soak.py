"""The soak of reward workers: 20,000 calls of one function, 1,000 of them with a fault drawn by a seed.

    python benchmarks/reward_soak.py            # about 20 minutes on two busy cores

Each call scores four completions. In a call with a fault one of them raises, hangs, ends or stops its process, starts a
process in another session or with an empty environment and dies, allocates past its memory limit, or writes something
that is no reply to the pipe. That row must come back invalid with the right fault, the other three with their rewards;
a result of the wrong length must be an error of the whole call. At the end no process may be left and the caller's
memory and descriptors must be where they were. tests/rewards/test_reward_soak.py runs the same function.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rlft.config.data import Reward
from rlft.errors import RewardError
from rlft.rewards.score import build_rewards, score
from rlft.types import FinishReason, Prompt, Rollout

FUNCTION = """
import math, os, pickle, signal, struct, subprocess, sys, time

class Silent(Exception):
    def __str__(self): raise RuntimeError("no text")

class Executed:
    def __reduce__(self): return (os.mkdir, (f"{CHILDREN}/0",))

def message(data, length=None):
    os.write(int(sys.argv[2]), struct.pack("!4sQ", b"rlft", len(data) if length is None else length) + data)

def faulty(completions, fault, **kwargs):
    for kind in fault:
        if kind == "raise":
            raise ValueError("the soak's own")
        if kind == "no text":
            raise Silent
        if kind == "sys.exit":
            sys.exit(5)
        if kind == "hang":
            while True:
                time.sleep(60)
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit":
            os._exit(7)
        if kind == "fork":
            before = len(os.listdir(CHILDREN))
            child = os.fork()
            if child == 0:
                os.setsid()  # out of the reach of a signal to the worker's group or session
                if os.fork() == 0:
                    open(f"{CHILDREN}/{os.getpid()}", "w").close()
                    time.sleep(600)
                os._exit(0)
            os.waitpid(child, 0)
            while len(os.listdir(CHILDREN)) == before:
                time.sleep(0.001)
            os._exit(9)
        if kind == "empty environment":
            child = subprocess.Popen(["/bin/sleep", "600"], env={}, start_new_session=True)
            open(f"{CHILDREN}/{child.pid}", "w").close()
            os._exit(11)
        if kind == "memory":
            bytearray(2**31)
        if kind == "garbage in the pipe":
            os.write(int(sys.argv[2]), b"garbage" * 100)
        if kind == "pickle in the pipe":
            message(pickle.dumps(Executed()))
        if kind == "half a reply":
            message(b"{", 1000)
            time.sleep(60)
        if kind == "endless reply":
            message(b"x" * 1000, 2**60)
        if kind == "infinite":
            return [1.0] * (len(completions) - 1) + [math.inf]
        if kind == "wrong count":
            return [1.0] * (len(completions) + 1)
    return [float(len(text)) for text in completions]
"""

SIGNS = {
    "raise": "ValueError: the soak's own",
    "no text": "Silent: <Silent whose str raises>",
    "sys.exit": "SystemExit: 5",
    "hang": "took longer than",
    "stop": "took longer than",
    "half a reply": "took longer than",
    "signal": "killed by SIGKILL",
    "empty environment": "exit code 11",
    "exit": "exit code 7",
    "fork": "exit code 9",
    "memory": "MemoryError",
    "garbage in the pipe": "sent garbage (it begins with",
    "pickle in the pipe": "sent garbage ('utf-8'",
    "endless reply": "sent garbage (a message of",
    "infinite": "returned inf",
    "wrong count": "returned 5 rewards for 4 completions",
}
"""Kind of fault, and what its message must hold."""
ROWS = 4


def soak(calls: int, faults: int, seed: int, timeout: float = 0.25) -> dict[str, Any]:
    """Run `calls` calls, `faults` of them with a fault; returns what was drawn, what was seen, and what was left."""
    rng = random.Random(seed)
    # The first call must be good: what is wrong from the start stops a run instead.
    drawn = {call: rng.choice(sorted(SIGNS)) for call in rng.sample(range(1, calls), faults)}
    with tempfile.TemporaryDirectory() as folder:
        children = Path(folder, "children")
        children.mkdir()
        file = Path(folder, "rewards.py")
        file.write_text(f"CHILDREN = {str(children)!r}\n{FUNCTION}")
        began, others = time.monotonic(), set(_children())
        (function,) = build_rewards([Reward(f"{file}:faulty", timeout=timeout, memory_mb=1024)])
        seen: Counter[str] = Counter()
        wrong: list[str] = []
        before = (0, 0)
        for call in range(calls):
            guilty = rng.randrange(ROWS) if call in drawn else None
            made = [_rollout(call, row, drawn[call] if row == guilty else "") for row in range(ROWS)]
            try:
                total, parts = score(made, [function], {"global_step": call})
            except RewardError as error:
                if SIGNS.get(drawn.get(call, ""), "never") in str(error) and drawn[call] == "wrong count":
                    seen["wrong count"] += 1
                else:
                    wrong.append(f"call {call}: {error}")
                continue
            outcome = parts.outcomes["faulty"]
            wanted = [float(len(r.text)) for r in made]
            good = [row for row in range(ROWS) if row != guilty]
            if [total[row] for row in good] != [wanted[row] for row in good]:
                wrong.append(f"call {call}: {total.tolist()} instead of {wanted}")
            if outcome.invalid != [row == guilty for row in range(ROWS)]:
                wrong.append(f"call {call}: invalid {outcome.invalid}, fault {drawn.get(call)!r} in row {guilty}")
            if any(outcome.invalid):
                kind = drawn.get(call, "")
                seen[kind if kind and SIGNS[kind] in outcome.fault else outcome.fault] += 1
            if call == calls // 10:
                before = (_descriptors(), _resident())
        after = (_descriptors(), _resident())
        function.close()
        seconds = time.monotonic() - began
        forked = [int(path.name) for path in children.iterdir()]
    return {
        "seconds": seconds,
        "drawn": dict(Counter(drawn.values())),
        "seen": dict(seen),
        "wrong": wrong,
        "forked": len(forked),
        "left": [pid for pid in forked if _alive(pid)] + sorted(set(_children()) - others),
        "descriptors": after[0] - before[0],
        "memory_mb": (after[1] - before[1]) / 2**20,
    }


def _rollout(call: int, row: int, fault: str) -> Rollout:
    prompt = Prompt((1,), {"prompt": "p", "fault": fault}, call)
    return Rollout(prompt, (1,), (True,), None, "x" * (call % 7 + row), FinishReason.STOP, row, call, 0)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _children() -> list[int]:
    """Children of this process, dead ones that nobody waited for included."""
    return [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


def main() -> None:
    from results_file import write

    found = soak(calls=20_000, faults=1000, seed=0, timeout=1.0)
    print(found)
    counts = ", ".join(f"{kind} {n}" for kind, n in sorted(found["drawn"].items()))
    note = f"20,000 calls of {ROWS} rows, 1,000 faults drawn by seed 0: {counts}"
    equal = sum((Counter(found["drawn"]) & Counter(found["seen"])).values())
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    values = [
        ("faults_as_drawn", equal, "faults", note),
        ("wrong_rows", len(found["wrong"]), "calls", note),
        (
            "processes_left",
            len(found["left"]),
            "processes",
            f"{found['forked']} were started in another session or environment",
        ),
        ("descriptors_gained", found["descriptors"], "descriptors", "in this process, from call 2,000 to the end"),
        ("memory_gained", round(found["memory_mb"], 1), "MiB", "resident, in this process, from call 2,000 to the end"),
        ("seconds", round(found["seconds"], 1), "s", f"first call to the end, workers started again included; {load}"),
    ]
    keys = ("metric", "value", "unit", "note")
    print(
        write(
            "reward_soak",
            [{"work": "rewards/soak", "stack": "rlft", **dict(zip(keys, v, strict=True))} for v in values],
        )
    )


if __name__ == "__main__":
    main()
