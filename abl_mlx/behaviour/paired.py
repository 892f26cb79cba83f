"""Compares two models on the same prompts: how often they differ, with p-value and interval.

Each prompt is a pair of yes/no outcomes, so the two rates are not independent and are compared
through the prompts on which the models differ (McNemar 1947).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

#: The normal quantile of a two-sided 95% interval.
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Paired:
    """Counts of prompts by both models' outcomes.

    Attributes:
        both: prompts with yes from both models.
        gained: prompts with yes only from the second model.
        lost: prompts with yes only from the first model.
        neither: prompts with no from both models.
    """

    both: int
    gained: int
    lost: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> Paired:
        """Count two models' outcomes on the same prompts, in the same order.

        Raises:
            ValueError: when the numbers of outcomes differ.
        """
        pairs = list(zip(first, second, strict=True))
        return cls(
            pairs.count((True, True)),
            pairs.count((False, True)),
            pairs.count((True, False)),
            pairs.count((False, False)),
        )

    @property
    def n(self) -> int:
        """Prompts."""
        return self.both + self.gained + self.lost + self.neither

    @property
    def difference(self) -> float:
        """Rate of the second model minus rate of the first; NaN without prompts."""
        return (self.gained - self.lost) / self.n if self.n else math.nan

    @property
    def p(self) -> float:
        """McNemar's exact two-sided p-value for the hypothesis that both rates are the same."""
        return mcnemar_exact(self.gained, self.lost)

    @property
    def interval(self) -> tuple[float, float]:
        """Tango's 95% interval of :attr:`difference`."""
        return tango(self.gained, self.lost, self.n)


def mcnemar_exact(b: int, c: int) -> float:
    """Exact two-sided p-value of McNemar's test.

    It is the probability that b + c fair coins fall at least as unevenly as b to c, computed in
    whole numbers, so it is exact for counts of any size.
    """
    n = b + c
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def tango(b: int, c: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a paired difference (b − c) / n (Tango 1998, Statistics in Medicine 17).

    It holds all differences D that a score test does not reject: |b − c − nD| ≤
    z·√(n(2q + D(1 − D))), where q is the maximum-likelihood rate of the c-pairs given D. It is
    valid for small counts, for b = c = 0, and for differences of 0 and 1.

    Args:
        b: number of pairs with yes only from the second model.
        c: number of pairs with yes only from the first model.
        n: number of all pairs.
        z: normal quantile.

    Returns:
        The two ends, within [−1, 1]; (−1, 1) without pairs.
    """
    if n == 0:
        return -1.0, 1.0

    def score(difference: float) -> float:
        """The score statistic; falls as the difference grows."""
        along = 2 * n + c - b
        beside = -(b + c) + along * difference
        rest = -c * difference * (1 - difference)
        # 2n·q² + beside·q + rest = 0, the larger root.
        q = (math.sqrt(max(0.0, beside * beside - 8 * n * rest)) - beside) / (4 * n)
        variance = n * (2 * q + difference * (1 - difference))
        over = b - c - n * difference
        if variance <= 0:
            return 0.0 if over == 0 else math.copysign(math.inf, over)
        return over / math.sqrt(variance)

    estimate = (b - c) / n

    def end(outer: float, limit: float) -> float:
        # The statistic equals `limit` between the estimate, where it is 0, and the outer end.
        near, far = estimate, outer
        for _ in range(200):
            middle = (near + far) / 2
            if abs(score(middle)) < limit:
                near = middle
            else:
                far = middle
        return (near + far) / 2

    return end(-1.0, z), end(1.0, z)
