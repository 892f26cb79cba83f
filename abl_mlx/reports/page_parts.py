"""Sections of several pages: replies, refusal rates, categories, notes and the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from abl_mlx.behaviour import reply_notes
from abl_mlx.flag_values import Choices
from abl_mlx.records.edits import Hashes
from abl_mlx.records.evaluations import Asked, Category, EvalRecord, Refusals
from abl_mlx.reports.page import Cell, Reply, Section, Table


def of_replies(lines: Sequence[Mapping[str, Any]]) -> Section:
    """A section with replies, which are given in the form of `--save-replies`."""
    replies = tuple(
        Reply(
            line["set"],
            line["prompt"],
            tuple((w, r) for w, r in line.items() if w not in ("set", "prompt") and r is not None),
        )
        for line in lines
    )
    return Section("Replies", replies=replies)


def _rate(count: int, total: int) -> Markup:
    """Cells that show a share as a number and as a bar."""
    width = 100 * count / total if total else 0
    return Markup(
        '{}/{} <svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        '<rect width="{:.1f}" height="12"/></svg>'
    ).format(count, total, width)


def _code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)


def categories(before: Refusals | None, after: Refusals, names: tuple[str, str]) -> Section:
    """Refusals by category, of one or of two models."""
    tables = []
    for name, now in after.categories.items():
        was = {} if before is None else before.categories.get(name, {})
        if not now or set(now) == {""}:
            continue
        rows = []
        for category, one in now.items():
            row: list[Cell] = [category or "no category"]
            if was:
                row.append(_refused(was[category]) if category in was else "")
            row.append(_refused(one))
            row.append(str(one.broken) if one.broken else "")
            rows.append(tuple(row))
        head = (
            (f"{name} prompts", *names, "broken")
            if was
            else (f"{name} prompts", names[1], "broken")
        )
        tables.append(Table(head, tuple(rows), tuple(range(1, len(head)))))
    return Section("Refusals by category", ("Refused of asked.",), tables=tuple(tables))


def _refused(category: Category) -> Markup:
    return _rate(category.refused, category.n)


def pairs(title: str, values: Mapping[str, Any], head: tuple[str, str], folded: str = "") -> Table:
    rows = tuple((name, _code(str(value))) for name, value in values.items())
    return Table(head, rows, folded=folded or title)


def hash_rows(hashes: Hashes) -> dict[str, str]:
    """What was hashed -> its SHA-256."""
    source = {f"source: {file}": digest for file, digest in hashes.source.items()}
    return source | {"direction": hashes.direction, "options": hashes.options}


def reproduce(
    command: str,
    version: str,
    hashes: Mapping[str, str],
    *,
    options: Choices | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Section:
    """The section "To reproduce".

    Args:
        command: the command line.
        version: the version of abl-mlx.
        hashes: what was hashed -> its SHA-256.
        options: the chosen options.
        seconds: step -> its time in seconds.
    """
    tables = [pairs("SHA-256", hashes, ("of", "SHA-256"), "Hashes (SHA-256)")] if hashes else []
    if options is not None:
        shown = {name: value for name, value in options.record().items() if value is not None}
        tables.append(pairs("Options", shown, ("option", "value"), "All options"))
    if seconds:
        rows = tuple((step, f"{taken:.1f}") for step, taken in seconds.items())
        tables.append(Table(("step", "seconds"), rows, (1,), "Time taken"))
    return Section(
        "To reproduce",
        (f"With abl-mlx {version}:",),
        tables=tuple(tables),
        code=command,
    )


def notes(record: EvalRecord) -> tuple[str, ...]:
    """The notes on the replies of a model and of its baseline."""
    lines = []
    asked: list[tuple[Asked, str]] = [(record, "")]
    asked += [] if record.baseline is None else [(record.baseline, "of the baseline")]
    for one, who in asked:
        if one.note:
            lines.append(one.note)
        lines += reply_notes.sentences(one, who)
        if one.judging is not None:
            lines.append(
                f"{one.judging.unparsed} of {one.judging.asked} {f'verdicts {who}'.rstrip()} could "
                "not be read and are in no rate"
            )
    return tuple(lines)
