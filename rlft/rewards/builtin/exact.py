"""Reward 1 when the stripped completion equals the answer."""

from __future__ import annotations

from typing import Any


def text_of(completion: Any) -> str:
    """Return the text of a completion: the string itself, or the content of its last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def exact(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """Return 1.0 where the stripped text equals the stripped answer, else 0.0."""
    return [float(text_of(item).strip() == str(right).strip()) for item, right in zip(completions, answer, strict=True)]
