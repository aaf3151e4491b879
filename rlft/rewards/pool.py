"""Executors of reward functions: a persistent worker process per function, or the caller's thread.

Both implement `Executor`: `open() -> Signature`, then `start(columns, constants, rows, timeout)` and `finish() ->
Reply` for each call, and `close()`. A worker process can be killed together with all its descendants. Workers, and
async functions in this process, run between start and finish, so calls of several functions overlap.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import functools
import inspect
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from rlft.config.data import Reward
from rlft.errors import RewardError
from rlft.rewards import environment
from rlft.rewards.call import Call, signature
from rlft.rewards.event_loop import Loop
from rlft.rewards.protocol import HEADER, LARGEST_REPLY, MAGIC, Reply, Signature, Start, parsed, request, token
from rlft.rewards.texts import described

START_SECONDS = 60.0
"""Time limit for a worker to import the user's file, which may load a grader model."""
END_SECONDS = 6.0
"""Time limit for a supervisor to kill what its worker started; then it is killed itself."""
LAST_SECONDS = 1.0
"""Time limit for a process to end after it closed its pipes."""
LONGEST_WAIT = 86400.0
"""Seconds of a single wait at most: longer ones, and those without end, are several."""
MARK = "RLFT_REWARD_WORKER"
"""Environment variable of a worker's descendants: finds those whose supervisor was killed."""


class Executor(Protocol):
    """Runs a reward function."""

    apart: bool
    """True when the function runs in a separate process."""

    def open(self) -> Signature:
        """Import the function and return its signature. Raises RewardError when it cannot be imported."""
        ...

    def start(self, columns: dict[str, list[Any]], constants: dict[str, Any], rows: int, timeout: float) -> None:
        """Start a call on a batch of `rows`. Raises RewardError for arguments that cannot be sent to a process.

        timeout: seconds, infinite for no limit. The function gets copies of the columns.
        """
        ...

    def finish(self) -> Reply:
        """Wait for the call and return its Reply, which also reports all faults."""
        ...

    def interrupt(self) -> None:
        """Make a call that another thread waits for end soon, where that is possible."""
        ...

    def close(self) -> None:
        """Stop the executor and any running call. May be called twice."""
        ...


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
        self.is_async = inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(type(plain).__call__)
        self._function, self._loop = function, loop or Loop()
        self._call: Call | None = None
        self._future: concurrent.futures.Future[Any] | None = None
        self._timeout = self._began = 0.0

    def open(self) -> Signature:
        """See `Executor.open`."""
        try:
            return signature(self._function)
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {described(self._function)}: cannot be called: {error}") from error

    def start(self, columns: dict[str, list[Any]], constants: dict[str, Any], rows: int, timeout: float) -> None:
        """See `Executor.start`. A function that is not async runs in `finish`."""
        copies: dict[int, Any] = {}
        columns = {name: [_copied(value, copies) for value in values] for name, values in columns.items()}
        self._call = Call(self._function, columns, constants, rows)
        self._timeout, self._began = timeout, time.monotonic()
        self._future = self._loop.submit(self._call.begin) if self.is_async else None

    def finish(self) -> Reply:
        """See `Executor.finish`. A KeyboardInterrupt that reaches this thread is the user's, and passes through."""
        assert self._call is not None
        call, future, self._call = self._call, self._future, None
        if future is None:
            return call.reply(lambda: self._resolve(call.begin()), passes=(KeyboardInterrupt,))
        if not _done(future, self._began + self._timeout):
            future.cancel()
            reply = _timed_out(self._timeout, self._began)
            self._loop.replace_if_blocked()
            return reply
        return call.reply(future.result, passes=(KeyboardInterrupt,))._replace(seconds=time.monotonic() - self._began)

    def interrupt(self) -> None:
        """Cancel a call of an async function."""
        if self._future is not None:
            self._future.cancel()

    def close(self) -> None:
        """Stop the event loop, if one was started."""
        self._loop.close()

    def _resolve(self, result: Any) -> Any:
        if not isinstance(result, Awaitable):
            return result
        future = self._loop.submit(lambda: result)  # a lambda may return the coroutine of an async function
        if not _done(future, self._began + self._timeout):
            future.cancel()
            self._loop.replace_if_blocked()
            raise TimeoutError(f"took longer than {self._timeout:g} s")
        return future.result()


