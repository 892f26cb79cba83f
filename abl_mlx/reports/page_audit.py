"""The page of `abl-mlx audit`."""

from __future__ import annotations

from typing import Any

from abl_mlx.reports import charts, figures
from abl_mlx.reports.page import Page, Record, Section, Table, Tile, html
from abl_mlx.reports.page_eval import eval_sections
from abl_mlx.reports.page_parts import pairs, reproduce


def audit_page(record: Record, command: str) -> str:
    """The page of an audit.

    Args:
        record: of `audit.audit`.
        command: that makes it again.
    """
    weights, behaviour = record["weights"], record.get("behaviour") or {}
    verdict = record["verdict"]
    good = {"edited": False, "not edited": True}.get(verdict)
    tiles = [Tile("verdict", verdict, good=good)]
    if weights.get("strength") is not None:
        tiles.append(Tile("strength", f"about {weights['strength']:.2f}"))
    if record.get("layers"):
        tiles.append(Tile("layers", ", ".join(map(str, record["layers"]))))
    if record.get("direction_cosine") is not None:
        note = "of the recovered direction with the given one"
        tiles.append(Tile("|cos|", f"{record['direction_cosine']:.3f}", note))
    rows = tuple(
        (name, *(_cell(one.get(key)) for key in _WRITER_KEYS))
        for name, one in weights.get("writers", {}).items()
    )
    used = [0, *(k for k in range(1, len(_WRITER_KEYS) + 1) if any(row[k] for row in rows))]
    head = ("writer", *(key.replace("_", " ") for key in _WRITER_KEYS))
    table = Table(
        tuple(head[k] for k in used),
        tuple(tuple(row[k] for k in used) for row in rows),
        tuple(range(1, len(used))),
        f"All {len(rows)} residual writers",
    )
    says = [f"“{one['text']}” in its {one['place']}" for one in record.get("mentions", [])]
    label = record.get("label") or {}
    sections: list[Section] = [
        Section("Evidence", lines=tuple(record["evidence"])),
        Section(
            "The residual writers",
            charts=tuple(figures.audit_charts(weights)),
            tables=(table,) if rows else (),
        ),
        Section(
            "What the files say of themselves",
            lines=tuple(says),
            tables=(pairs("label", label, ("key", "value"), "What abl-mlx wrote"),)
            if label
            else (),
        ),
    ]
    if "not_asked" in behaviour:
        sections.append(Section("Behaviour", lines=(f"not asked: {behaviour['not_asked']}",)))
    elif behaviour:
        sections += eval_sections(behaviour)
    sections.append(reproduce(command, record, record.get("hashes", {})))
    lead = (f"Against the base {record['base']}",) if "base" in record else ()
    return html(Page("Audited with abl-mlx", record["source"], lead, tuple(tiles), tuple(sections)))


_WRITER_KEYS = ("type", "energy", "of_mean", "relative_difference", "strength", "resemblance")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return charts.number(float(value)) if isinstance(value, int | float) else str(value)
