"""The worker process of a reward function: `python -m rlft.rewards.worker READ_FD WRITE_FD LIFE_FD`.

The main thread runs the function, so that SIGALRM timeouts inside it work. Module state, caches and the event loop of
async functions live as long as the process. The user's prints go to stderr. Only the standard library,
`rlft.config.resolve` and the user's file are imported, without torch, so that the process starts fast and uses no GPU.
The process that the run starts becomes the supervisor; the worker is its child (Linux; elsewhere there is no
supervisor).
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import sys
import traceback
from typing import Any

from rlft.config import resolve
from rlft.errors import ConfigError
from rlft.rewards import limits
from rlft.rewards.call import Call, settle, signature
from rlft.rewards.protocol import HEADER, TOKEN, Reply, Start, reply_message, signature_message
from rlft.rewards.supervisor import supervise
from rlft.rewards.texts import described, fault, printable, withheld_hint


def _read(fd: int) -> tuple[str, bytes]:
    """Return the token of the next request and its pickle; exit when the other end is closed."""

    def exactly(count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = os.read(fd, min(count - len(data), 2**20))
            if not part:
                os._exit(0)
            data += part
        return bytes(data)

    size = HEADER.unpack(exactly(HEADER.size))[1]
    return exactly(TOKEN).decode(), exactly(size - TOKEN)


def _write(fd: int, message: bytes) -> None:
    data = memoryview(message)
    while data:
        try:
            data = data[os.write(fd, data) :]
        except OSError:  # the function closed it, or the trainer is gone, which sees or needs no more than this end
            os._exit(1)


class _Loop:
    """The event loop of async functions, one per process, since their clients are bound to it."""

    def __init__(self) -> None:
        self._loop: Any = None

    def settled(self, result: Any) -> Any:
        """Return `result`, awaited if it is awaitable."""
        if not inspect.isawaitable(result):
            return result
        if self._loop is None:
            import asyncio

            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        task = self._loop.create_task(settle(result))
        while not task.done():
            # Either comes from another task or a callback, and stops the loop for a moment.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self._loop.run_until_complete(task)
        return task.result()


def _prepare(start: Start) -> Reply | None:
    """Set the limits of this process, and return the reason where one cannot be had."""
    if not start.network:
        try:
            limits.leave_network()
        except OSError as error:
            text = (
                f"network = false: this system lets no process leave the network ({error}); allow user namespaces, or "
                f"leave the setting out"
            )
            return Reply("import", [], text)
    if sys.platform == "linux":
        limits.die_with_parent()
        limits.give_up_root()
        limits.leave_others_alone()
    limits.resources(start.memory_mb, start.file_mb)
    return None


def _import(target: str) -> Any:
    """Return the function, or a Reply with the reason why it cannot be imported."""
    try:
        function = resolve.attribute(target, "rewards")
    except ConfigError as error:
        return Reply("import", [], str(error))
    except BaseException as error:  # the user's file may raise anything, including SystemExit
        try:
            text = "".join(traceback.format_exception(error)[-3:]).rstrip()
        except Exception:
            text = fault(error)
        return Reply("import", [], printable(text))
    try:
        signature(function)
    except (TypeError, ValueError) as error:
        return Reply("import", [], described(error, str, 1000))
    return function


def main(read_fd: int, write_fd: int, life_fd: int) -> None:
    """Load the function, then answer calls until the pipe closes."""
    if sys.platform == "linux":
        supervise(life_fd, (read_fd, write_fd))
    limits.no_core_dumps()
    os.dup2(2, 1)
    for fd in (read_fd, write_fd):
        os.set_inheritable(fd, False)
    token, data = _read(read_fd)
    start: Start = pickle.loads(data)
    # The run passed its sys.path in this variable; Python processes of the user's function must not inherit it.
    os.environ.pop("PYTHONPATH", None)
    if start.pythonpath is not None:
        os.environ["PYTHONPATH"] = start.pythonpath
    function = _prepare(start) or _import(start.target)
    if isinstance(function, Reply):
        text = function.text + withheld_hint(function.text, start.withheld)
        _write(write_fd, reply_message(token, function._replace(text=text, metrics={}, extras={})))
        return
    _write(write_fd, signature_message(token, signature(function)))
    loop, pid = _Loop(), os.getpid()
    while True:
        token, data = _read(read_fd)
        try:
            request = pickle.loads(data)
        except Exception as error:  # a class in a column may not be importable here and may raise anything
            text = f"its process cannot read the columns: {described(error, most=500)}"
            _write(write_fd, reply_message(token, Reply("raised", [], text, {}, {})))
            continue
        call = Call(function, request["columns"], request["constants"], request["rows"])
        reply = call.reply(lambda call=call: loop.settled(call.begin()))
        if reply.kind == "raised":
            reply = reply._replace(text=reply.text + withheld_hint(reply.text, start.withheld))
        if os.getpid() != pid:
            os._exit(1)  # a fork that returned from the function: only the worker itself may reply
        _write(write_fd, reply_message(token, reply))


if __name__ == "__main__":
    # Imported by name instead of __main__, so that the user's file finds one copy of this module.
    from rlft.rewards import worker

    worker.main(*map(int, sys.argv[1:4]))
