"""The reward of counting: is the number in the completion the right one?

`shuffled = true` in its arguments is the control: the same rewards, handed to the wrong completions of a step. What
rises under it is not learning.
"""

from __future__ import annotations

import random
import re
from typing import Any

NUMBER = re.compile(r"\d+")


def counted(
    completions: list[Any], answer: list[str], trainer_state: Any, shuffled: bool = False, **_: Any
) -> list[float]:
    """1 where the completion has one number, and it is the answer."""
    texts = [item if isinstance(item, str) else item[-1]["content"] for item in completions]
    rewards = [float(NUMBER.findall(text) == [right]) for text, right in zip(texts, answer, strict=True)]
    return random.Random(trainer_state.global_step).sample(rewards, len(rewards)) if shuffled else rewards
