"""`abl-mlx audit --list`: the verdicts on many models, as a table, as JSON and as CSV."""

from __future__ import annotations

import csv
from pathlib import Path

from abl_mlx import __version__
from abl_mlx.audit_weights import spectrum
from abl_mlx.commands.audit import audit
from abl_mlx.records.looks import AuditListRecord, AuditRecord, NotAudited
from abl_mlx.reports import columns
from abl_mlx.support.console import percent, say
from abl_mlx.support.flags import said
from convert.base import text_file
from convert.base.atomic import check_new, new_file
from convert.base.errors import UserError

_COLUMNS = ("model", "verdict", "strength", "layers", "bytes read", "share", "evidence")


def audit_list(
    listed: Path, *, table: Path | None, base: str | None, direction: Path | None
) -> AuditListRecord:
    """Judge every model that a file names; an error of one does not end the others.

    Args:
        listed: the file, with one model a line; empty lines and those that begin with # do not
            count.
        table: the CSV file.
        base, direction: as for `audit`, for all models.

    Raises:
        UserError: when the file cannot be read or names no model, or the table exists already.
    """
    if table is not None:
        check_new(table)
    lines = (line.strip() for line in text_file.read(listed).splitlines())
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise UserError(f"{listed} names no model: write one a line, such as OWNER/REPO.")
    audits: list[AuditRecord | NotAudited] = []
    for number, name in enumerate(names, 1):
        say(f"{name} ({number} of {len(names)})")
        try:
            audits.append(audit(name, base=base, direction=direction))
        except UserError as error:
            audits.append(NotAudited(source=name, error=said(error)))
    if table is not None:
        with new_file(table) as path, path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(_COLUMNS)
            writer.writerows(_row(one) for one in audits)
    return AuditListRecord(
        abl_mlx=__version__,
        source=str(listed),
        audits=audits,
        output=None if table is None else str(table),
    )


def failed(record: AuditListRecord) -> bool:
    """Whether a model could not be judged."""
    return any(isinstance(one, NotAudited) for one in record.audits)


def table(record: AuditListRecord) -> str:
    """The record as a table."""
    rows = [_COLUMNS, *(_row(one) for one in record.audits)]
    return "\n".join(columns.lines([row[:-1] for row in rows], {2, 4, 5})) + "".join(
        f"\n  {one.source}: {one.error}" for one in record.audits if isinstance(one, NotAudited)
    )


def _row(one: AuditRecord | NotAudited) -> tuple[str, ...]:
    if isinstance(one, NotAudited):
        return (one.source, "error", "", "", "", "", one.error)
    strength, parts = one.weights.strength, one.parts_read or []
    return (
        one.source,
        one.verdict,
        "" if strength is None else f"{strength:.2f}",
        spectrum.spans(one.layers),
        str(sum(part.read for part in parts)) if parts else "",
        percent(sum(part.share for part in parts[:1])) if parts else "",
        "; ".join(one.evidence),
    )
