"""Reward 1 when the last number in the completion equals the answer."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from rlft.rewards.builtin.exact import text_of

NUMBER = re.compile(r"(?<![\w.])[-−]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
"""Digits with or without thousands commas, decimals, a leading minus or dollar sign. In "12-7" the 7 is positive."""


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text; None without one."""
    numbers = NUMBER.findall(text)
    return _parse(numbers[-1]) if numbers else None


def _parse(text: str) -> Decimal | None:
    try:
        return Decimal(text.strip().replace("−", "-").replace("$", "").replace(",", ""))
    except InvalidOperation:
        return None


def number(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """Return 1.0 where the last number in the text equals the answer, else 0.0; None where the answer is not a
    number."""
    rewards: list[float | None] = []
    for completion, right in zip(completions, answer, strict=True):
        expected = _parse(str(right))
        rewards.append(None if expected is None else float(last_number(text_of(completion)) == expected))
    return rewards
