"""A soft penalty on overlong completions (DAPO, 2503.14476, equation 13)."""

from __future__ import annotations

from typing import Any


def length(completion_ids: list[list[int]], max_tokens: int, buffer: int, **_: Any) -> list[float]:
    """Return 0.0 up to max_tokens - buffer tokens, falling linearly to -1.0 at max_tokens, -1.0 beyond.

    max_tokens, buffer: from the reward's args, for example args = {max_tokens = 1024, buffer = 256}.
    """
    return [-min(1.0, max(0.0, (len(ids) - (max_tokens - buffer)) / buffer)) for ids in completion_ids]
