"""Whether an edit leaves as few refused and broken replies as another one, as far as replies tell.

The decision has two steps. On a few prompts only what is shown to be worse is ruled out (McNemar's
exact test): a small sample would else decide by chance. What is left replies to more prompts, and
is as good if it leaves at most one standard error more than the other edit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: The level at which an edit is ruled out, one-sided: an edit that is as good is ruled out at most
#: so often.
LEVEL = 0.05


def mcnemar(wrong: Sequence[bool], others: Sequence[bool]) -> float:
    """The p-value of McNemar's exact one-sided test that an edit leaves more than another one.

    Of the replies that only one of the two edits leaves wrong, each edit has half if both are as
    good, so that the edit's number is binomial.
    Source: Q. McNemar 1947, "Note on the sampling error of the difference between correlated
    proportions or percentages", Psychometrika 12:153-157.

    Args:
        wrong: for each prompt whether the edit's reply is refused or broken.
        others: the same of the other edit, for the same prompts.
    """
    pairs = list(zip(wrong, others, strict=True))
    more, fewer = pairs.count((True, False)), pairs.count((False, True))
    apart = more + fewer
    return sum(math.comb(apart, count) for count in range(more, apart + 1)) / 2**apart


def ruled_out(wrong: Sequence[bool], others: Sequence[bool]) -> bool:
    """Whether an edit is shown to leave more than another one; arguments as of `mcnemar`."""
    return mcnemar(wrong, others) <= LEVEL


def as_few(wrong: Sequence[bool], others: Sequence[bool]) -> bool:
    """Whether an edit leaves at most one standard error more than another one.

    This is the rule by which the simplest of several models is chosen, whose error is within one
    standard error of the best one's. The standard error of a number k of n replies is
    √(k (n − k) / n): none of no replies, so that nothing may be left where the other leaves
    nothing.
    Source: L. Breiman, J. Friedman, R. Olshen, C. Stone 1984, "Classification and Regression
    Trees", section 3.4.3.

    Args:
        wrong, others: as of `mcnemar`.
    """
    left, count = sum(others), len(others)
    return sum(wrong) <= left + (math.sqrt(left * (count - left) / count) if count else 0.0)
