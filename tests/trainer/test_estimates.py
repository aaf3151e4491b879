"""pass@k against its definition, intervals against published values and each other."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from rlft.trainer.estimates import Z, bootstrap, estimate_difference, estimate_mean, pass_at_k, wilson


def test_pass_at_k_is_the_share_of_choices_that_hold_a_success() -> None:
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                chosen = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen), abs=1e-15)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_pass_at_k_has_no_bias(p: float) -> None:
    """Its mean over c ~ Binomial(n, p) is 1 - (1 - p)^k exactly; the plug-in 1 - (1 - c/n)^k falls short."""
    n, k = 10, 4
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    plugged = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
    assert plugged < mean - 0.005 or p in (0.0, 1.0) or p == 0.9


def test_pass_at_k_of_many_samples_is_a_number() -> None:
    assert pass_at_k(4096, 1, 2048) == pytest.approx(0.5)
    assert pass_at_k(4096, 4096, 1) == 1.0 and pass_at_k(4096, 0, 4096) == 0.0


def test_wilsons_interval_has_the_published_values_and_stays_within_0_and_1() -> None:
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)


def test_shares_take_wilsons_interval_and_other_means_the_bootstraps() -> None:
    zeros_and_ones, others = [1.0] * 30 + [0.0] * 70, [0.5] * 30 + [0.1] * 70
    share, mean = estimate_mean(zeros_and_ones), estimate_mean(others)
    assert (share.low, share.high) == wilson(30, 100) and share.mean == pytest.approx(0.3)
    assert (mean.low, mean.high) == bootstrap(others)
    # Standard errors by hand: the sample standard deviation over sqrt(rows).
    assert share.stderr == pytest.approx(math.sqrt(0.3 * 0.7 * 100 / 99) / 10)
    assert mean.stderr == pytest.approx(np.std(others, ddof=1) / 10)


def test_the_bootstrap_is_repeatable_and_near_the_normal_interval_where_that_holds() -> None:
    rows = np.random.default_rng(3).normal(2.0, 1.0, 400).tolist()
    found = estimate_mean(rows)
    assert estimate_mean(rows) == found
    assert found.low == pytest.approx(found.mean - Z * found.stderr, abs=0.1 * found.stderr * Z)
    assert found.high == pytest.approx(found.mean + Z * found.stderr, abs=0.1 * found.stderr * Z)


def test_differences_never_take_wilsons_interval() -> None:
    found = estimate_difference([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    assert (found.low, found.high) == bootstrap([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    assert estimate_difference([0.0, 0.0]) == (0.0, 0.0, 0.0, 0.0)


def test_too_few_rows_have_no_error() -> None:
    one, none = estimate_mean([0.5]), estimate_mean([])
    assert one.mean == 0.5 and all(map(math.isnan, one[1:])) and all(map(math.isnan, none))
