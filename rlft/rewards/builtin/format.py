"""Reward 1 when the whole completion matches a given pattern."""

from __future__ import annotations

import re
from typing import Any

from rlft.rewards.builtin.exact import text_of


def format(completions: list[Any], pattern: str, opened: str = "", **_: Any) -> list[float]:
    """Return 1.0 where the whole text matches the regular expression, else 0.0; "." matches line ends too.

    pattern: from the reward's args, for example args = {pattern = "<think>.*</think>.*"}. opened: a tag that the chat
    template opens at the end of the prompt, such as "<think>\\n"; the completion goes on inside of it, so what is
    matched is `opened` and the completion. A run sets it from its prompts.
    """
    form = re.compile(pattern, re.DOTALL)
    return [float(form.fullmatch(opened + text_of(item)) is not None) for item in completions]
