"""Score answers with reasoning-gym, between 0 and 1, for rows of "reasoning_gym:TASK"."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from rlft.rewards.builtin.exact import text_of

NEEDS = ("reasoning_gym", "tasks")
"""Module to install, and the extra of rlft that does it."""


@lru_cache
def _scorer(task: str) -> Any:
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(task)


def reasoning_gym(
    completions: list[Any], answer: list[Any], task: list[str], metadata: list[dict[str, Any]], **_: Any
) -> list[float]:
    """Return the task's score of the stripped text; tasks differ in how strictly they parse the answer."""
    rewards = []
    for completion, right, name, extra in zip(completions, answer, task, metadata, strict=True):
        entry = {"question": "", "answer": right, "metadata": extra}
        rewards.append(float(_scorer(name)(text_of(completion).strip(), entry)))
    return rewards
