"""1 when the completion, stripped, is the answer."""

from __future__ import annotations

from typing import Any


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def exact(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """1.0 where the stripped text equals the stripped answer, else 0.0."""
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]
