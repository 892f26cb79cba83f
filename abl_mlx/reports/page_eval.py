"""The page of `abl-mlx eval`, whose sections are also on other pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abl_mlx.behaviour.kept_refusals import words
from abl_mlx.records.conditions import SteeredBy
from abl_mlx.records.evaluations import Asked, Comparison, EvalRecord, Gate
from abl_mlx.reports import condition_tables, sweep_tables
from abl_mlx.reports.eval_tables import measurements
from abl_mlx.reports.page import Page, Section, Table, Tile, html
from abl_mlx.reports.page_parts import categories, notes, of_replies, reproduce
from abl_mlx.reports.tables import asked_in, behaviour_rows, interval, paired_cells
from abl_mlx.support.console import percent


def eval_page(record: EvalRecord, command: str, replies: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of an evaluation.

    Args:
        record: the record of `evaluate_model.evaluate_model`.
        command: the command line that makes it again.
        replies: the replies in the form of `--save-replies`, if they are to be shown.
    """
    hashes = {f"{name} prompts": one.sha256 for name, one in record.prompts.items()}
    tiles = [
        Tile(f"refusals, {words(name)} prompts", percent(rate.share), interval(rate))
        for name, rate in record.rates.items()
    ]
    if record.gate is not None:
        passed = record.gate.passed
        tiles.insert(0, Tile("limits", "met" if passed else "not met", good=passed))
    lead = [_asked(record)]
    if record.baseline is not None:
        lead.append(f"Baseline: {record.baseline.source}, {_asked(record.baseline)}")
    sections = (
        *eval_sections(record),
        of_replies(replies),
        reproduce(command, record.abl_mlx, hashes, seconds=record.seconds),
    )
    return html(Page("Evaluated with abl-mlx", _name(record), tuple(lead), tuple(tiles), sections))


def eval_sections(record: EvalRecord) -> tuple[Section, ...]:
    """The sections about an evaluation, which an audit's page has as well."""
    baseline = record.baseline
    rows: list[tuple[str, ...]] = [*behaviour_rows(baseline, record)]
    if record.kl is not None:
        kl = record.kl
        at_least = "" if kl.kind in (None, "exact") else f", at least: {kl.kind} tokens"
        rows.append(("KL on harmless prompts, 1st token", "", f"{kl.k1:.4f}", f"nats{at_least}"))
        rows.append(("KL over 32 tokens", "", f"{kl.k32:.4f}", f"nats a token{at_least}"))
    rows += measurements(record)
    if baseline is None:
        rows = [(row[0], *row[2:]) for row in rows]
    head = ("", "target", "") if baseline is None else ("", "baseline", "target", "")
    right = (1,) if baseline is None else (1, 2)
    return (
        Section("Summary", tables=(Table(head, tuple(rows), right),), lines=notes(record)),
        *_steered(record.steered),
        Section("Limits", lines=_limits(record.gate)),
        _paired(record.paired or {}),
        *_sweep(record),
        categories(baseline, record, ("baseline", "target" if baseline else "refused")),
    )


def _steered(by: SteeredBy | None) -> list[Section]:
    if by is None:
        return []
    asked = condition_tables.asked_line(by)
    condition = condition_tables.condition_lines(by.condition)
    rows = tuple((name, str(one.n), str(one.met)) for name, one in (by.met or {}).items())
    table = Table(("prompts", "asked", "edited"), rows, (1, 2))
    return [
        Section(
            "Edit at runtime",
            (f"{asked[0].upper()}{asked[1:]}.",),
            tables=(table,) if rows else (),
            lines=tuple(line.strip() for line in condition),
        )
    ]


def _name(record: Asked) -> str:
    return f"{record.source} {record.model}" if record.model else record.source


def _asked(record: Asked) -> str:
    tokens = f"replies of at most {record.max_tokens} tokens"
    if record.settled is not None and record.settled.tokens < record.max_tokens:
        tokens += f" (after the first ones {record.settled.tokens}, as far as verdicts changed)"
    if record.thought_tokens is not None:
        tokens += f", and {record.thought_tokens} more where the model thinks"
    return f"{asked_in(record.runtime, record.thinking)}, judged by {record.judge}, {tokens}"


def _limits(gate: Gate | None) -> tuple[str, ...]:
    checks = [] if gate is None else gate.checks
    return tuple(
        f"{'met' if one.passed else 'NOT MET'}: {one.name}: {one.sentence}" for one in checks
    )


def _sweep(record: EvalRecord) -> tuple[Section, ...]:
    if record.length_sweep is None:
        return ()
    head, rows = sweep_tables.head(record.length_sweep), sweep_tables.rows(record, record.baseline)
    table = Table(head, tuple(rows), tuple(range(1, len(head))))
    lines = tuple(sweep_tables.sentences(record, record.baseline))
    return (Section("By how much of a reply is read", tables=(table,), lines=lines),)


def _paired(paired: Mapping[str, Comparison]) -> Section:
    rows = []
    for name, one in paired.items():
        rows.append((*paired_cells(name, one), str(one.lost), str(one.gained)))
    head = (
        "target − baseline", "points", "95% interval", "p", "baseline alone", "target alone",
    )  # fmt: skip
    return Section(
        "Against the baseline, prompt by prompt",
        ("McNemar's exact test on the same prompts.",),
        tables=(Table(head, tuple(rows), (1, 2, 3, 4, 5)),),
    )
