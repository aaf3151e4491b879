r"""Reward 1 when the completion's answer is mathematically equal to the dataset's, by math-verify.

Reads LaTeX and plain expressions: fractions, roots, sets, intervals, matrices, equations, percent, units. The last
`\boxed{}` of a completion counts, or else its last expression. Equal are 1/2 and 0.5, (x+1)^2 and x^2+2x+1, {1,2} and
{2,1}; see https://github.com/huggingface/Math-Verify. Needs `pip install math-verify`.

The column `answer` holds a number, LaTeX with or without `$`, a solution whose answer is in `\boxed{}`, or GSM8K's
`#### 72`. An answer that is none of these, such as a sentence or `sqrt(2)` for `\sqrt{2}`, is a fault of its row and
never scored 0: read as LaTeX, it would be the product of its letters. For choices ("B") and words use `exact`.

math-verify stops itself by signals, which arrive in a process's main thread alone. A reward named in a config runs in
the main thread of its worker.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from rlft.errors import DataError
from rlft.rewards.builtin.exact import text_of

NEEDS = ("math_verify", "math")
"""Module to install, and the extra of rlft that does it."""
DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed|\\begin\{")
COMMAND = re.compile(r"\\(?:text|mathrm|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+")
WORD = re.compile(r"[^\W\d_]{4,}|(?<![^\W\d_])(?:sqrt|sin|cos|tan|log|ln|exp|pi|inf|yes|no|is|the)(?![^\W\d_])", re.I)
"""What stands in prose or code and not in LaTeX without a command."""


def math(
    completions: list[Any],
    answer: list[Any],
    seconds: int = 2,
    strict: bool = True,
    log_metric: Callable[[str, Any], None] | None = None,
    **_: Any,
) -> list[float | None]:
    r"""Return 1.0 where completion and answer are equal, else 0.0; None where the answer is None.

    seconds: time to read a completion, and to compare it; one that takes longer gets 0.0, which happens to towers of
    powers. strict: False returns None for an answer that cannot be read. Logs `math/unread`, the share of completions
    without a readable answer. Raises DataError for an answer that cannot be read, and RuntimeError outside of a main
    thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError('math-verify needs the main thread of a process: name the reward as a string, "math"')
    from math_verify import verify

    golds = [_gold(right, seconds, strict) for right in answer]
    rewards: list[float | None] = []
    unread = 0
    for completion, gold in zip(completions, golds, strict=True):
        if gold is None:
            rewards.append(None)
            continue
        found = _parsed(text_of(completion), seconds)
        unread += not found
        rewards.append(float(bool(found) and verify(gold, found, timeout_seconds=seconds)))
    if log_metric is not None and len(rewards) > rewards.count(None):
        log_metric("math/unread", unread / (len(rewards) - rewards.count(None)))
    return rewards


def check_row(row: dict[str, Any], args: dict[str, Any]) -> None:
    """Raise DataError for a row of the dataset whose answer is no mathematics, without parsing it."""
    if row.get("answer") is not None and args.get("strict", True):
        _latex(row["answer"])


def _gold(answer: Any, seconds: int, strict: bool) -> list[Any] | None:
    if answer is None:
        return None
    try:
        return _read(_latex(answer), seconds)
    except DataError:
        if strict:
            raise
        return None


@lru_cache(maxsize=65536)
def _read(latex: str, seconds: int) -> list[Any]:
    """Parse an answer, once for all completions of its prompt."""
    found = _parsed(latex, seconds)
    # A second item without a first is the text of an expression that could not be read.
    if not found or isinstance(found[0], str):
        raise DataError(_message(latex))
    return found


def _latex(answer: Any) -> str:
    """Return an answer with delimiters, as math-verify finds expressions."""
    text = str(answer).rpartition("####")[2].strip() if isinstance(answer, str) else str(answer)
    if DELIMITER.search(text):
        return text
    if isinstance(answer, bool) or not text or WORD.search(COMMAND.sub(" ", text)):
        raise DataError(_message(text))
    return f"${text}$"


def _message(text: str) -> str:
    short = text if len(text) <= 80 else f"{text[:50]}...{text[-27:]}"
    return (
        f"answer is no mathematics that can be read: {short!r}; write it as LaTeX, or use `exact`, or set args = "
        f"{{strict = false}} to leave such rows unscored"
    )


def _parsed(text: str, seconds: int) -> list[Any]:
    """Return what math-verify finds in a text; [] for nothing, and when it takes too long."""
    from math_verify import parse
    from math_verify.errors import TimeoutException

    try:
        return parse(text, parsing_timeout=seconds, raise_on_error=True)
    except (Exception, TimeoutException):  # LaTeX that a model writes can fail in any way
        return []
