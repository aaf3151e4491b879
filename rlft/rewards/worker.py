"""The worker process of a reward function: `python -m rlft.rewards.worker READ_FD WRITE_FD`.

The main thread runs the function, so that SIGALRM timeouts inside it work. Module state, caches and the event loop of
async functions live as long as the process. Messages are length-prefixed pickles over two pipes; the user's prints go
to stderr. Only the standard library, `rlft.config.resolve` and the user's file are imported, without torch, so that the
process starts fast and uses no GPU.

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
"""First bytes of every message, to detect other output in the pipes."""


class Reply(NamedTuple):
    """Result of a call."""

    kind: str
    """"ok"; "raised": the function raised; "bad": it returned something other than a list of rewards; "import": its
    file cannot be imported; and, set by the parent, "timeout" and "died"."""
    values: list[float | None]
    """One per completion, None where not applicable; empty unless "ok"."""
    text: str = ""
    """Description of the fault."""
    metrics: dict[str, list[float]] | None = None
    """Values of log_metric by name."""
    extras: dict[str, list[Any]] | None = None
    """Columns of log_extra by name: numbers, strings and None."""
    seconds: float = 0.0
    """Time the call took."""


class Signature(NamedTuple):
    """The keyword arguments that a function takes."""

    names: tuple[str, ...]
    """Named parameters."""
    required: tuple[str, ...]
    """Named parameters without a default."""
    takes_all: bool
    """True with **kwargs."""

    def takes(self, name: str) -> bool:
        """Return True when the function accepts this keyword."""
        return self.takes_all or name in self.names


def signature(function: Callable[..., Any]) -> Signature:
    """Return the keyword arguments that `function` takes and requires.

    A decorator with **kwargs also takes the arguments of the decorated function. Raises TypeError or ValueError, with
    the reason, for objects that cannot be called with keywords.
    """
    if not callable(function):
        raise TypeError(f"not a function but {type(function).__name__}")
    if inspect.isclass(function):
        raise TypeError(
            f"a class; make an instance of it, for example {function.__name__.lower()} = {function.__name__}(), and "
            f"give that"
        )
    names, required, takes_all = [], [], False
    for parameter in inspect.signature(function, follow_wrapped=False).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_all = True
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(f"parameter {parameter.name} is positional-only; rewards are called with keywords")
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            names.append(parameter.name)
            if parameter.default is parameter.empty:
                required.append(parameter.name)
    decorated = getattr(function, "__wrapped__", None)
    if takes_all and decorated is not None:
        inner = signature(decorated)
        return Signature((*names, *inner.names), tuple(required), inner.takes_all)
    return Signature(tuple(names), tuple(required), takes_all)


class Call:
    """One call of a function on a batch: its arguments, its logs and its result."""

    def __init__(
        self, function: Callable[..., Any], columns: dict[str, list[Any]], constants: dict[str, Any], rows: int
    ) -> None:
        """Select the arguments that `function` takes from columns, constants, log_metric and log_extra.

        columns: per completion, all `rows` long. constants: passed unchanged.
        """
        self._function, self._rows = function, rows
        self._metrics: dict[str, list[float]] = {}
        self._extras: dict[str, list[Any]] = {}
        available = {**columns, **constants, "log_metric": self._log_metric, "log_extra": self._log_extra}
        accepted = signature(function)
        self._arguments = {name: value for name, value in available.items() if accepted.takes(name)}

    def begin(self) -> Any:
        """Call the function and return the rewards, or an awaitable for an async function."""
        return self._function(**self._arguments)

    def reply(self, result: Callable[[], Any]) -> Reply:
        """Call `result` for the function's rewards and check them.

        Any exception except KeyboardInterrupt becomes a Reply.
        """
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
            reply = self._check(items)
        return reply._replace(seconds=time.monotonic() - start)

    def _log_metric(self, name: str, value: Any) -> None:
        self._metrics.setdefault(one_line(name), []).append(float(value))

    def _log_extra(self, column: str, values: Any) -> None:
        self._extras.setdefault(one_line(column), []).extend(_plain(value) for value in values)

    def _check(self, items: Any) -> Reply:
        """Return an "ok" reply with the rewards as floats and None, or a "bad" reply with the reason."""
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
        for what, names in (("log_metric", self._metrics), ("log_extra", self._extras)):
            if any(not name.strip() for name in names):
                return Reply("bad", [], f"called {what} with an empty name; give it one")
        for name, column in self._extras.items():
            if len(column) != self._rows:
                return Reply("bad", [], f"log_extra({name!r}) got {len(column)} values for {self._rows} completions")
        return Reply("ok", values, "", self._metrics, self._extras)


LARGEST = 3e38
"""Largest magnitude of a reward: beyond it float32 is infinite, and a group's advantages become nan."""


def _number(item: Any) -> Any:
    """Return a reward as float or None; `...` if it is not a number. numpy and torch scalars are read by item()."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
        item = item.item() if hasattr(item, "item") else item
        if item is None:
            return None
        if isinstance(item, bool | int | float | Decimal | Fraction):
            return float(item)
    return ...


def one_line(name: Any) -> str:
    """Return the name of a metric or column with the replacement character for those that do not print.

    Line ends, NUL and halves of surrogate pairs cannot be written everywhere, and the name is the same everywhere.
    """
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(name))


def _plain(value: Any) -> Any:
    """Convert a logged value to a number, a string or None, which any process can unpickle."""
    number = _number(value)
    return value if isinstance(value, str) else str(value) if number is ... else number


def encode(message: Any) -> bytes:
    """Encode a message for a pipe."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(MAGIC, len(data)) + data


def _read(fd: int) -> bytes:
    """Return the bytes of the next message; exit when the other end is closed."""

    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = os.read(fd, min(count - len(data), 2**20))
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
    """Tie this process to its parent (Linux only).

    It is killed when the parent dies, even by kill -9 and in the middle of a call. With its descendants it is also the
    first choice of the out-of-memory killer, so that the run itself survives.
    """
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")


class _Loop:
    """The event loop of async functions, one per process, since their clients are bound to it."""

    def __init__(self) -> None:
        self._runner: Any = None

    def settled(self, result: Any) -> Any:
        """Return `result`, awaited if it is awaitable."""
        if not inspect.isawaitable(result):
            return result
        if self._runner is None:
            import asyncio

            self._runner = asyncio.Runner()
        return self._runner.run(settle(result))


async def settle(awaitable: Awaitable[Any]) -> Any:
    """Wrap any awaitable as a coroutine, as asyncio requires."""
    return await awaitable


def _import(target: str) -> Any:
    """Return the function, or a Reply with the reason why it cannot be imported."""
    try:
        function = resolve.attribute(target, "rewards")
    except ConfigError as error:
        return Reply("import", [], str(error))
    except BaseException as error:  # the user's file may raise anything, including SystemExit
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
    # The parent passed its sys.path in this variable; Python processes of the user's function must not inherit it.
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
        except Exception as error:  # a class in a column may not be importable here and may raise anything
            _write(write_fd, Reply("raised", [], f"its process cannot read the columns: {error!r}"))
            continue
        call = Call(function, request["columns"], request["constants"], request["rows"])
        reply = call.reply(lambda call=call: loop.settled(call.begin()))
        if os.getpid() != pid:
            os._exit(1)  # a fork that returned from the function: only the worker itself may reply
        _write(write_fd, reply)


if __name__ == "__main__":
    # Imported by name instead of __main__, so that the parent can unpickle instances of this module's classes.
    from rlft.rewards import worker

    worker.main(int(sys.argv[1]), int(sys.argv[2]))
