"""The experts that a mixture chose for each token of a rollout, as reported by the engine that sampled it.

Shapes: P tokens of a prompt, L of a completion, layers with experts, k experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

MOST = 2**15 - 1
"""Most experts of a layer: the largest number of the widest type is that of none."""


def type_of(experts: int) -> type[np.uint8] | type[np.int16]:
    """Return the smallest type that holds the numbers of `experts` experts, at most MOST, and one that is of none."""
    assert 0 < experts <= MOST, experts
    return np.uint8 if experts < 2**8 else np.int16


def _empty() -> np.ndarray:
    return np.empty((0, 0, 0), np.uint8)


@dataclass(eq=False)
class Routes:
    """Which experts each token of a rollout goes to, best first in each row.

    Engines make one with each rollout, and set both fields once, when all completions of the call have ended.
    """

    prompt: np.ndarray = field(default_factory=_empty)
    """[P, layers, k] uint8, or int16 from 256 experts on. The same array for all rollouts of a group."""
    completion: np.ndarray = field(default_factory=_empty)
    """[L, layers, k] of the same type. The last row is arbitrary: the engine stops before it runs the last token."""

    def __eq__(self, other: object) -> bool:
        """Return whether all choices are equal."""
        if not isinstance(other, Routes):
            return NotImplemented
        return np.array_equal(self.prompt, other.prompt) and np.array_equal(self.completion, other.completion)
