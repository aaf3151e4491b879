"""Estimate pass@k, and standard errors and 95% intervals of means over rows.

The unit is always the row, never the completion: samples of one prompt are correlated, so treating them as independent
would make every interval too narrow.

Legend: n samples and c successes of a row; Z the normal quantile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054
"""A standard normal variable is within +-Z with probability 0.95."""
RESAMPLES = 2000
"""Number of bootstrap resamples."""


class Estimate(NamedTuple):
    """A mean over rows with its error; nan where there are too few rows."""

    mean: float
    stderr: float
    """Sample standard deviation over rows / sqrt(rows)."""
    low: float
    """Lower end of the 95% interval."""
    high: float


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from `successes` among `samples` of one row.

    1 - C(n - c, k) / C(n, k) is the share of all k-subsets of the n samples that contain a success (Chen et al., arXiv
    2107.03374). Its expectation is 1 - (1 - p)^k; that of 1 - (1 - c/n)^k is not.
    """
    assert 1 <= k <= samples and 0 <= successes <= samples, (samples, successes, k)
    return 1 - math.comb(samples - successes, k) / math.comb(samples, k)


def estimate_mean(rows: Sequence[float]) -> Estimate:
    """Return mean, standard error and 95% interval of one value per row.

    The interval is Wilson's where every value is 0 or 1 (it stays within [0, 1] and holds for few rows and at 0% or
    100%), else a bootstrap over rows.
    """
    if rows and all(value in (0.0, 1.0) for value in rows):
        low, high = wilson(sum(rows), len(rows))
        return _estimate(rows, low, high)
    return estimate_difference(rows)


def estimate_difference(rows: Sequence[float]) -> Estimate:
    """Return mean, standard error and bootstrap 95% interval of one difference per row."""
    return _estimate(rows, *bootstrap(rows))


def wilson(successes: float, rows: int) -> tuple[float, float]:
    """Return the Wilson 95% interval of a share: all p for which `successes` of `rows` is within Z standard errors."""
    share, z2 = successes / rows, Z * Z / rows
    middle = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows))
    # At 0 and 1 the ends are exactly 0 and 1; rounding must not move them outside.
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(rows: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of a mean: 2.5th and 97.5th percentile over resamples with replacement.

    The seed is fixed, so the same rows give the same interval. nan with fewer than two rows.
    """
    if len(rows) < 2:
        return math.nan, math.nan
    rng, values = np.random.default_rng(0), np.asarray(rows, dtype=np.float64)
    at_once = max(1, 1_000_000 // len(values))  # resamples in memory at once
    sizes = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    means = [values[rng.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def _estimate(rows: Sequence[float], low: float, high: float) -> Estimate:
    n = len(rows)
    mean = math.fsum(rows) / n if n else math.nan
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in rows) / (n - 1)) if n > 1 else math.nan
    return Estimate(mean, spread / math.sqrt(n) if n > 1 else math.nan, low, high)
