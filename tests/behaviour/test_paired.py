"""Paired statistics against published figures, brute force and simulation in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from abl_mlx.behaviour.paired import Z95, Paired, mcnemar_exact, tango


def test_counts_and_difference() -> None:
    first = [True, True, True, False, False, True]
    second = [True, False, False, True, False, False]
    paired = Paired.of(first, second)
    assert (paired.both, paired.gained, paired.lost, paired.neither) == (1, 1, 3, 1)
    assert paired.n == 6
    assert paired.difference == pytest.approx(np.mean(second) - np.mean(first))
    low, high = paired.interval
    assert low < paired.difference < high
    with pytest.raises(ValueError, match="zip"):
        Paired.of([True], [])


def test_without_prompts_nothing_is_known() -> None:
    paired = Paired.of([], [])
    assert math.isnan(paired.difference)
    assert paired.interval == (-1.0, 1.0)
    assert paired.p == 1.0


def test_mcnemar_equals_counting_every_outcome() -> None:
    """All 2^n ways in which n fair coins fall; as uneven as the one seen, or worse."""
    for b, c in [(0, 0), (1, 0), (2, 2), (1, 5), (7, 2), (0, 9)]:
        n = b + c
        worse = sum(
            abs(2 * sum(coins) - n) >= abs(b - c) for coins in itertools.product((0, 1), repeat=n)
        )
        assert mcnemar_exact(b, c) == pytest.approx(worse / 2**n, abs=1e-15)


def test_mcnemar_of_thousands_of_prompts_neither_overflows_nor_rounds_to_nothing() -> None:
    assert mcnemar_exact(3000, 3000) == 1.0
    # Far out, log p is within Stirling's error of the largest term's.
    assert math.log(mcnemar_exact(1000, 0)) == pytest.approx(math.log(2) - 1000 * math.log(2))
    assert mcnemar_exact(1200, 1000) == mcnemar_exact(1000, 1200) < 1e-4


def test_tango_gives_the_published_interval() -> None:
    """Airway hyper-responsiveness, 1/1/7/12: Fagerland, Lydersen & Laake 2014, table 6."""
    assert tango(1, 7, 21) == (pytest.approx(-0.517, abs=5e-4), pytest.approx(-0.026, abs=5e-4))


def constrained_score(difference: float, b: int, c: int, n: int) -> float:
    """The score statistic with its nuisance rate found by trying every value."""
    q = np.linspace(max(0.0, -difference), (1 - difference) / 2, 200_001)
    cells = ((b, q + difference), (c, q), (n - b - c, 1 - 2 * q - difference))
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = sum(k * np.log(np.clip(p, 0, None)) if k else 0 * p for k, p in cells)
    q_best = q[np.nanargmax(likelihood)]
    variance = n * (2 * q_best + difference * (1 - difference))
    return float((b - c - n * difference) / np.sqrt(variance))


@pytest.mark.parametrize(("b", "c", "n"), [(1, 7, 21), (3, 2, 40), (5, 0, 12), (40, 20, 160)])
def test_tango_ends_where_a_brute_force_score_test_begins_to_reject(b: int, c: int, n: int) -> None:
    low, high = tango(b, c, n)
    assert constrained_score(low, b, c, n) == pytest.approx(Z95, abs=1e-3)
    assert constrained_score(high, b, c, n) == pytest.approx(-Z95, abs=1e-3)


@pytest.mark.parametrize(("b", "c", "n"), [(0, 0, 30), (30, 0, 30), (0, 1, 1), (1, 0, 64)])
def test_tango_is_symmetric_and_stays_within_bounds_at_the_edges(b: int, c: int, n: int) -> None:
    low, high = tango(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert high - low > 0.01
    assert tango(c, b, n) == (pytest.approx(-high), pytest.approx(-low))


def test_tango_covers_the_truth_as_often_as_it_says() -> None:
    """Every outcome of 64 prompts, weighted by its probability: coverage near 95%."""
    n, p_b, p_c = 64, 0.15, 0.05
    covered = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            weight = math.exp(
                math.lgamma(n + 1) - math.lgamma(b + 1) - math.lgamma(c + 1)
                - math.lgamma(n - b - c + 1)
                + b * math.log(p_b) + c * math.log(p_c) + (n - b - c) * math.log(1 - p_b - p_c)
            )  # fmt: skip
            if weight > 1e-7:
                low, high = tango(b, c, n)
                covered += weight * (low <= p_b - p_c <= high)
    assert covered == pytest.approx(0.95, abs=0.015)
