"""Reward 1 when the completion's number equals the answer.

Both are read as datasets and models write them:

    #### 72    \\boxed{72}    The answer is 72.    <answer>72</answer>
    1,250.50   $5   50%   3/4   \\frac{3}{4}   1 1/2   6e23

A completion's number is the one at its last marker (`####`, `\\boxed{}`, `<answer>`, "answer is"), and without a
marker its last number. An answer is an int, a float or a text that is one number, alone or at a marker; GSM8K's
column of solutions with `#### 72` at the end is read as it is. Values are compared exactly, 3/4 and 0.75 are equal. A
percent sign on one side alone is a unit or a factor: 50% equals 50%, 50 and 0.5. Thousands are separated by commas,
decimals by a point. Units and anything else besides numbers need `math`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

from rlft.errors import DataError
from rlft.rewards.builtin.exact import text_of

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(
    rf"""(?<![\w.])(?P<sign>[-−+]?)[$€£¥]?(?P<inner>[-−]?)(?:
        (?<!/)(?:(?P<whole>\d+)[ ]+)?(?P<top>\d+)/(?P<bottom>\d+)(?![\d/])
        |(?P<plain>{DIGITS})(?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\w))?
    )(?P<percent>\s?%)?""",
    re.VERBOSE,
)
"""A decimal number with or without thousands commas and exponent, or a fraction. In "12-7" the 7 is positive."""
MARKER = re.compile(
    r"""(?P<hash>\#\#\#\#)(?P<line>[^\n]*)
        |(?P<tag><answer>)
        |(?P<boxed>\\boxed\s*\{)
        |\banswer(?:\s+is|\s*[:=])[\s*:$"'`(]*""",
    re.VERBOSE | re.IGNORECASE,
)
"""What stands before a final answer."""
GOES_ON = re.compile(r"\s*[-−+*/×^=]\s*\d")
"""An operator after a number: "the answer is 3 + 4 = 7" does not mean the 3."""
LONGEST = 400
"""Characters of the longest text that is read as a number."""


class Number(NamedTuple):
    """A number that was read in a text."""

    value: Fraction
    """With a percent sign, the number before it."""
    percent: bool

    def equals(self, other: Number, tolerance: float = 0.0) -> bool:
        """Return True for equal values. tolerance: largest difference, relative to `other`."""
        readings = [(self.value, other.value)]
        if self.percent != other.percent:
            readings.append((self.value / 100, other.value) if self.percent else (self.value, other.value / 100))
        return any(abs(mine - theirs) <= Fraction(tolerance) * abs(theirs) for mine, theirs in readings)


def number(
    completions: list[Any], answer: list[Any], tolerance: float = 0.0, strict: bool = True, **_: Any
) -> list[float | None]:
    """Return 1.0 where the completion's number equals the answer, else 0.0; None where the answer is None.

    tolerance: largest relative difference that counts as equal. strict: False returns None for an answer that is no
    number. Raises DataError for such an answer otherwise.

    >>> number(completions=["it is $1,250.50", "So 3/4.", "7"], answer=[1250.5, "0.75", "8 + 1 = 9 #### 9"])
    [1.0, 1.0, 0.0]
    """
    wanted = [_answer(right, strict) for right in answer]
    rewards: list[float | None] = []
    for completion, right in zip(completions, wanted, strict=True):
        found = None if right is None else read(text_of(completion))
        rewards.append(None if right is None else float(found is not None and found.equals(right, tolerance)))
    return rewards


def check_row(row: dict[str, Any], args: dict[str, Any]) -> None:
    """Raise DataError for a row of the dataset whose answer is no number."""
    _answer(row.get("answer"), args.get("strict", True))


def read(text: str) -> Number | None:
    """Return the number that a completion gives as its answer; None without one."""
    text = _plain(text)
    marked = _marked(text)
    found = list(NUMBER.finditer(text if marked is None else marked))
    return _value(found[-1]) if found else None


def _answer(answer: Any, strict: bool) -> Number | None:
    """Return the number that a cell of the column answer is. strict: see `number`."""
    text = _plain(str(answer))
    marked = _marked(text)
    if marked is None:
        found = [whole for whole in (NUMBER.fullmatch(text.strip(" \n\t$*(").rstrip(".) \n\t$*")),) if whole]
    else:
        found = list(NUMBER.finditer(marked))
    value = _value(found[0]) if len(found) == 1 and not isinstance(answer, bool) else None
    if value is None and answer is not None and strict:
        raise DataError(
            f"answer is no number: {_short(answer)!r}; map another column with data.columns, or use `exact` or `math`, "
            f"or set args = {{strict = false}} to leave such rows unscored"
        )
    return value


def _marked(text: str) -> str | None:
    """Return what stands at the last marker of a text."""
    last = None
    for marker in MARKER.finditer(text):
        if any(marker.groups()):
            last = marker
        else:
            direct = NUMBER.match(text, marker.end())
            last = direct if direct and not GOES_ON.match(text, direct.end()) else last
    if last is None:
        return None
    if last.re is NUMBER:
        return last[0]
    if last["boxed"]:
        return _braces(text, last.end())
    return text[last.end() :].partition("</answer>")[0] if last["tag"] else last["line"]


def _braces(text: str, start: int) -> str:
    """Return the text from `start` to the brace that closes the one before it; to the end of the text without one."""
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    return text[start:]


def _plain(text: str) -> str:
    """Write the numbers of LaTeX as in plain text: fractions, powers of ten, thin spaces, escaped signs."""
    text = re.sub(r"(?<=\d)(?:\\[,;! ]|\{,\}(?=\d{3}))(?=\d)", "", text)
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{[^{}]*\}|\\[()\[\]]", " ", text)
    text = re.sub(r"\\([$%])", r"\1", text)
    text = re.sub(r"\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", r" \1\2/\3\4", text)
    text = re.sub(r"([-−+(=]) (?=\d+/\d)", r"\1", text)
    return re.sub(r"(?<=\d)\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*\{?([-−]?\d{1,3})\}?", r"e\1", text)


def _value(found: re.Match[str]) -> Number | None:
    """Return the value of a match of `NUMBER`; None for one that is too long or has a denominator of 0."""
    if len(found[0]) > LONGEST:
        return None
    if found["bottom"] is not None:
        if int(found["bottom"]) == 0:
            return None
        value = int(found["whole"] or 0) + Fraction(int(found["top"]), int(found["bottom"]))
    else:
        exponent = int(found["exponent"] or 0)
        value = Fraction(found["plain"].replace(",", "")) * Fraction(10) ** exponent
    negative = (found["sign"] + found["inner"]).replace("−", "-").count("-") == 1
    return Number(-value if negative else value, found["percent"] is not None)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:50]}...{text[-27:]}"
