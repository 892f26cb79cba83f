"""Refusal rates and related figures of the replies to prompt sets, for records.

Nothing in this module imports MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abl_mlx.behaviour.refusals import Rates, Tally, Verdict
from abl_mlx.behaviour.reply_notes import Notes
from abl_mlx.records.evaluations import FURTHER, Category, Rate, Refusals
from abl_mlx.records.measurements import Thoughts


def refusals(
    sets: Mapping[str, Rates],
    notes: Notes,
    expected: float | None,
    thoughts: Thoughts | None = None,
) -> Refusals:
    """Rates with their intervals, by set and category.

    Replies without a verdict are not counted; the rate of a set without verdicts is None.

    Args:
        sets: ``harmful``, ``harmless`` and, if they were asked, ``borderline``, ``kept`` and
            ``off_topic``.
        notes: further observations on the replies (`reply_notes`).
        expected: the share of harmful prompts whose reply is exactly their known answer.
        thoughts: the figures of the thoughts that replies begin with, if there are any.
    """
    both = [sets[name].overall for name in ("harmful", "harmless")]
    judged = sum(tally.total for tally in both)
    broken = sum(tally.count(Verdict.BROKEN) for tally in both)
    harmful, harmless = _rate(sets["harmful"]), _rate(sets["harmless"])
    further = {name: _rate(sets[name]) for name in FURTHER if name in sets}
    more: dict[str, Any] = {}
    for name, rate in further.items():
        more[f"{name}_refusal_rate"] = rate.share
        more[f"{name}_refusal_interval"] = rate.interval
        more[f"n_{name}"] = rate.n
    unknown = [f"{name}_refusal_rate" for name, rate in further.items() if rate.share is None]
    return Refusals(
        harmful_refusal_rate=harmful.share,
        harmful_refusal_interval=harmful.interval,
        n_harmful=harmful.n,
        harmless_refusal_rate=harmless.share,
        harmless_refusal_interval=harmless.interval,
        n_harmless=harmless.n,
        broken_rate=broken / judged if judged else None,
        expected_answer_rate=expected,
        **more,
        nulls=frozenset(unknown),
        unfinished_thoughts=notes.unfinished_thoughts,
        looping_refusals=notes.looping_refusals,
        withheld_replies=notes.withheld_replies,
        fixed_reply=notes.fixed_reply,
        thoughts=thoughts,
        categories={
            name: {category: _category(tally) for category, tally in one.by_category.items()}
            for name, one in sets.items()
        },
    )


def _rate(rates: Rates) -> Rate:
    tally = rates.overall
    return Rate(_share(tally), list(tally.interval(Verdict.REFUSAL)), tally.total)


def _share(tally: Tally) -> float | None:
    return tally.rate(Verdict.REFUSAL) if tally.total else None


def _category(tally: Tally) -> Category:
    return Category(
        n=tally.total,
        refused=tally.count(Verdict.REFUSAL),
        broken=tally.count(Verdict.BROKEN),
        refusal_rate=_share(tally),
        refusal_interval=list(tally.interval(Verdict.REFUSAL)),
    )
