"""Where reward functions run: a sticky worker process each, killable with its children, or the caller's main thread.

Both have the same three methods: `open() -> Signature`, `call(columns, constants, timeout) -> Reply`, `close()`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from rlft.errors import RewardError
from rlft.rewards.worker import HEADER, Reply, Signature, call, encode, signature

START_SECONDS = 60.0
"""Time a worker has to import the user's file: it may load a grader of its own."""


class Place(Protocol):
    """Where a reward function runs."""

    def open(self) -> Signature:
        """Make the function ready. Raises RewardError when it cannot be imported."""
        ...

    def call(self, columns: dict[str, list[Any]], constants: dict[str, Any], timeout: float) -> Reply:
        """Run it on a batch; every fault comes back as a Reply."""
        ...

    def close(self) -> None:
        """End it. May be called twice."""
        ...


class InThread:
    """The caller's thread: for closures and lambdas, which no other process can import. It cannot be stopped."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def open(self) -> Signature:
        """As Place."""
        try:
            return signature(self._function)
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {self._function!r}: cannot be called: {error}") from error

    def call(self, columns: dict[str, list[Any]], constants: dict[str, Any], timeout: float) -> Reply:
        """As Place; `timeout` cannot be kept here."""
        return call(self._function, columns, constants)

    def close(self) -> None:
        """Nothing to end."""


class InWorker:
    """A process of its own, started once and kept; killed with its children on a timeout, and then replaced."""

    def __init__(self, target: str, memory_mb: int | None = None) -> None:
        """target: "file.py:function" or "package.module:function"."""
        self._target, self._memory_mb = target, memory_mb
        self._process: subprocess.Popen[bytes] | None = None
        self._to = self._from = -1

    def open(self) -> Signature:
        """As Place: start the process and import the function."""
        self._start()
        reply = self._exchange({"target": self._target, "memory_mb": self._memory_mb}, START_SECONDS)
        if isinstance(reply, Signature):
            return reply
        self.close()
        raise RewardError(f'reward "{self._target}" cannot be imported: {reply.text}')

    def call(self, columns: dict[str, list[Any]], constants: dict[str, Any], timeout: float) -> Reply:
        """As Place. A process that died or hung before is started again first."""
        if self._process is None:
            try:
                self.open()
            except RewardError as error:
                return Reply("died", [], str(error))
        reply = self._exchange({"columns": columns, "constants": constants}, timeout)
        assert isinstance(reply, Reply)
        if reply.kind in ("timeout", "died"):
            self.close()
        return reply

    def close(self) -> None:
        """Kill the process and everything it started in its session."""
        process, self._process = self._process, None
        if process is None:
            return
        # The group first and the wait after: until it is waited for, its number cannot become another process's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(self._to)
        os.close(self._from)

    def _start(self) -> None:
        assert self._process is None
        child_read, self._to = os.pipe()
        self._from, child_write = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlft.rewards.worker", str(child_read), str(child_write)],
                stdin=subprocess.DEVNULL, pass_fds=(child_read, child_write), start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )  # fmt: skip
        finally:
            os.close(child_read)
            os.close(child_write)
        os.set_blocking(self._to, False)

    def _exchange(self, message: Any, timeout: float) -> Any:
        """Send a message and wait for the answer, both within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        try:
            self._send(encode(message), deadline)
            size = HEADER.unpack(self._receive(HEADER.size, deadline))[0]
            return pickle.loads(self._receive(size, deadline))
        except TimeoutError:
            return Reply("timeout", [], f"took longer than {timeout:g} s")
        except (EOFError, BrokenPipeError, ConnectionResetError):
            assert self._process is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            return Reply("died", [], f"its process ended ({_ending(self._process.returncode)})")
        except (pickle.UnpicklingError, AttributeError, ImportError, MemoryError) as error:
            return Reply("died", [], f"its process sent garbage ({error})")

    def _send(self, data: bytes, deadline: float) -> None:
        rest = memoryview(data)
        while rest:
            _, ready, _ = select.select([], [self._to], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            rest = rest[os.write(self._to, rest[: 2**16]) :]

    def _receive(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(self._from, min(size - len(data), 2**20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


def _ending(code: int | None) -> str:
    if code is None:
        return "it closed its pipes"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
