"""pass@k, and how far a mean over rows may be off: standard errors and 95% intervals.

The unit is always the row, never the completion: samples of one prompt are alike, so counting each of them as a draw of
its own would make every interval too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054
"""A normal variable lies within +-Z with probability 0.95."""
RESAMPLES = 2000
"""Draws of the bootstrap."""


class Estimate(NamedTuple):
    """A mean over rows. nan where the rows are too few to say."""

    mean: float
    stderr: float
    """Sample standard deviation over rows / sqrt(rows)."""
    low: float
    """Lower end of the 95% interval."""
    high: float


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """Chance that at least one of k samples succeeds, without bias from `successes` among `samples` of one row.

    1 - C(n - c, k) / C(n, k): the share of all ways to choose k of the n samples that hold a success (Chen et al.,
    2107.03374). Its mean over draws is 1 - (1 - p)^k, which 1 - (1 - c/n)^k is not.
    """
    assert 1 <= k <= samples and 0 <= successes <= samples, (samples, successes, k)
    return 1 - math.comb(samples - successes, k) / math.comb(samples, k)


def mean_of(rows: Sequence[float]) -> Estimate:
    """Mean, standard error and 95% interval of one value per row.

    The interval is Wilson's where every value is 0 or 1 (it stays within [0, 1] and is right for few rows and at 0% or
    100%), else the bootstrap's over rows.
    """
    if rows and all(value in (0.0, 1.0) for value in rows):
        low, high = wilson(sum(rows), len(rows))
        return _estimate(rows, low, high)
    return difference_of(rows)


def difference_of(rows: Sequence[float]) -> Estimate:
    """The same for differences between two results of each row, whose interval is always the bootstrap's."""
    return _estimate(rows, *bootstrap(rows))


def wilson(successes: float, rows: int) -> tuple[float, float]:
    """95% interval of a share: the shares p for which `successes` of `rows` is within Z standard errors."""
    share, z2 = successes / rows, Z * Z / rows
    middle = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows))
    # At 0 and 1 the ends are exactly 0 and 1; rounding must not move them outside.
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(rows: Sequence[float]) -> tuple[float, float]:
    """95% interval of a mean: 2.5th and 97.5th percentile of the means of rows drawn with repetition.

    The seed is fixed: the same rows give the same interval. Needs two rows, else nan.
    """
    if len(rows) < 2:
        return math.nan, math.nan
    rng, values = np.random.default_rng(0), np.asarray(rows, dtype=np.float64)
    at_once = max(1, 1_000_000 // len(values))  # draws held in memory together
    sizes = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    means = [values[rng.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def _estimate(rows: Sequence[float], low: float, high: float) -> Estimate:
    n = len(rows)
    mean = math.fsum(rows) / n if n else math.nan
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in rows) / (n - 1)) if n > 1 else math.nan
    return Estimate(mean, spread / math.sqrt(n) if n > 1 else math.nan, low, high)
