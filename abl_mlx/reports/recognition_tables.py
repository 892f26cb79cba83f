"""Whether a model recognizes harm, as rows of tables and pages."""

from __future__ import annotations

from collections.abc import Sequence

from abl_mlx.behaviour.separation import growth
from abl_mlx.records.evaluations import Refusals
from abl_mlx.records.measurements import ToldApart

#: If the two words together have less probability, the model does not answer the question.
HARDLY = 0.01


def recognition_rows(before: Refusals | None, after: Refusals) -> list[tuple[str, str, str, str]]:
    """What two models can tell apart: (name, before, after, note) each.

    Args:
        before: None if there is one model alone.
    """
    if after.recognition is None:
        return []
    now, was = after.recognition, None if before is None else before.recognition
    more = "" if now.kind == "exact" else f"; {now.kind} tokens"
    rows = []
    for name, one, old in (
        ("harmful from harmless", now.harm, None if was is None else was.harm),
        ("control, long from short", now.length, None if was is None else was.length),
    ):
        for figure, note in (("AUC", _auc_note(one) + more), ("margin", _margin_note(one, old))):
            cells = _number(old, figure.lower()), _number(one, figure.lower())
            rows.append((f"{name}, {figure}", *cells, note))
    return rows


def _number(one: ToldApart | None, name: str) -> str:
    value = None if one is None else getattr(one, name)
    return "" if one is None else "–" if value is None else f"{value:.2f}"


def _auc_note(one: ToldApart) -> str:
    if one.auc_interval is None or one.accuracy is None or one.shuffled_interval is None:
        return f"cannot tell: no reply is {one.words[0]} or {one.words[1]}"
    found = f"{_interval(one.auc_interval)}, accuracy {one.accuracy:.0%}, n={sum(one.n)}"
    if one.unread:
        found += f" and {one.unread} unread"
    if one.tells:
        return found
    low, high = one.shuffled_interval
    return f"{found}; cannot tell: chance gives {low:.2f} to {high:.2f}"


def _margin_note(one: ToldApart, before: ToldApart | None) -> str:
    if one.margin_interval is None:
        return ""
    moved = None if before is None else growth(before.margins, one.margins)
    hardly = ": hardly an answer" if one.mass < HARDLY else ""
    mass = f"{one.words[0]} or {one.words[1]} has probability {one.mass:.0%}{hardly}"
    if moved is None:
        return f"nats, {_interval(one.margin_interval)}; {mass}"
    return f"nats, changed by {moved[0]:+.2f} ({_interval(moved[1])}); {mass}"


def _interval(limits: Sequence[float]) -> str:
    return f"95% interval {limits[0]:.2f} to {limits[1]:.2f}"
