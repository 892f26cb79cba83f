"""`abl-mlx audit`: decides whether a direction was removed from a model's weights.

Without a base model the decision depends on the spectrum of the residual writers
(`abl_mlx.audit_weights.spectrum`), with a base model on the differences
(`abl_mlx.audit_weights.differences`). The verdicts are "edited", "not edited" and "cannot tell",
each with its evidence. docs/audit.md has the calibration, and what the audit cannot find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx import __version__
from abl_mlx.audit_weights import differences, partial
from abl_mlx.audit_weights import verdict as verdicts
from abl_mlx.audit_weights.verdict import CANNOT_TELL, EDITED, NOT_EDITED
from abl_mlx.commands.same_everywhere import check_same
from abl_mlx.directions import direction_file
from abl_mlx.inputs.sources import Source
from abl_mlx.outputs import stream_weights
from abl_mlx.outputs.mentions import mentions
from abl_mlx.outputs.model_file import ModelFile, find_model
from abl_mlx.outputs.remote_file import RemoteFile, find_in_parts, read_of
from abl_mlx.outputs.staging import check_report
from abl_mlx.records.evaluations import EvalRecord
from abl_mlx.records.looks import AuditRecord, Mention, NotAsked, NotAudited, Weights
from abl_mlx.reports import read_tables
from abl_mlx.reports.page import write
from abl_mlx.reports.page_audit import audit_page
from abl_mlx.support import flags
from abl_mlx.support.arrays import numpy_of
from abl_mlx.support.clock import Clock
from convert.base.atomic import check_new
from convert.base.errors import UserError
from convert.base.suffixes import ends_in
from convert.tokenizers.chat_template import TemplateError


def audit(
    text: str,
    *,
    base: str | None = None,
    direction: Path | None = None,
    output: Path | None = None,
    ask: bool = False,
    report: Path | None = None,
) -> AuditRecord:
    """Judge a model's weights.

    Args:
        text: the model as the user typed it.
        base: the base model, if given, as the user typed it.
        direction: a direction file to compare with the recovered direction.
        output: the file for the recovered direction, a new .safetensors.
        ask: whether to run the model and count its refusals.
        report: the file for a report.

    Raises:
        UserError: when a model cannot be read.
    """
    clock = Clock()
    _check_places(output, report)
    with ExitStack() as opened:
        model = opened.enter_context(find_model(text) if ask else find_in_parts(text))
        check_same(clock, None, model)
        source = model.source
        given = None if direction is None else _given(direction)
        with clock.step("read what the files say"):
            label, said = model.label(), mentions({"name": source.title, **model.said()})
        before = None if base is None else opened.enter_context(find_in_parts(base))
        weights, recovered = _judged(model, before, clock)
        if given is not None:
            cosine = _cosine(given, recovered, direction)
            nulls = weights.nulls | ({"direction_cosine"} if cosine is None else set())
            weights = replace(weights, direction_cosine=cosine, nulls=frozenset(nulls))
        verdict, evidence = _by_its_own_account(weights, label, said)
        with clock.step("hash the files"):
            hashes = model.hashes()
        parts_read = read_of([model, *([] if before is None else [before])])
    behaviour = _asked(text) if ask else None
    if output is not None:
        _keep(output, recovered, source, weights)
    record = AuditRecord(
        abl_mlx=__version__,
        source=source.name,
        base=base,
        verdict=verdict,
        evidence=evidence,
        layers=weights.layers,
        direction_cosine=weights.direction_cosine,
        weights=weights,
        label=label,
        mentions=said,
        hashes=hashes,
        behaviour=behaviour,
        output=None if output is None else str(output),
        parts_read=parts_read,
        seconds=clock.seconds,
    )
    if report is not None:
        file = None if direction is None else str(direction)
        _write_page(report, record, text, {"base": base, "direction": file, "ask": ask})
    return record


def _write_page(report: Path, record: AuditRecord, text: str, chosen: dict[str, Any]) -> None:
    """Write the page, with the command that makes it again.

    Args:
        report: its file.
        record: what it shows.
        text: the model as the user typed it.
        chosen: the flags that the user gave, and their values.
    """
    from abl_mlx.reports.replay import command_line

    defaults = {"base": None, "direction": None, "ask": False}
    write(report, audit_page(record, command_line(["audit", text], chosen, defaults)))


def _judged(model: ModelFile, base: ModelFile | None, clock: Clock) -> partial.Judged:
    """The findings from the weights, and the directions that were found."""
    in_parts = isinstance(model, RemoteFile) or isinstance(base, RemoteFile)
    try:
        if base is None:
            with clock.step("look for a direction that all writers lack"):
                return (partial if in_parts else verdicts).alone(model.stream_weights())
        with clock.step("compare with the base"):
            return (partial.with_base if in_parts else differences.compare)(model, base)
    except stream_weights.Unreachable as error:
        return Weights(verdict=CANNOT_TELL, evidence=[str(error)], layers=[]), None


def _check_places(output: Path | None, report: Path | None) -> None:
    """Refuse files for the direction and the report that exist or cannot be written."""
    if output is not None:
        if not ends_in(output, ".safetensors"):
            raise UserError(f"{output}: the name of a direction file ends in .safetensors.")
        check_new(output)
    if report is not None:
        check_report(report)


def _asked(text: str) -> EvalRecord | NotAsked:
    """The record of `abl-mlx eval`; or the reason, in one sentence, why the model cannot be run."""
    from abl_mlx.commands import evaluate_model
    from abl_mlx.eval_choices import EvalOptions

    try:
        return evaluate_model.evaluate_model(text, EvalOptions())
    except TemplateError as error:
        reason = flags.said(error).partition(": ")[0]
        mend = f"`abl-mlx eval {text} --template FILE` asks it in another one"
        return NotAsked(not_asked=f"{reason}: {mend}.")
    except UserError as error:
        return NotAsked(not_asked=flags.said(error))


def _given(path: Path) -> np.ndarray:
    found = numpy_of(direction_file.read(path).selected).astype(float)
    return np.linalg.qr(found.T)[0]


def _cosine(given: np.ndarray, recovered: np.ndarray | None, path: Path | None) -> float | None:
    """|cos| between the given direction and the recovered span (of several: the largest)."""
    if recovered is None:
        return None
    if len(given) != recovered.shape[1]:
        raise UserError(
            f"{path} has {len(given)} dimensions, but the model has {recovered.shape[1]}: it was "
            "measured on another model."
        )
    return float(np.linalg.svd(recovered @ given, compute_uv=False)[0])


# What the evidence says of edits of other places than writers.
_PLACES = {"readers": ", weights that read the stream", "routers": ", biases of routers"}


def _by_its_own_account(
    weights: Weights, label: Mapping[str, Any] | None, mentions: Sequence[Mention]
) -> tuple[str, list[str]]:
    """The verdict and the evidence, with what the files say about an edit.

    A label makes the verdict "edited"; a word for edits in a name or card makes "not edited"
    uncertain.
    """
    verdict, evidence = weights.verdict, list(weights.evidence)
    if label is not None:
        what = f"strength {label.get('strength')}, layers {label.get('layers')}"
        what += _PLACES.get(str(label.get("edit")), "")
        evidence.append(f"its metadata say that abl-mlx edited it ({what})")
        verdict = EDITED
    for one in mentions:
        evidence.append(f"“{one.text}” stands in its {one.place}")
        if verdict == NOT_EDITED:
            verdict = CANNOT_TELL
    return verdict, evidence


def _keep(path: Path, recovered: np.ndarray | None, source: Source, weights: Weights) -> None:
    if recovered is None:
        raise UserError(f"no direction was recovered from {source.name}, so {path} is not written.")
    metadata = {
        "summary": {"method": "audit", "layer": None, "position": None},
        "method": "audit",
        "model": source.public_name,
        "verdict": weights.verdict,
    }
    direction_file.save(
        path,
        direction_file.DirectionFile(mx.array(recovered.astype(np.float32)), metadata=metadata),
    )


# --- the command -------------------------------------------------------------------------------


def table(record: AuditRecord) -> str:
    """The record as a table."""
    base = f" against {record.base}" if record.base is not None else ""
    lines = [f"{record.source}{base}: {record.verdict}"]
    lines += [f"  - {one}" for one in record.evidence]
    cosine = record.direction_cosine
    if cosine is not None:
        lines.append(f"  |cos| of the recovered direction with the given one: {cosine:.3f}")
    if record.behaviour is not None:
        lines += ["", _behaviour(record.behaviour)]
    lines += read_tables.lines(record.parts_read)
    lines += ["", "  files"]
    lines += [f"    {sha256}  {name}" for name, sha256 in record.hashes.items()]
    return "\n".join(lines)


def _behaviour(found: EvalRecord | NotAsked) -> str:
    if isinstance(found, NotAsked):
        return f"  not asked: {found.not_asked}"
    from abl_mlx.reports import eval_tables

    return eval_tables.table(found)


def fails(record: AuditRecord | NotAudited, verdicts: Sequence[str]) -> bool:
    """Whether the verdict is among those of ``--fail-on``, in the command line's spelling."""
    return isinstance(record, AuditRecord) and record.verdict.replace(" ", "-") in verdicts
