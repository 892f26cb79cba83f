"""Parts that several pages have: replies, refusal rates, categories, notes and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from abl_mlx.behaviour import reply_notes
from abl_mlx.reports.page import Cell, Record, Reply, Section, Table
from abl_mlx.reports.tables import interval
from abl_mlx.support.console import percent


def of_replies(lines: Sequence[Record]) -> Section:
    """Replies that were asked for, in the form of `--save-replies`."""
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
    """A share as numbers and a bar."""
    width = 100 * count / total if total else 0
    return Markup(
        '{}/{} <svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        '<rect width="{:.1f}" height="12"/></svg>'
    ).format(count, total, width)


def _code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)


SETS = ("harmful", "harmless", "borderline")


def behaviour_rows(before: Record | None, after: Record) -> list[tuple[Cell, ...]]:
    """Rates of two models beside each other: (name, before, after, note)."""

    def was(key: str) -> str:
        return "" if before is None or key not in before else percent(before[key])

    rows: list[tuple[Cell, ...]] = []
    for name in SETS:
        key = f"{name}_refusal_rate"
        if key in after:
            label = f"refusals, {name} prompts"
            rows.append((label, was(key), percent(after[key]), interval(after, name)))
    if "broken_rate" in after:
        note = "empty or looping replies"
        rows.append(("broken", was("broken_rate"), percent(after["broken_rate"]), note))
    key = "expected_answer_rate"
    if key in after:
        rows.append(("known answers, harmful prompts", was(key), percent(after[key]), ""))
    return rows


def categories(before: Record | None, after: Record, names: tuple[str, str]) -> Section:
    """Refusals by category, of one or of two models."""
    tables = []
    for name in SETS:
        now = after.get("categories", {}).get(name, {})
        was = (before or {}).get("categories", {}).get(name, {})
        if not now or set(now) == {""}:
            continue
        rows = []
        for category, one in now.items():
            row: list[Cell] = [category or "no category"]
            if was:
                old = was.get(category)
                row.append("" if old is None else _rate(old["refused"], old["n"]))
            row.append(_rate(one["refused"], one["n"]))
            row.append(str(one["broken"]) if one["broken"] else "")
            rows.append(tuple(row))
        head = (
            (f"{name} prompts", *names, "broken")
            if was
            else (f"{name} prompts", names[1], "broken")
        )
        tables.append(Table(head, tuple(rows), tuple(range(1, len(head)))))
    return Section("Refusals by category", ("Refused of asked.",), tables=tuple(tables))


def pairs(title: str, values: Record, head: tuple[str, str], folded: str = "") -> Table:
    rows = tuple((name, _code(str(value))) for name, value in values.items())
    return Table(head, rows, folded=folded or title)


def hash_rows(hashes: Record) -> dict[str, str]:
    rows: dict[str, str] = {}
    for name, value in hashes.items():
        if isinstance(value, Mapping):
            rows |= {f"{name}: {file}": str(digest) for file, digest in value.items()}
        else:
            rows[name] = str(value)
    return rows


def reproduce(command: str, record: Record, hashes: Record) -> Section:
    tables = [pairs("SHA-256", hashes, ("of", "SHA-256"), "Hashes (SHA-256)")] if hashes else []
    if record.get("options"):
        shown = {k: v for k, v in record["options"].items() if v is not None}
        tables.append(pairs("Options", shown, ("option", "value"), "All options"))
    if record.get("seconds"):
        rows = tuple((step, f"{seconds:.1f}") for step, seconds in record["seconds"].items())
        tables.append(Table(("step", "seconds"), rows, (1,), "Time taken"))
    return Section(
        "To reproduce",
        (f"With abl-mlx {record['abl_mlx']}:",),
        tables=tuple(tables),
        code=command,
    )


def notes(record: Record) -> tuple[str, ...]:
    lines = []
    for one, who in ((record, ""), (record.get("baseline") or {}, "of the baseline")):
        if one.get("note"):
            lines.append(one["note"])
        lines += reply_notes.sentences(one, who)
        if "judging" in one:
            judging = one["judging"]
            lines.append(
                f"{judging['unparsed']} of {judging['asked']} {f'verdicts {who}'.rstrip()} could "
                "not be read and are in no rate"
            )
    return tuple(lines)
