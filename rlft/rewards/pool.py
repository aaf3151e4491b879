"""Executors of reward functions: a persistent worker process per function, or the caller's thread.

Both implement `Executor`: `open() -> Signature`, then `start(columns, constants, rows, timeout)` and `finish() ->
Reply` for each call, and `close()`. A worker process can be killed together with all its descendants. Workers, and
async functions in this process, run between start and finish, so calls of several functions overlap.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import inspect
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from rlft.errors import RewardError
from rlft.rewards.worker import HEADER, MAGIC, Call, Reply, Signature, encode, settle, signature

START_SECONDS = 60.0
"""Time limit for a worker to import the user's file, which may load a grader model."""
TRANSFER_SECONDS = 10.0
"""Time limit for the transfer of a reply, counted from its first bytes."""
MARK = "RLFT_REWARD_WORKER"
"""Environment variable that a worker's descendants inherit, by which they are found and killed."""


class Executor(Protocol):
    """Runs a reward function."""

    apart: bool
    """True when the function runs in a separate process."""

    def open(self) -> Signature:
        """Import the function and return its signature. Raises RewardError when it cannot be imported."""
        ...

    def start(self, columns: dict[str, list[Any]], constants: dict[str, Any], rows: int, timeout: float) -> None:
        """Start a call on a batch of `rows`. Raises RewardError for arguments that cannot be sent to a process."""
        ...

    def finish(self) -> Reply:
        """Wait for the call and return its Reply, which also reports all faults."""
        ...

    def close(self) -> None:
        """Stop the executor and any running call. May be called twice."""
        ...


