"""The process that runs programs, and the end of it that a reward function talks to.

A launcher runs one program at a time, for as long as its parent's thread lives. It reads one JSON object per line and
answers with one: `Request` and `Ended`. The outputs that a test expects stay with the parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rlft.rewards import kernel, processes
from rlft.rewards.programs import contain
from rlft.rewards.programs.contain import Ended, Limits, System
from rlft.rewards.programs.remote import PASSED

ROOT = Path(__file__).parents[3]
SLACK = processes.SWEEP_SECONDS + 10.0
"""Seconds that a launcher may take beyond a program's time."""
START_SECONDS = 60.0


class Request(NamedTuple):
    """One run of a program."""

    program: str
    stdin: str = ""
    tests: str | None = None
    """Code that calls the program; None runs it with `stdin` alone."""
    entry_point: str = ""
    """Name that is passed to a function `check` of the tests."""


class Launcher:
    """A launcher's process as its parent has it. Use it in the thread that created it, as a context manager."""

    def __init__(self, limits: Limits) -> None:
        """Start the process. Raises OSError when it does not start."""
        code = "import sys; sys.path.append(sys.argv[1]); from rlft.rewards.programs import launcher; launcher.main()"
        self._limits = limits
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code, str(ROOT), *_python()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={name: os.environ[name] for name in ("TMPDIR",) if name in os.environ},
        )
        self._rest = b""
        system = self._line(START_SECONDS)
        if system is None:
            self.close()
            raise OSError("the process that contains programs did not start; its message is above")
        self.system = System(*json.loads(system))

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def run(self, request: Request) -> Ended | None:
        """Run a program and return how it ended; None when it took its launcher with it, which is then closed.

        Raises OSError when the system does not let it start or be killed.
        """
        data = json.dumps([asdict(self._limits), request]).encode() + b"\n"
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError:
            line = None
        else:
            line = self._line(self._limits.seconds + SLACK)
        if line is None:
            self.close()
            return None
        reply = json.loads(line)
        if isinstance(reply, str):
            raise OSError(reply)
        return Ended(*reply)

    def close(self) -> None:
        """Kill the process; what it was running dies with it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not flushed has no reader
                pipe.close()  # type: ignore[union-attr]

    def _line(self, seconds: float) -> bytes | None:
        """Return the next line; None when the process ended or the time is over."""
        assert self._process.stdout is not None
        fd, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        parts = [self._rest]
        while b"\n" not in parts[-1]:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            part = os.read(fd, 2**20)
            if not part:
                return None
            parts.append(part)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line


def _python() -> list[str]:
    """Return the folders that hold the interpreter, what its file links to, and its packages."""
    executables = (sys.executable, os.path.realpath(sys.executable))
    return [sys.prefix, sys.base_prefix, *(os.path.dirname(path) for path in executables)]


def main() -> None:
    """Serve the parent until it closes the pipe."""
    kernel.die_with_parent()
    kernel.adopt_orphans()
    kernel.allow_inspection(False)
    contain.delete_abandoned()
    system = contain.probe(sys.argv[2:])
    _write(system)
    for line in sys.stdin:
        limits, request = json.loads(line)
        try:
            _write(_run(Request(*request), Limits(**limits), system))
        except OSError as error:
            _write(f"a program cannot be contained: {error}")


def _write(values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _run(request: Request, limits: Limits, system: System) -> Ended:
    stdin = os.memfd_create("stdin")
    with open(stdin, "wb") as file:
        file.write(request.stdin.encode("utf-8", "surrogatepass"))
        file.flush()
        os.lseek(stdin, 0, os.SEEK_SET)
        if request.tests is None:
            files = {"program.py": request.program}
            return contain.supervise([contain.start(["program.py"], files, stdin, limits, system)], limits, system)
        remote = str(Path(__file__).with_name("remote.py"))
        theirs, ours = socket.socketpair()
        with theirs, ours:
            files = {"tests.py": request.tests, "entry_point": request.entry_point}
            tests = contain.start([remote, "tests"], files, stdin, limits, system, ours.fileno())
            files = {"program.py": request.program}
            program = contain.start([remote, "program"], files, stdin, limits, system, theirs.fileno())
        return contain.supervise([tests, program], limits, system)


def passed(ended: Ended | None) -> bool:
    """Return True when tests that call the program reached their end."""
    return ended is not None and (ended.outcome, ended.code) == ("exit", PASSED)
