"""Tests in one process call a program in another: `python remote.py program|tests` with a socket as descriptor 3.

No line of the program runs where the tests run, and what the tests expect never leaves their process. So a program
cannot pass by ending early, by replacing `print`, `assert` or builtins, or by returning objects that equal everything.
The program's functions and classes are `Remote` objects to the tests. Plain values (numbers, strings, lists, tuples,
sets, dicts, None) are copied; lists, dicts and sets that a function changes in place are changed for the tests too.
Other objects stay where they are, and the tests hold a Remote of them.

A message is its length (4 bytes) and JSON. This file is run by its path and imports the standard library alone.
"""

from __future__ import annotations

import builtins
import json
import operator
import os
import socket
import struct
import sys
import types
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

HEADER = struct.Struct("!I")
LARGEST = 2**26
"""Bytes of a message."""
PASSED = 86
"""Exit code of tests that all held. No accident ends a process with it."""
BETWEEN_REMOTES = ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
"""Operators that are passed on between two objects of the program. With a plain operand they are not defined: in
`abs(f(2) - 4.0) < 1e-6` an object would learn what is expected, and its class could answer 0."""
PASSED_ON = ("len", "getitem", "setitem", "next", "str", "repr", "bool", "neg", "abs")
METHODS: dict[str, Any] = {
    **{f"__{name}__": getattr(operator, name) for name in (*BETWEEN_REMOTES, "getitem", "setitem", "neg", "abs")},
    **{f"__{each.__name__}__": each for each in (len, next, str, repr, bool)},
    "list": list,
    "hash": hash,
    "isinstance": lambda kind, value: isinstance(value, kind),
}
"""What a Remote asks of an object besides calls and attributes."""


class Gone(BaseException):
    """The program's process ended or sent what is no message. No `except Exception` of a test hides it."""


