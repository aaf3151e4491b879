"""The process a reward function runs in: `python -m rlft.rewards.worker READ_FD WRITE_FD`.

Its main thread runs the function, so that SIGALRM timeouts inside it work; module state, caches and the event loop of
async functions live as long as the process. It speaks length-prefixed pickles over two pipes of its own; what the user
prints goes to stderr. Only the standard library, `rlft.config.resolve` and the user's file are imported: no torch, no
start-up time, no GPU.

    parent -> worker   {"target", "memory_mb", "pythonpath"}, then one {"columns", "constants", "rows"} per call
    worker -> parent   a Signature, then a Reply to each call
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import signal
import struct
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from rlft.config import resolve
from rlft.errors import ConfigError

HEADER = struct.Struct("!4sQ")
MAGIC = b"rlft"
"""Begins every message: what else a function writes into the pipes is seen to be no message."""


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
    """log_extra's columns by name: numbers, strings and None."""
    seconds: float = 0.0
    """Time the call took."""


class Signature(NamedTuple):
    """Which keyword arguments a function takes."""

    names: tuple[str, ...]
    """Those it names."""
    required: tuple[str, ...]
    """Those without a default."""
    takes_all: bool
    """True with **kwargs."""

    def takes(self, name: str) -> bool:
        """True when it may be called with this keyword."""
        return self.takes_all or name in self.names


def signature(function: Callable[..., Any]) -> Signature:
    """What may and must be passed by keyword.

    A decorator that hands its **kwargs on takes what the decorated function takes too. Raises TypeError or ValueError
    for what cannot be called with keywords, with the reason.
    """
    if not callable(function):
        raise TypeError(f"not a function but {type(function).__name__}")
    if inspect.isclass(function):
        raise TypeError(
            f"a class; make an instance of it, for example {function.__name__.lower()} = {function.__name__}(), and "
            f"give that"
        )
    names, required, takes_all = [], [], False
    for p in inspect.signature(function, follow_wrapped=False).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            takes_all = True
        elif p.kind is p.POSITIONAL_ONLY:
            raise ValueError(f"parameter {p.name} is positional-only; rewards are called with keywords")
        elif p.kind is not p.VAR_POSITIONAL:
            names.append(p.name)
            if p.default is p.empty:
                required.append(p.name)
    wrapped = getattr(function, "__wrapped__", None)
    if takes_all and wrapped is not None:
        inner = signature(wrapped)
        return Signature((*names, *inner.names), tuple(required), inner.takes_all)
    return Signature(tuple(names), tuple(required), takes_all)


class Call:
    """One call of a function on a batch: what it is given, what it logs, and what came of it."""

    def __init__(
        self, function: Callable[..., Any], columns: dict[str, list[Any]], constants: dict[str, Any], rows: int
    ) -> None:
        """columns: per completion, all `rows` long. constants: passed as they are. Of these and log_metric and
        log_extra it gets those it takes."""
        self._function, self._rows = function, rows
        self._metrics: dict[str, list[float]] = {}
        self._extras: dict[str, list[Any]] = {}
        given = {**columns, **constants, "log_metric": self._log_metric, "log_extra": self._log_extra}
        taken = signature(function)
        self._given = {name: value for name, value in given.items() if taken.takes(name)}

    def begin(self) -> Any:
        """Call it: the rewards, or for an async function what is to be awaited."""
        return self._function(**self._given)

    def reply(self, result: Callable[[], Any]) -> Reply:
        """Call `result` for the function's rewards and look at them; what it raises (but KeyboardInterrupt) becomes a
        Reply."""
        start = time.monotonic()
        try:
            items = result()
            if not isinstance(items, str | bytes | dict) and hasattr(items, "__iter__"):
                items = list(items)  # a generator raises here
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a user's sys.exit() fails its rows, not the run
            lines = traceback.format_exception(error)
            reply = Reply("raised", [], f"{type(error).__name__}: {error}\n{''.join(lines[-3:])}".rstrip())
        else:
            reply = self._checked(items)
        return reply._replace(seconds=time.monotonic() - start)

    def _log_metric(self, name: str, value: Any) -> None:
        self._metrics.setdefault(str(name), []).append(float(value))

    def _log_extra(self, column: str, values: Any) -> None:
        self._extras.setdefault(str(column), []).extend(_plain(value) for value in values)

    def _checked(self, items: Any) -> Reply:
        """The rewards as floats and None, or a "bad" reply saying what is wrong with them."""
        if not isinstance(items, list):
            what = f"returned {type(items).__name__}, want a list with one float or None per completion"
            return Reply("bad", [], what)
        if len(items) != self._rows:
            return Reply("bad", [], f"returned {len(items)} rewards for {self._rows} completions")
        values: list[float | None] = []
        for i, item in enumerate(items):
            number = _number(item)
            if number is ...:
                return Reply("bad", [], f"returned {item!r:.60} for completion {i}, want a float or None")
            if number is not None and abs(number) > LARGEST:
                return Reply("bad", [], f"returned {number:g} for completion {i}, want a finite float, None or nan")
            values.append(number)
        for name, column in self._extras.items():
            if len(column) != self._rows:
                return Reply("bad", [], f"log_extra({name!r}) got {len(column)} values for {self._rows} completions")
        return Reply("ok", values, "", self._metrics, self._extras)


