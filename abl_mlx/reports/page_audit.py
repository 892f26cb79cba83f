"""The page of `abl-mlx audit`."""

from __future__ import annotations

from abl_mlx.records.looks import AuditedWriter, AuditRecord, NotAsked
from abl_mlx.reports import charts, figures
from abl_mlx.reports.page import Page, Section, Table, Tile, html
from abl_mlx.reports.page_eval import eval_sections
from abl_mlx.reports.page_parts import pairs, reproduce


def audit_page(record: AuditRecord, command: str) -> str:
    """The page of an audit.

    Args:
        record: the record of `audit.audit`.
        command: the command line that makes it again.
    """
    weights = record.weights
    good = {"edited": False, "not edited": True}.get(record.verdict)
    tiles = [Tile("verdict", record.verdict, good=good)]
    if weights.strength is not None:
        tiles.append(Tile("strength", f"about {weights.strength:.2f}"))
    if record.layers:
        tiles.append(Tile("layers", ", ".join(map(str, record.layers))))
    if record.direction_cosine is not None:
        note = "of the recovered direction with the given one"
        tiles.append(Tile("|cos|", f"{record.direction_cosine:.3f}", note))
    rows = tuple((name, *_cells(one)) for name, one in (weights.writers or {}).items())
    used = [0, *(k for k in range(1, len(_HEAD)) if any(row[k] for row in rows))]
    table = Table(
        tuple(_HEAD[k] for k in used),
        tuple(tuple(row[k] for k in used) for row in rows),
        tuple(range(1, len(used))),
        f"All {len(rows)} residual writers",
    )
    says = tuple(f"“{one.text}” in its {one.place}" for one in record.mentions)
    label = record.label or {}
    said = pairs("label", label, ("key", "value"), "What abl-mlx wrote")
    sections: list[Section] = [
        Section("Evidence", lines=tuple(record.evidence)),
        Section(
            "The residual writers",
            charts=tuple(figures.audit_charts(weights)),
            tables=(table,) if rows else (),
        ),
        Section("What the files say of themselves", lines=says, tables=(said,) if label else ()),
    ]
    if isinstance(record.behaviour, NotAsked):
        sections.append(Section("Behaviour", lines=(f"not asked: {record.behaviour.not_asked}",)))
    elif record.behaviour is not None:
        sections += eval_sections(record.behaviour)
    sections.append(reproduce(command, record.abl_mlx, record.hashes, seconds=record.seconds))
    lead = () if record.base is None else (f"Against the base {record.base}",)
    return html(Page("Audited with abl-mlx", record.source, lead, tuple(tiles), tuple(sections)))


_HEAD = ("writer", "type", "energy", "of mean", "relative difference", "strength", "resemblance")


def _cells(one: AuditedWriter) -> tuple[str, ...]:
    figures = one.energy, one.of_mean, one.relative_difference, one.strength, one.resemblance
    return (
        one.type or "",
        *("" if value is None else charts.number(float(value)) for value in figures),
    )
