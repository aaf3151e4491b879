"""Reward 1 when the whole completion matches a given pattern."""

from __future__ import annotations

import re
from typing import Any

from rlft.rewards.builtin.exact import text_of


def format(completions: list[Any], pattern: str, **_: Any) -> list[float]:
    """Return 1.0 where the whole text matches the regular expression, else 0.0; "." matches line ends too.

    pattern: from the reward's args, for example args = {pattern = "<think>.*</think>.*"}.
    """
    form = re.compile(pattern, re.DOTALL)
    return [float(form.fullmatch(text_of(item)) is not None) for item in completions]
