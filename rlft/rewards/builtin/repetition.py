"""A penalty on n-grams that occur more than once, against loops in long reasoning (Yeo et al., 2502.03373).

With u distinct n-grams among all N of a completion the reward is -(1 - u / N): 0 without a repeat, near -1 for a loop.
N-grams are of tokens, so a repeated character or line end counts as well as a repeated sentence, in any language.

    [[rewards]]
    use = "repetition"
    weight = 0.5
    args = { ngram = 40 }
"""

from __future__ import annotations

from typing import Any


def repetition(completion_ids: list[list[int]], ngram: int = 40, **_: Any) -> list[float]:
    """Return minus the share of n-grams that repeat an earlier one; 0.0 for a completion of fewer than `ngram` tokens.

    ngram: length in tokens. Small values punish ordinary language, where short n-grams recur.

    >>> repetition(completion_ids=[[1, 2, 3, 4, 5], [1, 2, 1, 2, 1]], ngram=2)
    [0.0, -0.5]
    """
    if ngram < 1:
        raise ValueError(f"ngram = {ngram}: want 1 or more")
    rewards = []
    for ids in completion_ids:
        count = len(ids) - ngram + 1
        distinct = len({tuple(ids[i : i + ngram]) for i in range(count)})
        rewards.append(distinct / count - 1.0 if count > 0 else 0.0)
    return rewards
