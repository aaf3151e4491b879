"""What a reward call results in, and the messages between a run and the worker process of a reward function.

Requests are pickles, since columns hold anything a dataset holds and the run is the one that makes them. Replies are
JSON and are checked field by field: code in a worker, a model's among it, must not be able to execute anything in the
run. Each reply names the call it answers. Only the standard library is imported here.

    run -> worker   a `Start`, then one {"columns", "constants", "rows"} per call
    worker -> run   a Signature, or a Reply with the reason why there is none; then a Reply to each call
"""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from typing import Any, NamedTuple

HEADER = struct.Struct("!4sQ")
MAGIC = b"rlft"
"""First bytes of every message, to detect other output in the pipes."""
LARGEST_REPLY = 32 * 2**20
"""Bytes of a reply at most, so that a worker cannot fill the memory of the run."""
TOKEN = 32
"""Characters of the token of a call, with which every request begins."""
KINDS = ("ok", "raised", "bad", "infinite", "import")
"""The kinds of Reply that a worker may send."""


class Reply(NamedTuple):
    """Result of a call."""

    kind: str
    """"ok"; "raised": the function raised; "bad": it returned something other than one number or None per completion;
    "infinite": one of its numbers is not finite; "import": its file cannot be imported, or its process not be set up;
    and, set by the run, "timeout" and "died"."""
    values: list[float | None]
    """One per completion: None or nan where not applicable; empty unless "ok"."""
    text: str = ""
    """Description of the fault, without control characters."""
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


class Start(NamedTuple):
    """What a worker is to import, and within which limits."""

    target: str
    """"file.py:function" or "package.module:function"."""
    pythonpath: str | None
    """PYTHONPATH of the run, for the Python processes that the function starts."""
    withheld: tuple[str, ...]
    """Environment variables of the run that the worker does not have."""
    memory_mb: int | None
    file_mb: int
    network: bool


def framed(data: bytes) -> bytes:
    """Put the header before a message."""
    return HEADER.pack(MAGIC, len(data)) + data


def token() -> str:
    """Return the token of a call, which its answer repeats."""
    return os.urandom(TOKEN // 2).hex()


def request(call: str, message: Any) -> bytes:
    """Encode a message for the worker. Raises whatever pickle raises for an object that cannot be sent."""
    return framed(call.encode() + pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def signature_message(call: str, accepted: Signature) -> bytes:
    """Encode the signature of the function for the run."""
    return framed(json.dumps({"call": call, "signature": accepted}).encode())


def reply_message(call: str, reply: Reply) -> bytes:
    """Encode a reply for the run. One that is too large becomes a fault of its rows."""
    data = json.dumps({"call": call, "reply": reply}).encode()
    if len(data) > LARGEST_REPLY:
        text = (
            f"logged {len(data) / 2**20:.0f} MiB with log_metric and log_extra, and a call may return "
            f"{LARGEST_REPLY / 2**20:.0f} MiB; log less"
        )
        data = json.dumps({"call": call, "reply": Reply("raised", [], text, {}, {})}).encode()
    return framed(data)


def parsed(data: bytes, call: str, rows: int) -> Reply | Signature:
    """Decode the answer to a call on `rows` completions. Raises ValueError for anything that a worker never sends."""
    try:
        message = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict) or message.get("call") != call:
        raise ValueError("no answer to this call")
    fields = message.get("reply", message.get("signature"))
    if not isinstance(fields, list):
        raise ValueError("no list of fields")
    if "signature" in message:
        return _signature(fields)
    return _reply(fields, rows)


def _signature(fields: list[Any]) -> Signature:
    match fields:
        case [list(names), list(required), bool(takes_all)] if all(isinstance(name, str) for name in names + required):
            return Signature(tuple(names), tuple(required), takes_all)
    raise ValueError("no signature")


def _reply(fields: list[Any], rows: int) -> Reply:
    match fields:
        case [str(kind), list(values), str(text), metrics, extras, float()] if kind in KINDS:
            pass
        case _:
            raise ValueError("no reply")
    if len(values) != (rows if kind == "ok" else 0):
        raise ValueError(f"{len(values)} values for {rows} completions")
    if not all(value is None or (isinstance(value, float) and not math.isinf(value)) for value in values):
        raise ValueError("a value is no finite number")
    if not (_columns(metrics) and all(isinstance(value, float) for column in metrics.values() for value in column)):
        raise ValueError("a metric is no number")
    if not (_columns(extras) and all(_fits(column, rows) for column in extras.values())):
        raise ValueError("a logged column is not one number, string or None per completion")
    return Reply(kind, values, text, metrics, extras)


def _columns(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(column, list) for column in value.values())


def _fits(column: list[Any], rows: int) -> bool:
    return len(column) == rows and all(value is None or isinstance(value, str | float) for value in column)
