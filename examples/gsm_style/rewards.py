"""Two rewards for a model that thinks in tags: is the form there, and is the answer right?

`shuffled = true` in the arguments of both is the control: the same rewards, handed to the wrong completions of a step.
What rises under it is not learning.
"""

from __future__ import annotations

import random
import re
from typing import Any

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ANSWER = re.compile(r"<answer>\s*\$?(-?[\d,]*\.?\d+)\s*</answer>")
FINAL = re.compile(r"(-?[\d,]*\.?\d+)\s*$")
"""The number at the end of a dataset's answer, such as "72" or GSM8K's "... #### 72"."""


def form(completions: list[Any], trainer_state: Any, shuffled: bool = False, **_: Any) -> list[float]:
    """A quarter for each tag that stands exactly once, so that a model that rarely writes all four learns too."""
    rewards = [sum(text_of(item).count(tag) == 1 for tag in TAGS) / len(TAGS) for item in completions]
    return permuted(rewards, trainer_state.global_step) if shuffled else rewards


def correct(
    completions: list[Any], answer: list[Any], trainer_state: Any, shuffled: bool = False, **_: Any
) -> list[float]:
    """1 where the number in the answer's tags is the right one."""
    rewards = []
    for item, right in zip(completions, answer, strict=True):
        found, wanted = ANSWER.findall(text_of(item)), FINAL.findall(str(right))
        rewards.append(float(len(found) == 1 and bool(wanted) and value(found[0]) == value(wanted[0])))
    return permuted(rewards, trainer_state.global_step) if shuffled else rewards


def text_of(item: Any) -> str:
    """The text of a completion, which is a list of messages where the prompts are."""
    return item if isinstance(item, str) else item[-1]["content"]


def value(text: str) -> float:
    return float(text.replace(",", ""))


def permuted(rewards: list[float], step: int) -> list[float]:
    """The same rewards in an order drawn from the step's number; both functions use the same order."""
    return random.Random(step).sample(rewards, len(rewards))
