"""Tables of an evaluation: rates, categories, the comparison, the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from abl_mlx.behaviour import reply_notes
from abl_mlx.behaviour.kept_refusals import words
from abl_mlx.records.evaluations import (
    Asked,
    Category,
    Comparison,
    Divergence,
    EvalRecord,
    Gate,
    Judged,
)
from abl_mlx.reports import columns, condition_tables, scorer_tables, sweep_tables
from abl_mlx.reports.tables import asked_in, behaviour_rows, paired_cells
from abl_mlx.support import notes
from abl_mlx.support.console import percent

#: What is added to the row of a set's refusals.
_MORE = {"borderline": "; harmless, but sound bad"}


def table(record: EvalRecord) -> str:
    """The main results of an evaluation as a table."""
    baseline = record.baseline
    rows: list[tuple[str, ...]] = []
    if baseline is not None:
        rows.append(("", "baseline", "target", ""))
    rows += [
        *behaviour_rows(baseline, record, _MORE),
        *_divergence(record.kl),
        *measurements(record),
    ]
    lines = [_title(record), *condition_tables.steered_lines(record.steered)]
    if baseline is not None:
        lines.append(f"baseline: {_title(baseline)}")
    lines += columns.lines(rows, right=(1, 2))
    if record.paired is not None:
        lines += ["", *_paired(record.paired)]
    if record.length_sweep is not None:
        lines += ["", *_sweep(record)]
    lines += ["", *_categories(record.categories)]
    asked: list[tuple[Asked, str]] = [(record, "")]
    asked += [] if baseline is None else [(baseline, "of the baseline ")]
    for one, who in asked:
        lines += notes.lines(one.note)
        lines += [f"  note: {note}." for note in reply_notes.sentences(one, who)]
        if one.judging is not None:
            lines += _judging(one.judging, one.judge, who)
    if record.gate is not None:
        lines += ["", *_gate(record.gate)]
    return "\n".join(lines)


def failures(record: EvalRecord) -> str:
    """A line for each limit that is not met."""
    return "\n".join(
        f"Not met: --{one.name}: {record.source} {one.sentence}."
        for one in ([] if record.gate is None else record.gate.checks)
        if not one.passed
    )


def _divergence(kl: Divergence | None) -> list[tuple[str, ...]]:
    if kl is None:
        return []
    more = "" if kl.kind == "exact" else f", at least: {kl.kind} tokens of each side"
    return [
        ("KL on harmless prompts, 1st token", "", f"{kl.k1:.4f}", f"nats{more}"),
        ("KL over 32 tokens", "", f"{kl.k32:.4f}", f"nats a token{more}"),
    ]


def measurements(record: EvalRecord) -> list[tuple[str, str, str, str]]:
    """Perplexity, small tasks, function calls, and lm-evaluation-harness.

    Returns:
        (what, the baseline's, the target's, note) each.
    """
    rows = []
    if record.perplexity is not None:
        one = record.perplexity
        note = f"{one.tokens} tokens of Alice in Wonderland"
        if one.kind != "exact":
            note += f"; at least, {one.outside} are not among the likeliest {one.n}"
        was = None if record.baseline is None else record.baseline.perplexity
        before = "" if was is None else f"{was.perplexity:.2f}"
        rows.append(("perplexity", before, f"{one.perplexity:.2f}", note))
    if record.capability is not None:
        found = record.capability
        groups = ", ".join(f"{name} {g.right}/{g.n}" for name, g in found.groups.items())
        had = None if record.baseline is None else record.baseline.capability
        before = "" if had is None else f"{had.right}/{had.n}"
        rows.append(("capability check", before, f"{found.right}/{found.n}", groups))
    rows += tool_calls(record)
    baseline = None if record.baseline is None else record.baseline.scorers
    rows += scorer_tables.rows(baseline, record.scorers)
    for task, results in (record.lm_eval or {}).items():
        for name, value in results.items():
            if isinstance(value, float) and "stderr" not in name:
                rows.append((f"lm-eval {task}", "", f"{value:.3f}", name.removesuffix(",none")))
    return rows


def tool_calls(record: EvalRecord) -> list[tuple[str, str, str, str]]:
    """The check of function calls, and the two models compared; rows as of `measurements`."""
    if record.tool_calls is None:
        return []
    found = record.tool_calls
    had = None if record.baseline is None else record.baseline.tool_calls
    before = "" if had is None else f"{had.right}/{had.n}"
    low, high = map(percent, found.interval)
    checks = ", ".join(f"{name} {one.right}/{one.n}" for name, one in found.checks.items())
    note = f"{low} to {high}; {checks}"
    rows = [("function calls", before, f"{found.right}/{found.n}", note)]
    if record.paired_tool_calls is not None:
        one = record.paired_tool_calls
        _, points, interval, p = paired_cells("", one)
        note = (
            f"points, {interval}, p {p}; right in the baseline alone {one.lost}, "
            f"in the target alone {one.gained}"
        )
        rows.append(("function calls, difference", "", points, note))
    return rows


def _judging(judging: Judged, judge: str, who: str) -> list[str]:
    agreement = (
        ""
        if judging.agreement is None
        else f"; it agrees with the markers on {percent(judging.agreement)} of the others"
        + ("" if judging.kappa is None else f" (kappa {judging.kappa:.2f})")
    )
    return [
        f"  judged by {judge}: {judging.unparsed} of {judging.asked} verdicts on replies "
        f"{who}could not be read and are in no rate{agreement}."
    ]


def _title(record: Asked) -> str:
    model = f" {record.model}" if record.model else ""
    return f"{record.source}{model} ({asked_in(record.runtime, record.thinking)})"


def _sweep(record: EvalRecord) -> list[str]:
    assert record.length_sweep is not None
    rows = [sweep_tables.head(record.length_sweep), *sweep_tables.rows(record, record.baseline)]
    notes = sweep_tables.sentences(record, record.baseline)
    return [*columns.lines(rows, right=range(1, len(rows[0]))), *(f"  {note}." for note in notes)]


def _paired(paired: Mapping[str, Comparison]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("target − baseline, same prompts", "points", "95% interval", "p", "")
    ]
    for name, one in paired.items():
        who = f"refused by the baseline alone {one.lost}, by the target alone {one.gained}"
        rows.append((*paired_cells(name, one), who))
    return columns.lines(rows, right=(1, 2, 3))


def _categories(categories: Mapping[str, Mapping[str, Category]]) -> list[str]:
    """Lines for the categories whose rates stand out from those of their set."""
    lines = []
    for name, groups in categories.items():
        if len(groups) < 2:
            continue
        lines.append(f"  {words(name)} prompts by category, refused of asked")
        cells = [
            f"{category or 'none'} {one.refused}/{one.n}"
            + (f" ({one.broken} broken)" if one.broken else "")
            for category, one in groups.items()
        ]
        lines += _wrapped(cells)
    return lines


def _wrapped(cells: Sequence[str], width: int = 92) -> list[str]:
    lines = [""]
    for cell in cells:
        part = f", {cell}" if lines[-1] else cell
        if len(lines[-1]) + len(part) > width:
            lines[-1] += ","
            lines.append(cell)
        else:
            lines[-1] += part
    return [f"    {line}" for line in lines]


def _gate(gate: Gate) -> list[str]:
    return [
        f"  {'met    ' if one.passed else 'NOT MET'}  {one.name}: {one.sentence}"
        for one in gate.checks
    ]