class Remote:
    """An object of the other process."""

    def __init__(self, peer: Peer, number: int) -> None:
        """Refer to the object that the other process has under a number."""
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.ask("call", self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # protocols such as numpy's __array_interface__ trust what they get
        return self._peer.ask("get", self._number, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("set", self._number, (name, value))

    def __iter__(self) -> Any:
        return iter(self._peer.ask("method", self._number, ("list",)))

    def __contains__(self, item: Any) -> bool:
        return any(item == each for each in self)

    def __instancecheck__(self, other: Any) -> bool:
        return isinstance(other, Remote) and bool(self._peer.ask("method", self._number, ("isinstance", other)))

    def __hash__(self) -> int:
        return hash(self._peer.ask("method", self._number, ("hash",)))


def _passed_on(method: str) -> Any:
    def call(self: Remote, *args: Any) -> Any:
        if method[2:-2] in BETWEEN_REMOTES and not isinstance(args[0], Remote):
            return NotImplemented
        return self._peer.ask("method", self._number, (method, *args))

    return call


for _name in (*BETWEEN_REMOTES, *PASSED_ON):
    setattr(Remote, f"__{_name}__", _passed_on(f"__{_name}__"))


class Peer:
    """One end of the connection."""

    def __init__(self, fd: int, serves_all: bool) -> None:
        """Use an open socket. serves_all: False lets the other end call the functions it was given and nothing else."""
        self._socket = socket.socket(fileno=fd)
        self._serves_all = serves_all
        self._objects: dict[int, Any] = {}

    def share(self, value: Any) -> int:
        """Keep an object for the other process and return its number."""
        self._objects[id(value)] = value
        return id(value)

    def ask(self, what: str, number: int, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Have the other process do something with its object, serving it meanwhile, and return or raise the result."""
        self._send(["ask", what, number, [self._encode(each) for each in args], self._encode(kwargs or {})])
        while True:
            message = self._receive()
            if message[0] == "ask":
                self._send(self._answer(*message[1:]))
                continue
            _, kind, value, changed = message
            try:
                for given, new in zip(args, changed, strict=False):
                    _update(given, None if new is None else self._decode(new))
                result = _exception(*value) if kind == "raised" else self._decode(value)
            except Exception as error:
                raise Gone(f"the program sent no message: {error}") from error
            if isinstance(result, BaseException):
                raise result
            return result

    def serve(self) -> None:
        """Answer until the other end closes."""
        while True:
            self._send(self._answer(*self._receive()[1:]))

    def _answer(self, what: str, number: int, args: list[Any], kwargs: Any) -> list[Any]:
        given: list[Any] = []
        try:
            given = [self._decode(each) for each in args]
            result = self._do(what, self._objects[number], given, self._decode(kwargs))
            return ["done", "value", self._encode(result), self._changed(given)]
        except (Gone, KeyboardInterrupt):
            raise
        except BaseException as error:
            return ["done", "raised", [type(error).__name__, str(error)[:2000]], self._changed(given)]

    def _do(self, what: str, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if what == "call":
            return target(*args, **kwargs)
        if not self._serves_all:
            raise PermissionError("only calls")
        if what == "get":
            return getattr(target, *args)
        if what == "set":
            return setattr(target, *args)
        name, *rest = args
        return METHODS[name](target, *rest)

    def _changed(self, given: list[Any]) -> list[Any]:
        return [self._encode(each) if type(each) in (list, dict, set) else None for each in given]

    def _encode(self, value: Any) -> Any:
        if value is None or isinstance(value, bool):
            return value
        for kind, name in ((int, "i"), (float, "f"), (str, "s"), (Decimal, "D"), (Fraction, "F")):
            if isinstance(value, kind):
                return {name: value if name == "s" else repr(float(value)) if name == "f" else _text(value)}
        if isinstance(value, dict):
            return {"d": [[self._encode(key), self._encode(each)] for key, each in value.items()]}
        for kind, name in ((list, "l"), (tuple, "t"), (set, "e"), (frozenset, "z")):
            if isinstance(value, kind):
                return {name: [self._encode(each) for each in value]}
        if isinstance(value, bytes | bytearray):
            return {"b": value.hex()}
        if isinstance(value, complex):
            return {"c": [repr(value.real), repr(value.imag)]}
        if isinstance(value, Remote):
            return {"yours": value._number}
        if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
            return self._encode(value.tolist())
        return {"mine": self.share(value)}

    def _decode(self, value: Any) -> Any:
        if value is None or isinstance(value, bool):
            return value
        ((name, data),) = value.items()
        if name == "d":
            return {self._decode(key): self._decode(each) for key, each in data}
        if name in "ltez":
            return {"l": list, "t": tuple, "e": set, "z": frozenset}[name](self._decode(each) for each in data)
        if name == "c":
            return complex(float(data[0]), float(data[1]))
        if name == "yours":
            return self._objects[data]
        if name == "mine":
            return Remote(self, int(data))
        kinds = {"i": lambda text: int(text, 16), "f": float, "s": str, "D": Decimal, "F": Fraction, "b": bytes.fromhex}
        return kinds[name](data)

    def _send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        if len(data) > LARGEST:
            raise Gone("a value is too large")
        try:
            self._socket.sendall(HEADER.pack(len(data)) + data)
        except OSError as error:
            raise Gone("the program ended") from error

    def _receive(self) -> Any:
        try:
            (size,) = HEADER.unpack(self._exactly(HEADER.size))
            if size > LARGEST:
                raise Gone("a value is too large")
            message = json.loads(self._exactly(size))
        except (OSError, ValueError, RecursionError) as error:
            raise Gone(f"the program sent no message: {error}") from error
        if not isinstance(message, list) or (message[:1], len(message)) not in ((["ask"], 5), (["done"], 4)):
            raise Gone("the program sent no message")
        return message

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(min(count - len(data), 2**20))
            if not part:
                raise Gone("the program ended")
            data += part
        return bytes(data)


def _text(value: Any) -> str:
    return hex(value) if isinstance(value, int) else str(value)


def _update(given: Any, new: Any) -> None:
    """Change a list, dict or set to what the other process made of it."""
    if isinstance(given, list) and isinstance(new, list):
        given[:] = new
    elif isinstance(given, dict | set) and type(given) is type(new):
        given.clear()
        given.update(new)


def _exception(name: str, text: str) -> BaseException:
    """Return an exception as the program raised it: of that builtin class, or else a RuntimeError."""
    kind = getattr(builtins, str(name), None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError | ExceptionGroup):
        return kind(str(text))
    return RuntimeError(f"{name}: {text}")


class Names(dict):
    """Globals of the tests: their own names, and behind them those that the program defines."""

    def __init__(self, program: dict[str, Any], shadows: set[str]) -> None:
        """Look names up in `program`. shadows: names of Python that stand for the program's objects."""
        super().__init__(__name__="__tests__", __builtins__=builtins)
        self._program, self._shadows = program, shadows

    def __missing__(self, name: str) -> Any:
        """Return the program's object, unless Python has one of that name."""
        if name in self._program and (name in self._shadows or not hasattr(builtins, name)):
            return self._program[name]
        raise KeyError(name)


def _names(code: types.CodeType) -> set[str]:
    """Return the global names and attributes that code and the functions in it use."""
    inner = [_names(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*inner)


def run_program() -> None:
    """Import program.py as `solution`, then serve the tests."""
    peer = Peer(3, serves_all=True)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    exec(compile(Path("program.py").read_text(encoding="utf-8"), "program.py", "exec"), module.__dict__)
    shared = {name: peer.share(value) for name, value in list(vars(module).items()) if not name.startswith("__")}
    peer._send(["done", "value", shared, []])
    peer.serve()


def run_tests() -> None:
    """Run tests.py against the program and exit with `PASSED` when it reaches its end."""
    peer = Peer(3, serves_all=False)
    text = Path("tests.py").read_text(encoding="utf-8")
    code = compile(text, "tests.py", "exec")
    started = peer._receive()[2]
    program: dict[str, Any] = {str(name): Remote(peer, int(number)) for name, number in started.items()}
    entry = Path("entry_point").read_text(encoding="utf-8")
    # A program must not replace what the tests use; but where nothing else of it is used, `sum` is what is tested.
    used = {name for name in _names(code) if name in program}
    shadows = {entry} if entry else used if all(hasattr(builtins, name) for name in used) else set()
    module = types.ModuleType("solution")
    vars(module).update(program, __all__=list(program))
    sys.modules["solution"] = module
    names = Names(program, shadows)
    exec(code, names)
    if entry and callable(names.get("check")):
        names["check"](program[entry])
    os._exit(PASSED)


if __name__ == "__main__":
    {"program": run_program, "tests": run_tests}[sys.argv[1]]()