class Loop:
    """An event loop in a separate thread, for async functions called in this process.

    The functions run concurrently, can share objects bound to the loop, and do not conflict with the loop of a
    notebook. The loop runs from the first use until `close`.
    """

    def __init__(self) -> None:
        self._loop: Any = None
        self._end: Any = None
        self._thread: threading.Thread | None = None

    def submit(self, begin: Callable[[], Awaitable[Any]]) -> concurrent.futures.Future[Any]:
        """Call `begin` on the loop and await its result."""
        import asyncio

        if self._thread is None:
            ready = threading.Event()
            self._thread = threading.Thread(target=self._serve, args=(ready,), name="rlft-rewards", daemon=True)
            self._thread.start()
            ready.wait()

        async def run() -> Any:
            return await settle(begin())

        return asyncio.run_coroutine_threadsafe(run(), self._loop)

    def close(self) -> None:
        """Cancel the running tasks and stop the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._loop.call_soon_threadsafe(self._end.set)
            thread.join(1.0)  # a coroutine that blocks its loop cannot be stopped; the thread dies with the process

    def _serve(self, ready: threading.Event) -> None:
        import asyncio

        async def until_end() -> None:
            self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await self._end.wait()

        asyncio.run(until_end())


class InProcess:
    """Runs a function in the caller's thread, for closures and lambdas, which no other process can import.

    A call cannot be stopped, except an async one where it awaits.
    """

    apart = False

    def __init__(self, function: Callable[..., Any], loop: Loop | None = None) -> None:
        """Wrap `function`. loop: event loop for an async function, shared with others; None creates a new one."""
        plain = function
        while isinstance(plain, functools.partial):
            plain = plain.func
        self._is_async = inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(type(plain).__call__)
        self._function, self._loop = function, loop or Loop()
        self._call: Call | None = None
        self._future: concurrent.futures.Future[Any] | None = None
        self._timeout = self._began = 0.0

    def open(self) -> Signature:
        """See `Executor.open`."""
        try:
            return signature(self._function)
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {self._function!r}: cannot be called: {error}") from error

    def start(self, columns: dict[str, list[Any]], constants: dict[str, Any], rows: int, timeout: float) -> None:
        """See `Executor.start`. A function that is not async runs in `finish`."""
        self._call, self._timeout, self._began = (
            Call(self._function, columns, constants, rows),
            timeout,
            time.monotonic(),
        )
        self._future = self._loop.submit(self._call.begin) if self._is_async else None

    def finish(self) -> Reply:
        """See `Executor.finish`."""
        assert self._call is not None
        call, future, self._call, self._future = self._call, self._future, None, None
        if future is None:
            return call.reply(lambda: self._resolve(call.begin()))
        remaining = max(0.0, self._began + self._timeout - time.monotonic())
        if not concurrent.futures.wait([future], remaining).done:
            future.cancel()
            return _timed_out(self._timeout, self._began)
        return call.reply(future.result)._replace(seconds=time.monotonic() - self._began)

    def close(self) -> None:
        """Stop the event loop, if one was started."""
        self._loop.close()

    def _resolve(self, result: Any) -> Any:
        # A lambda may return the coroutine of an async function.
        return self._loop.submit(lambda: result).result() if isinstance(result, Awaitable) else result


class Subprocess:
    """Runs a function in a persistent process, which is killed with its descendants on a timeout and then replaced."""

    apart = True

    def __init__(self, target: str, memory_mb: int | None = None) -> None:
        """Set up the executor. target: "file.py:function" or "package.module:function"."""
        self._target, self._memory_mb = target, memory_mb
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        self._process: subprocess.Popen[bytes] | None = None
        self._to = self._from = self._life = -1
        self._timeout = self._began = 0.0
        self._fault: Reply | None = None
        """Fault of `start`, to be returned by `finish`."""
        self._busy = False

    def open(self) -> Signature:
        """See `Executor.open`: start the process and import the function."""
        self._start_process()
        outside = os.environ.get("PYTHONPATH")
        message = {"target": self._target, "memory_mb": self._memory_mb, "pythonpath": outside}
        self._timeout, self._began = START_SECONDS, time.monotonic()
        self._fault = self._send(encode(message))
        reply = self.finish()
        if isinstance(reply, Signature):
            return reply
        self.close()
        raise RewardError(f'reward "{self._target}" cannot be imported: {reply.text}')

    def start(self, columns: dict[str, list[Any]], constants: dict[str, Any], rows: int, timeout: float) -> None:
        """See `Executor.start`. A process that died or hung before is restarted first."""
        if self._busy:
            self.close()  # otherwise the reply of an unfinished call would be taken for the reply of this one
        try:
            data = encode({"columns": columns, "constants": constants, "rows": rows})
        except Exception as error:  # pickle propagates any exception of an object in a column
            raise RewardError(
                f'reward "{self._target}": a column or argument cannot be sent to its process ({error!r:.200}); leave '
                f"it out of its parameters, or make it of plain numbers, strings, lists and dicts"
            ) from error
        self._fault, self._busy = None, True
        if self._process is None:
            try:
                self.open()
            except RewardError as error:
                self._fault = Reply("died", [], str(error))
        self._timeout, self._began, self._busy = timeout, time.monotonic(), True
        self._fault = self._fault or self._send(data)

    def finish(self) -> Any:
        """See `Executor.finish`. Returns a Signature after `open`."""
        reply = self._fault or self._receive()
        self._busy = False
        if isinstance(reply, Reply) and reply.kind in ("timeout", "died"):
            process = self._process
            self.close()
            if process is not None and not reply.text:
                reply = reply._replace(text=f"its process ended ({_exit_text(process.returncode)})")
        return reply

    def close(self) -> None:
        """Kill the process and its descendants."""
        process, self._process, self._busy = self._process, None, False
        if process is None:
            return
        # Kill the group before waiting: until the process is reaped, its pid cannot be reused.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        _kill_marked(self._mark.encode())
        process.wait()
        for fd in (self._to, self._from, self._life):
            if fd >= 0:
                os.close(fd)

    def _start_process(self) -> None:
        assert self._process is None
        child_read, self._to = os.pipe()
        self._from, child_write = os.pipe()
        name, value = self._mark.split("=")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlft.rewards.worker", str(child_read), str(child_write)],
                stdin=subprocess.DEVNULL,
                pass_fds=(child_read, child_write),
                start_new_session=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                    name: value,
                },
            )
        finally:
            os.close(child_read)
            os.close(child_write)
        for fd in (self._to, self._from):
            os.set_blocking(fd, False)
        # Linux: signals the end of the process even while a forked child keeps the pipes open.
        self._life = os.pidfd_open(self._process.pid) if hasattr(os, "pidfd_open") else -1

    def _send(self, data: bytes) -> Reply | None:
        """Write a message before the deadline and return the fault, if any."""
        rest, deadline = memoryview(data), self._began + self._timeout
        while rest:
            ready = _wait(self._to, select.POLLOUT, self._life, deadline)
            if ready is None:
                return _timed_out(self._timeout, self._began)
            try:
                rest = rest[os.write(self._to, rest[: 2**16]) :]
            except (BrokenPipeError, ConnectionResetError):
                return Reply("died", [], "", seconds=time.monotonic() - self._began)
            except BlockingIOError:
                if not ready:
                    return Reply("died", [], "", seconds=time.monotonic() - self._began)
        return None

    def _receive(self) -> Any:
        """Return the next message, or a Reply with the reason why there is none."""
        deadline = self._began + self._timeout
        data, size = bytearray(), HEADER.size
        while len(data) < size:
            ready = _wait(self._from, select.POLLIN, self._life, deadline)
            if ready is None:
                return _timed_out(self._timeout, self._began)
            try:
                part = os.read(self._from, min(size - len(data), 2**20))
            except BlockingIOError:
                part = b"" if not ready else None
            if part == b"":
                return Reply("died", [], "", seconds=time.monotonic() - self._began)
            data += part or b""
            if len(data) == HEADER.size == size:
                magic, length = HEADER.unpack(data)
                if magic != MAGIC:
                    return self._invalid_message(f"it begins with {bytes(data)!r}")
                size += length
                deadline = max(deadline, time.monotonic() + TRANSFER_SECONDS)
        try:
            reply = pickle.loads(data[HEADER.size :])
        except Exception as error:  # a damaged pickle can raise any exception
            return self._invalid_message(repr(error))
        return reply if isinstance(reply, Reply | Signature) else self._invalid_message(f"{reply!r:.60}")

    def _invalid_message(self, what: str) -> Reply:
        return Reply("died", [], f"its process sent garbage ({what})", seconds=time.monotonic() - self._began)


def _wait(fd: int, event: int, life: int, deadline: float) -> bool | None:
    """Return True when the pipe is ready, False when the process has ended instead, and None at the deadline.

    Uses poll, since select cannot watch descriptors above 1023.
    """
    poll = select.poll()
    poll.register(fd, event)
    if life >= 0:
        poll.register(life, select.POLLIN)
    events = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    return None if not events else fd in events


def _timed_out(timeout: float, began: float) -> Reply:
    return Reply("timeout", [], f"took longer than {timeout:g} s", seconds=time.monotonic() - began)


def _exit_text(code: int | None) -> str:
    assert code is not None
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _kill_marked(mark: bytes) -> None:
    """Kill every process that has `mark` in its initial environment (Linux only).

    This includes processes that left the worker's group or session and orphans. It does not include processes started
    with another environment, or those of another user.
    """
    for _ in range(20):  # a process may fork while the others are killed
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _has(path / "environ", mark)]
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _has(environ: Path, mark: bytes) -> bool:
    try:
        return mark in environ.read_bytes()
    except OSError:  # ended, a kernel thread, or of another user
        return False
