"""DAPO's soft penalty for completions that come near the length limit (2503.14476)."""

from __future__ import annotations

from typing import Any


def overlong(completion_ids: list[list[int]], max_tokens: int, share: float = 0.2, **kwargs: Any) -> list[float]:
    """0 up to max_tokens (1 - share), then falling in a line to -1 at max_tokens.

    The setting overlong.penalty_share adds it to a run; DAPO's share is 4,096 of 20,480 tokens.

    >>> overlong([[0] * 80, [0] * 90, [0] * 100], max_tokens=100, share=0.2)
    [0.0, -0.5, -1.0]
    """
    free = max_tokens * (1 - share)
    return [min(0.0, (free - len(ids)) / (max_tokens - free)) if len(ids) > free else 0.0 for ids in completion_ids]
