"""The demo's control: the same rewards, handed to the wrong completions. What rises under it is not learning."""

from __future__ import annotations

import random
from typing import Any

from rlft.rewards.builtin.number import number


def shuffled(completions: list[Any], answer: list[Any], trainer_state: Any, **_: Any) -> list[float | None]:
    """`number`, permuted over the whole step by the step's number."""
    rewards = number(completions=completions, answer=answer)
    random.Random(trainer_state.global_step).shuffle(rewards)
    return rewards