def _done(future: concurrent.futures.Future[Any], deadline: float) -> bool:
    """Wait for a future until the deadline on the monotonic clock, and return whether it is done."""
    while not future.done() and (remaining := deadline - time.monotonic()) > 0:
        concurrent.futures.wait([future], min(remaining, LONGEST_WAIT))
    return future.done()


FIXED = frozenset({str, int, float, bool, type(None), bytes, complex})
"""Types whose values nobody can change."""


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """Return a copy of a value and of all that it holds; an object that cannot be copied is returned itself.

    copies: id -> copy of the values of a call, so that what is one object in the columns stays one, as in a worker.
    """
    if type(value) in FIXED:
        return value
    if id(value) not in copies:
        if type(value) is list and FIXED.issuperset(map(type, value)):
            copies[id(value)] = list(value)  # deepcopy takes ten times as long for token ids
        else:
            try:
                copies[id(value)] = copy.deepcopy(value)
            except Exception:  # a lock, an open file: any object may refuse with any exception
                copies[id(value)] = value
    return copies[id(value)]


class Subprocess:
    """Runs a function in a persistent process, which is killed with its descendants on a timeout and then replaced."""

    apart = True

    def __init__(self, target: str, reward: Reward) -> None:
        """Set up the executor. target: "file.py:function" or "package.module:function". reward: has its limits."""
        self._target, self._reward = target, reward
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        self._process: subprocess.Popen[bytes] | None = None
        self._to = self._from = self._life = self._ended = -1
        self._timeout = self._began = 0.0
        self._call, self._rows = "", 0
        self._fault: Reply | None = None
        """Fault of `start`, to be returned by `finish`."""
        self._busy = False

    def open(self) -> Signature:
        """See `Executor.open`: start the process and import the function."""
        withheld = self._start_process()
        reward, outside = self._reward, os.environ.get("PYTHONPATH")
        start = Start(self._target, outside, withheld, reward.memory_mb, reward.file_mb, reward.network)
        self._timeout, self._began, self._call, self._rows = START_SECONDS, time.monotonic(), token(), 0
        self._fault = self._send(request(self._call, start))
        reply = self._answer()
        if isinstance(reply, Signature):
            return reply
        self.close()
        raise RewardError(f'reward "{self._target}" cannot be imported: {reply.text}')

    def start(self, columns: dict[str, list[Any]], constants: dict[str, Any], rows: int, timeout: float) -> None:
        """See `Executor.start`. A process that died or hung before is restarted first."""
        if self._busy:
            self.close()  # otherwise the reply of an unfinished call would be taken for the reply of this one
        call = token()
        try:
            data = request(call, {"columns": columns, "constants": constants, "rows": rows})
        except Exception as error:  # pickle propagates any exception of an object in a column
            raise RewardError(
                f'reward "{self._target}": a column or argument cannot be sent to its process '
                f"({described(error, most=200)}); leave it out of its parameters, or make it of plain numbers, "
                f"strings, lists and dicts"
            ) from error
        self._fault, self._busy = None, True
        if self._process is None:
            try:
                self.open()
            except RewardError as error:
                self._fault = Reply("died", [], str(error))
        self._call, self._rows = call, rows
        self._timeout, self._began, self._busy = timeout, time.monotonic(), True
        self._fault = self._fault or self._send(data)

    def finish(self) -> Reply:
        """See `Executor.finish`."""
        reply = self._answer()
        return self._garbage("a signature") if isinstance(reply, Signature) else reply

    def _answer(self) -> Reply | Signature:
        reply = self._fault or self._receive()
        self._busy = False
        if isinstance(reply, Reply) and reply.kind in ("timeout", "died"):
            process = self._process
            if process is not None and not reply.text:  # the pipe is closed shortly before the exit code is known
                _wait(self._ended, select.POLLIN, -1, time.monotonic() + LAST_SECONDS)
            self.close()
            if process is not None and not reply.text:
                reply = reply._replace(text=f"its process ended ({_exit_text(process.returncode)})")
        return reply

    def interrupt(self) -> None:
        """Have the supervisor end the process, which the waiting thread sees."""
        process = self._process
        if process is not None:
            process.terminate()

    def close(self) -> None:
        """Kill the process and its descendants."""
        process, self._process, self._busy = self._process, None, False
        if process is None:
            return
        # A byte, since a fork of this process may hold the pipe open.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._life, b"x")
        if self._ended < 0 or _wait(self._ended, select.POLLIN, -1, time.monotonic() + END_SECONDS) is None:
            # Before the process is reaped, since its pid can be another's afterwards.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        _kill_marked(self._mark.encode())
        process.wait()
        for fd in (self._to, self._from, self._life, self._ended):
            if fd >= 0:
                os.close(fd)

    def _start_process(self) -> tuple[str, ...]:
        """Start the process, and return the names of the environment variables that it does not get."""
        assert self._process is None
        variables, withheld = environment.of_worker(os.environ, self._reward.env, self._target)
        child_read, self._to = os.pipe()
        self._from, child_write = os.pipe()
        child_life, self._life = os.pipe()
        name, value = self._mark.split("=")
        path = os.pathsep.join(path or os.getcwd() for path in sys.path)
        theirs = (child_read, child_write, child_life)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlft.rewards.worker", *map(str, theirs)],
                stdin=subprocess.DEVNULL,
                pass_fds=theirs,
                start_new_session=True,
                env={**variables, "PYTHONPATH": path, name: value},
            )
        finally:
            for fd in theirs:
                os.close(fd)
        for fd in (self._to, self._from, self._life):
            os.set_blocking(fd, False)
        # Linux: signals the end of the process even while a forked child keeps the pipes open.
        self._ended = os.pidfd_open(self._process.pid) if hasattr(os, "pidfd_open") else -1
        return withheld

    def _send(self, data: bytes) -> Reply | None:
        """Write a message before the deadline and return the fault, if any."""
        rest, deadline = memoryview(data), self._began + self._timeout
        while rest:
            ready = _wait(self._to, select.POLLOUT, self._ended, deadline)
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

    def _receive(self) -> Reply | Signature:
        """Return the next message, or a Reply with the reason why there is none. All of it must come in time."""
        deadline = self._began + self._timeout
        data, size = bytearray(), HEADER.size
        while len(data) < size:
            ready = _wait(self._from, select.POLLIN, self._ended, deadline)
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
                    return self._garbage(f"it begins with {bytes(data)!r}")
                if length > LARGEST_REPLY + 2**10:
                    return self._garbage(f"a message of {length} bytes")
                size += length
        try:
            reply = parsed(bytes(data[HEADER.size :]), self._call, self._rows)
        except ValueError as error:
            return self._garbage(str(error))
        return reply._replace(seconds=time.monotonic() - self._began) if isinstance(reply, Reply) else reply

    def _garbage(self, what: str) -> Reply:
        return Reply("died", [], f"its process sent garbage ({what})", seconds=time.monotonic() - self._began)


def _wait(fd: int, event: int, life: int, deadline: float) -> bool | None:
    """Return True when the pipe is ready, False when the process has ended instead, and None at the deadline.

    deadline: on the monotonic clock, infinite for none. Uses poll, since select cannot watch descriptors above 1023.
    """
    poll = select.poll()
    if fd >= 0:
        poll.register(fd, event)
    if life >= 0:
        poll.register(life, select.POLLIN)
    while True:
        remaining = max(0.0, deadline - time.monotonic())
        events = dict(poll.poll(min(remaining, LONGEST_WAIT) * 1000))
        if events or remaining <= LONGEST_WAIT:
            return None if not events else fd in events


def _timed_out(timeout: float, began: float) -> Reply:
    return Reply("timeout", [], f"took longer than {timeout:g} s", seconds=time.monotonic() - began)


def _exit_text(code: int | None) -> str:
    assert code is not None
    if code >= 0:
        return f"exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}"


def _kill_marked(mark: bytes) -> None:
    """Kill every process that has `mark` in its initial environment (Linux only).

    These are left only where the supervisor was killed itself, by the out-of-memory killer for one.
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
