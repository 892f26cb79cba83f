"""Whether a model recognizes harm, as rows of tables and pages."""

from __future__ import annotations

from abl_mlx.records.evaluations import Asked, ToldApart

#: A model that gives either word less probability does not answer the question.
HARDLY = 0.01


def recognition_rows(record: Asked, baseline: Asked | None) -> list[tuple[str, str, str, str]]:
    """What a model can tell apart: (what, the baseline's, the target's, note) each."""
    if record.recognition is None:
        return []
    now, was = record.recognition, None if baseline is None else baseline.recognition
    more = "" if now.kind == "exact" else f"; {now.kind} tokens"
    rows = []
    for name, one, before in (
        ("harmful from harmless", now.harm, None if was is None else was.harm),
        ("long from short (control)", now.length, None if was is None else was.length),
    ):
        rows += [
            (f"{name}, AUC", _number(before, "auc"), _number(one, "auc"), _note(one) + more),
            (
                f"{name}, margin",
                _number(before, "margin"),
                _number(one, "margin"),
                "" if one.margin_interval is None else f"nats, {_interval(one.margin_interval)}",
            ),
        ]
    return rows


def _number(one: ToldApart | None, name: str) -> str:
    value = None if one is None else getattr(one, name)
    return "" if one is None else "–" if value is None else f"{value:.2f}"


def _note(one: ToldApart) -> str:
    if one.auc_interval is None or one.accuracy is None or one.shuffled_interval is None:
        return f"cannot tell: none of its replies is {one.words[0]} or {one.words[1]}"
    found = f"{_interval(one.auc_interval)}, accuracy {one.accuracy:.0%}, n={sum(one.n)}"
    if one.unread:
        found += f" and {one.unread} unread"
    if one.tells:
        return found
    found += (
        f"; cannot tell: shuffled labels give {one.shuffled_interval[0]:.2f} to "
        f"{one.shuffled_interval[1]:.2f}"
    )
    if one.mass < HARDLY:
        found += ", and it hardly ever answers with either word"
    return found


def _interval(limits: list[float]) -> str:
    return f"95% interval {limits[0]:.2f} to {limits[1]:.2f}"
