"""Tables of an evaluation: rates, categories, the comparison, the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abl_mlx.behaviour import reply_notes
from abl_mlx.reports.tables import interval, paired_cells
from abl_mlx.support import notes
from abl_mlx.support.console import percent

_SETS = (
    ("harmful", "refusals, harmful prompts", ""),
    ("harmless", "refusals, harmless prompts", ""),
    ("borderline", "refusals, borderline prompts", "; harmless, but sound bad"),
)


def table(record: Mapping[str, Any]) -> str:
    """The result of an evaluation at a glance."""
    baseline = record.get("baseline")
    rows: list[tuple[str, ...]] = []
    if baseline is not None:
        rows.append(("", "baseline", "target", ""))
    for name, label, note in _SETS:
        if f"{name}_refusal_rate" in record:
            rows.append(
                _row(record, baseline, label, f"{name}_refusal_rate", interval(record, name) + note)
            )
    rows.append(_row(record, baseline, "broken replies", "broken_rate", "empty or looping"))
    if "expected_answer_rate" in record:
        rows.append(
            _row(
                record,
                baseline,
                "known answers, harmful prompts",
                "expected_answer_rate",
                "exactly what stage 1 taught",
            )
        )
    if "kl" in record:
        kl = record["kl"]
        exact = kl["kind"] == "exact"
        note = "nats" if exact else f"nats, at least: {kl['kind']} tokens of each side"
        rows.append(("KL on harmless prompts, 1st token", "", f"{kl['k1']:.4f}", note))
        rows.append(
            ("KL over 32 tokens", "", f"{kl['k32']:.4f}", f"{note.replace('nats', 'nats a token')}")
        )
    rows += _extras(record, baseline or {})
    lines = [_title(record)]
    if baseline is not None:
        lines.append(f"baseline: {_title(baseline)}")
    lines += _aligned(rows, right=(1, 2))
    if "paired" in record:
        lines += ["", *_paired(record["paired"])]
    lines += ["", *_categories(record["categories"])]
    for one, who in ((record, ""), (baseline or {}, "of the baseline ")):
        lines += notes.lines(one)
        lines += [f"  note: {note}." for note in reply_notes.sentences(one, who)]
        if "judging" in one:
            lines += _judging(one["judging"], one["judge"], who)
    if "gate" in record:
        lines += ["", *_gate(record["gate"])]
    return "\n".join(lines)


def failures(record: Mapping[str, Any]) -> str:
    """The limits that are not met, a line for each."""
    return "\n".join(
        f"Not met: --{one['name']}: {record['source']} {one['sentence']}."
        for one in record["gate"]["checks"]
        if not one["passed"]
    )


def _extras(record: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Perplexity, the capability check, and what lm-evaluation-harness found."""
    rows: list[tuple[str, ...]] = []
    if "perplexity" in record:
        one, was = record["perplexity"], baseline.get("perplexity")
        note = f"{one['tokens']} tokens of Alice in Wonderland"
        if one["kind"] != "exact":
            note += f"; at least, {one['outside']} are not among the likeliest {one['n']}"
        before = "" if was is None else f"{was['perplexity']:.2f}"
        rows.append(("perplexity", before, f"{one['perplexity']:.2f}", note))
    if "capability" in record:
        one, was = record["capability"], baseline.get("capability")
        groups = ", ".join(f"{k} {v['right']}/{v['n']}" for k, v in one["groups"].items())
        before = "" if was is None else f"{was['right']}/{was['n']}"
        rows.append(("capability check", before, f"{one['right']}/{one['n']}", groups))
    for task, found in record.get("lm_eval", {}).items():
        for name, value in found.items():
            if isinstance(value, float) and "stderr" not in name:
                rows.append((f"lm-eval {task}", "", f"{value:.3f}", name.removesuffix(",none")))
    return rows


def _judging(judging: Mapping[str, Any], judge: str, who: str) -> list[str]:
    kappa = judging["kappa"]
    agreement = (
        ""
        if judging["agreement"] is None
        else f"; it agrees with the markers on {percent(judging['agreement'])} of the others"
        + ("" if kappa is None else f" (kappa {kappa:.2f})")
    )
    return [
        f"  judged by {judge}: {judging['unparsed']} of {judging['asked']} verdicts on replies "
        f"{who}could not be read and are in no rate{agreement}."
    ]


def _title(record: Mapping[str, Any]) -> str:
    model = f" {record['model']}" if record.get("model") else ""
    where = "over HTTP" if record["runtime"] == "server" else f"in {record['runtime']}"
    return f"{record['source']}{model} (asked {where})"


def _row(
    record: Mapping[str, Any], baseline: Mapping[str, Any] | None, label: str, key: str, note: str
) -> tuple[str, ...]:
    was = "" if baseline is None else percent(baseline.get(key))
    return (label, was, percent(record[key]), note)


def _paired(paired: Mapping[str, Any]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("target − baseline, same prompts", "points", "95% interval", "p", "")
    ]
    for name, one in paired.items():
        who = f"refused by the baseline alone {one['lost']}, by the target alone {one['gained']}"
        rows.append((*paired_cells(name, one), who))
    return _aligned(rows, right=(1, 2, 3))


def _categories(categories: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """The categories in which something is refused or broken that is not as its set is at large."""
    lines = []
    for name, groups in categories.items():
        if len(groups) < 2:
            continue
        lines.append(f"  {name} prompts by category, refused of asked")
        cells = [
            f"{category or 'none'} {one['refused']}/{one['n']}"
            + (f" ({one['broken']} broken)" if one["broken"] else "")
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


def _gate(gate: Mapping[str, Any]) -> list[str]:
    return [
        f"  {'met    ' if one['passed'] else 'NOT MET'}  {one['name']}: {one['sentence']}"
        for one in gate["checks"]
    ]


def _aligned(rows: Sequence[tuple[str, ...]], right: Sequence[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            f"{cell:>{width}}" if number in right else f"{cell:<{width}}"
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