LARGEST = 3e38
"""Beyond this a reward is infinite in float32, and one infinite reward makes its whole group's advantages nan."""


def _number(item: Any) -> Any:
    """A reward as float or None; `...` for what is no number. numpy and torch scalars hold theirs in item()."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
        item = item.item() if hasattr(item, "item") else item
        if item is None:
            return None
        if isinstance(item, bool | int | float | Decimal | Fraction):
            return float(item)
    return ...


def _plain(value: Any) -> Any:
    """A logged value as what any process can read: a number, a string or None."""
    number = _number(value)
    return value if isinstance(value, str) else str(value) if number is ... else number


def encode(message: Any) -> bytes:
    """A message as bytes on a pipe."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(MAGIC, len(data)) + data


def _read(fd: int) -> bytes:
    """The next message, pickled; exits when the other end is gone."""

    def exactly(n: int) -> bytes:
        data = b""
        while len(data) < n:
            part = os.read(fd, min(n - len(data), 2**20))
            if not part:
                os._exit(0)
            data += part
        return data

    return exactly(HEADER.unpack(exactly(HEADER.size))[1])


def _write(fd: int, message: Any) -> None:
    data = memoryview(encode(message))
    while data:
        data = data[os.write(fd, data) :]


def _limit_memory(megabytes: int | None) -> None:
    if megabytes is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))


def _prepare_process() -> None:
    """Linux: be killed when the parent is, even by kill -9 and in the middle of a call; and be the first to go, with
    what the function starts, when the machine runs out of memory, instead of the run."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")


class _Loop:
    """The event loop of async functions, one for the life of the process: clients they keep are bound to it."""

    def __init__(self) -> None:
        self._runner: Any = None

    def settled(self, result: Any) -> Any:
        """`result`, awaited where it has to be."""
        if not inspect.isawaitable(result):
            return result
        if self._runner is None:
            import asyncio

            self._runner = asyncio.Runner()
        return self._runner.run(settle(result))


async def settle(awaitable: Awaitable[Any]) -> Any:
    """Any awaitable as the coroutine that asyncio wants."""
    return await awaitable


def _import(target: str) -> Any:
    """The function, or a Reply saying why there is none."""
    try:
        function = resolve.attribute(target, "rewards")
    except ConfigError as error:
        return Reply("import", [], str(error))
    except BaseException as error:  # the user's file may raise anything, SystemExit included
        return Reply("import", [], "".join(traceback.format_exception(error)[-3:]).rstrip())
    try:
        signature(function)
    except (TypeError, ValueError) as error:
        return Reply("import", [], str(error))
    return function


def main(read_fd: int, write_fd: int) -> None:
    """Load the function, then answer calls until the pipe closes."""
    _prepare_process()
    os.dup2(2, 1)
    start = pickle.loads(_read(read_fd))
    # sys.path came by this variable; a Python that the user's function starts must not get ours.
    os.environ.pop("PYTHONPATH", None)
    if start["pythonpath"] is not None:
        os.environ["PYTHONPATH"] = start["pythonpath"]
    _limit_memory(start["memory_mb"])
    function = _import(start["target"])
    _write(write_fd, function if isinstance(function, Reply) else signature(function))
    if isinstance(function, Reply):
        return
    loop, pid = _Loop(), os.getpid()
    while True:
        data = _read(read_fd)
        try:
            request = pickle.loads(data)
        except Exception as error:  # a class of a column that cannot be imported here, and raises what it likes
            _write(write_fd, Reply("raised", [], f"its process cannot read the columns: {error!r}"))
            continue
        call = Call(function, request["columns"], request["constants"], request["rows"])
        reply = call.reply(lambda call=call: loop.settled(call.begin()))
        if os.getpid() != pid:
            os._exit(1)  # a process that the function forked and let return: only the worker answers
        _write(write_fd, reply)


if __name__ == "__main__":
    # Under its own name, not as __main__: the parent must be able to unpickle what this module's classes make.
    from rlft.rewards import worker

    worker.main(int(sys.argv[1]), int(sys.argv[2]))
