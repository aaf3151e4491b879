"""The reward of both stages: is the number in the answer's tags right?

`shuffled = true` in its arguments is the control: the same rewards, handed to the wrong completions of a step. What
rises under it is not learning.
"""

from __future__ import annotations

import random
import re
from typing import Any

ANSWER = re.compile(r"<answer>\s*(-?\d+)\s*</answer>")


def correct(
    completions: list[Any], answer: list[str], trainer_state: Any, shuffled: bool = False, **_: Any
) -> list[float]:
    """1 where the tags hold the right number, once."""
    texts = [item if isinstance(item, str) else item[-1]["content"] for item in completions]
    rewards = [float(ANSWER.findall(text) == [right]) for text, right in zip(texts, answer, strict=True)]
    return random.Random(trainer_state.global_step).sample(rewards, len(rewards)) if shuffled else rewards
