"""The process a reward function runs in: `python -m rlft.rewards.worker READ_FD WRITE_FD`.

Its main thread runs the function, so that SIGALRM timeouts inside it work; module state and caches live as long as the
process. It speaks length-prefixed pickles over two pipes of its own; what the user prints goes to stderr. Only the
standard library, `rlft.resolve` and the user's file are imported: no torch, no start-up time, no GPU.

    parent -> worker   {"target", "memory_mb"}, then one {"columns", "constants"} per call
    worker -> parent   a Reply to each
"""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from rlft import resolve
from rlft.errors import ConfigError

HEADER = struct.Struct("!Q")


class Reply(NamedTuple):
    """What came of a call."""

    kind: str
    """"ok"; "raised": the function raised; "bad": it returned something that is no list of rewards; "import": its file
    cannot be imported; and from the parent's side "timeout" and "died"."""
    values: list[float | None]
    """One per completion, None where not applicable; empty unless "ok"."""
    text: str = ""
    """What went wrong, for a person."""
    metrics: dict[str, list[float]] | None = None
    """log_metric's values by name."""
    extras: dict[str, list[Any]] | None = None
    """log_extra's columns by name."""


class Signature(NamedTuple):
    """Which keyword arguments a function takes."""

    names: tuple[str, ...]
    """Those it names."""
    required: tuple[str, ...]
    """Those without a default."""
    takes_all: bool
    """True with **kwargs."""


def signature(function: Callable[..., Any]) -> Signature:
    """What may and must be passed by keyword. Raises ValueError for a positional-only parameter."""
    names, required, takes_all = [], [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            takes_all = True
        elif p.kind is p.POSITIONAL_ONLY:
            raise ValueError(f"parameter {p.name} is positional-only; rewards are called with keywords")
        elif p.kind is not p.VAR_POSITIONAL:
            names.append(p.name)
            if p.default is p.empty:
                required.append(p.name)
    return Signature(tuple(names), tuple(required), takes_all)


def call(function: Callable[..., Any], columns: dict[str, list[Any]], constants: dict[str, Any]) -> Reply:
    """Call a reward function on a batch and look at what it returned.

    columns: per completion, all of one length. constants: passed as they are. log_metric and log_extra are added where
    the function takes them. Never raises what the function raises (but KeyboardInterrupt).
    """
    metrics: dict[str, list[float]] = {}
    extras: dict[str, list[Any]] = {}
    taken = signature(function)
    given: dict[str, Any] = {**columns, **constants}
    given["log_metric"] = lambda name, value: metrics.setdefault(str(name), []).append(float(value))
    given["log_extra"] = lambda column, values: extras.__setitem__(str(column), list(values))
    try:
        result = function(**{k: v for k, v in given.items() if taken.takes_all or k in taken.names})
        if inspect.isawaitable(result):
            result = _finish(result)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a user's sys.exit() fails its rows, not the run
        lines = traceback.format_exception(error)
        return Reply("raised", [], f"{type(error).__name__}: {error}\n{''.join(lines[-3:])}".rstrip())
    return checked(result, len(next(iter(columns.values()))), metrics, extras)


def _finish(awaitable: Any) -> Any:
    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # Inside a notebook a loop is running already; another one needs another thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()


def checked(result: Any, wanted: int, metrics: dict[str, list[float]], extras: dict[str, list[Any]]) -> Reply:
    """The rewards as floats and None, or a "bad" reply saying what is wrong with them."""
    if isinstance(result, (str, bytes, dict)) or not hasattr(result, "__iter__"):
        return Reply("bad", [], f"returned {type(result).__name__}, want a list with one float or None per completion")
    items = list(result)
    if len(items) != wanted:
        return Reply("bad", [], f"returned {len(items)} rewards for {wanted} completions")
    values: list[float | None] = []
    for i, item in enumerate(items):
        # numpy and torch scalars hold their number in item().
        number = item.item() if hasattr(item, "item") and getattr(item, "size", 1) != 0 else item
        if number is None:
            values.append(None)
        elif isinstance(number, (bool, int, float)):
            values.append(float(number))
        else:
            return Reply("bad", [], f"returned {item!r:.60} for completion {i}, want a float or None")
    wrong = next((name for name, column in extras.items() if len(column) != wanted), None)
    if wrong is not None:
        return Reply("bad", [], f"log_extra({wrong!r}) got {len(extras[wrong])} values for {wanted} completions")
    return Reply("ok", values, "", metrics, extras)


def encode(message: Any) -> bytes:
    """A message as bytes on a pipe."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(data)) + data


def _read(fd: int) -> Any:
    """The next message; exits when the other end is gone."""

    def exactly(n: int) -> bytes:
        data = b""
        while len(data) < n:
            part = os.read(fd, min(n - len(data), 2**20))
            if not part:
                os._exit(0)
            data += part
        return data

    return pickle.loads(exactly(HEADER.unpack(exactly(HEADER.size))[0]))


def _write(fd: int, message: Any) -> None:
    data = memoryview(encode(message))
    while data:
        data = data[os.write(fd, data) :]


def _limit_memory(megabytes: int | None) -> None:
    if megabytes is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))


def _die_with_parent() -> None:
    """Linux: be killed when the parent is, even by kill -9 and in the middle of a call."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main(read_fd: int, write_fd: int) -> None:
    """Load the function, then answer calls until the pipe closes."""
    _die_with_parent()
    os.dup2(2, 1)
    start = _read(read_fd)
    _limit_memory(start["memory_mb"])
    try:
        function = resolve.attribute(start["target"], "rewards")
        taken = signature(function)
    except ConfigError as error:
        _write(write_fd, Reply("import", [], str(error)))
        return
    except BaseException as error:  # the user's file may raise anything, SystemExit included
        _write(write_fd, Reply("import", [], "".join(traceback.format_exception(error)[-3:]).rstrip()))
        return
    _write(write_fd, taken)
    while True:
        request = _read(read_fd)
        _write(write_fd, call(function, request["columns"], request["constants"]))


if __name__ == "__main__":
    # Under its own name, not as __main__: the parent must be able to unpickle what this module's classes make.
    from rlft.rewards import worker

    worker.main(int(sys.argv[1]), int(sys.argv[2]))
