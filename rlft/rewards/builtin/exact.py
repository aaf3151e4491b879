"""Reward 1 when the stripped completion equals the answer.

The answer decides how it is compared, since a table's reader turns `true` and `1.50` into values:

| answer | equal to it |
| --- | --- |
| a text | the same text, without surrounding white space; `"1"` is not `"1.0"` |
| True, False | `true`, `True`, `TRUE`, and so for false; not `1` |
| a number | any decimal text of the same value: for 1 and for 1.0 both `1` and `1.0` |
| a list | any of its items |
| None | not applicable |
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

DECIMAL = re.compile(r"[-+]?\d+(\.\d+)?([eE][-+]?\d{1,4})?")
"""A number as JSON and CSV have it; Decimal alone would also take "5.", "1_000" and "NaN"."""


def text_of(completion: Any) -> str:
    """Return the text of a completion: the string itself, or the content of its last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def exact(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """Return 1.0 where the stripped text equals the answer, else 0.0; None where the answer is None.

    >>> exact(completions=[" Paris", "true", "1.0", "1.0"], answer=["Paris", True, 1, "1"])
    [1.0, 1.0, 1.0, 0.0]
    """
    return [
        None if right is None else float(_equal(text_of(item).strip(), right))
        for item, right in zip(completions, answer, strict=True)
    ]


def _equal(text: str, answer: Any) -> bool:
    if isinstance(answer, list | tuple):
        return any(_equal(text, one) for one in answer)
    if isinstance(answer, bool):
        return text.lower() == str(answer).lower()
    if isinstance(answer, int | float | Decimal):
        return DECIMAL.fullmatch(text) is not None and Decimal(text) == Decimal(str(answer))
    return text == str(answer).strip()
