"""One call of a reward function on a batch: which arguments it gets, and what counts as a list of rewards.

The same code runs in a worker process and in the run itself. Only the standard library is imported.
"""

from __future__ import annotations

import inspect
import itertools
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from rlft.rewards.protocol import Reply, Signature
from rlft.rewards.texts import described, fault, type_name

LARGEST = 3e38
"""Largest magnitude of a reward: beyond it float32 is infinite, and a group's advantages become nan."""


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

    def reply(self, result: Callable[[], Any], passes: tuple[type[BaseException], ...] = ()) -> Reply:
        """Call `result` for the function's rewards and check them. Any exception but those in `passes` is a Reply."""
        start = time.monotonic()
        try:
            reply = self._rewards(result())
        except passes:
            raise
        except BaseException as error:  # SystemExit too: a user's sys.exit() fails its rows, not the run
            reply = Reply("raised", [], fault(error, self._arguments.get("completions")))
        return reply._replace(
            metrics=self._metrics if reply.kind == "ok" else {},
            extras=self._extras if reply.kind == "ok" else {},
            seconds=time.monotonic() - start,
        )

    def _log_metric(self, name: str, value: Any) -> None:
        self._metrics.setdefault(one_line(name), []).append(float(value))

    def _log_extra(self, column: str, values: Any) -> None:
        logged = self._extras.setdefault(one_line(column), [])
        # One more than there are rows, which is too many: an iterator may have no end.
        logged.extend(_plain(value) for value in itertools.islice(values, self._rows + 1 - len(logged)))

    def _rewards(self, items: Any) -> Reply:
        """Return an "ok" reply with the rewards as floats and None, or a reply of another kind with the reason."""
        if isinstance(items, str | bytes | dict) or not isinstance(items, Iterable):
            what = f"returned {type_name(items)}, want a list with one float or None per completion"
            return Reply("bad", [], what)
        found = list(itertools.islice(iter(items), self._rows + 1))  # a generator raises here, or has no end
        if len(found) != self._rows:
            return Reply("bad", [], f"returned {self._count(items, found)} rewards for {self._rows} completions")
        numbers = [number(item) for item in found]
        for i, value in enumerate(numbers):
            if value is ...:
                return Reply("bad", [], f"returned {described(found[i])} for completion {i}, want a float or None")
        for what, names in (("log_metric", self._metrics), ("log_extra", self._extras)):
            if any(not name.strip() for name in names):
                return Reply("bad", [], f"called {what} with an empty name; give it one")
        for name, column in self._extras.items():
            if len(column) != self._rows:
                count = f"more than {self._rows}" if len(column) > self._rows else str(len(column))
                return Reply("bad", [], f"log_extra({name!r}) got {count} values for {self._rows} completions")
        for i, value in enumerate(numbers):
            if value is not None and abs(value) > LARGEST:
                text = f"returned {value:g} for completion {i}, want a finite float, None or nan"
                return Reply("infinite", [], text)
        return Reply("ok", numbers)

    def _count(self, items: Any, found: list[Any]) -> str:
        if len(found) < self._rows:
            return str(len(found))
        return str(len(items)) if hasattr(items, "__len__") else f"more than {self._rows}"


def number(item: Any) -> Any:
    """Return a reward as float or None; `...` if it is not a number. numpy and torch scalars are read by item().

    Raises whatever a property or method `item` raises that is not about being no number.
    """
    try:
        item = item.item() if hasattr(item, "item") else item
        if item is None:
            return None
        if isinstance(item, bool | int | float | Decimal | Fraction):
            return float(item)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return ...  # an array of several numbers, a signalling nan, an int beyond a float
    return ...


class Ended(Exception):
    """An async function raised SystemExit or KeyboardInterrupt, which would end the loop of all functions."""


async def settle(awaitable: Awaitable[Any]) -> Any:
    """Await a reward; an exception that ends a loop becomes one that does not."""
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        raise Ended(f"{type(error).__name__}: {error}") from error


def one_line(name: Any) -> str:
    """Return the name of a metric or column with the replacement character for those that do not print.

    Line ends, NUL and halves of surrogate pairs cannot be written everywhere, and the name is the same everywhere.
    """
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(name))


def _plain(value: Any) -> Any:
    """Convert a logged value to a float, exactly a str without halves of surrogate pairs, or None."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str.__str__(value))
    converted = number(value)
    return described(value, str, LONGEST_VALUE) if converted is ... else converted


LONGEST_VALUE = 10_000
"""Characters of a logged value that is neither a string nor a number."""
