"""Find and kill the processes below this one (Linux)."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

SWEEP_SECONDS = 10.0
"""Time limit of `kill_all_below` where its caller gives none."""


def descendants(root: int) -> list[int]:
    """Return the pids of every process below `root`, dead ones that nobody has waited for included."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                text = Path("/proc", name, "stat").read_text(errors="replace")
                parents.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(name))
    found, queue = [], [root]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def count_of_user() -> int:
    """Return the number of processes and threads of this user."""
    count = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            count += len(os.listdir(path / "task")) if path.stat().st_uid == os.getuid() else 0
    return count


def kill_all_below(seconds: float = SWEEP_SECONDS) -> None:
    """Kill every process below this one and wait for it. Raises TimeoutError when one survives for that long.

    All are stopped before one is killed: a process that forks as fast as it is killed would never be caught otherwise.
    """
    deadline = time.monotonic() + seconds
    while True:
        pids, stopped = descendants(os.getpid()), set()
        while set(pids) - stopped and time.monotonic() < deadline:
            for pid in set(pids) - stopped:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGSTOP)
            stopped |= set(pids)
            pids = descendants(os.getpid())
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(pids)} processes of a program could not be killed in {seconds:g} s")
        time.sleep(0.001)
