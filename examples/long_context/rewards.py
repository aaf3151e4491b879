"""The reward of retrieval: the share of the code's digits that are right, from the first on.

`shuffled = true` in its arguments is the control: the same rewards, handed to the wrong completions of a step. What
rises under it is not learning.
"""

from __future__ import annotations

import random
import re
from typing import Any


def found(
    completions: list[Any], answer: list[str], trainer_state: Any, shuffled: bool = False, **_: Any
) -> list[float]:
    """1 for the code, a part of it for a number that begins as the code does."""
    texts = [item if isinstance(item, str) else item[-1]["content"] for item in completions]
    numbers = [(re.findall(r"\d+", text) or [""])[0] for text in texts]
    rewards = [
        sum(number.startswith(code[: i + 1]) for i in range(len(code))) / max(len(number), len(code))
        for number, code in zip(numbers, answer, strict=True)
    ]
    return random.Random(trainer_state.global_step).sample(rewards, len(rewards)) if shuffled else rewards
