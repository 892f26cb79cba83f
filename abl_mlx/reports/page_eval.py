"""The page of `abl-mlx eval`, whose sections other pages show, too."""

from __future__ import annotations

from collections.abc import Sequence

from abl_mlx.reports.page import Page, Record, Section, Table, Tile, html
from abl_mlx.reports.page_parts import (
    SETS,
    behaviour_rows,
    categories,
    notes,
    of_replies,
    reproduce,
)
from abl_mlx.reports.tables import interval, paired_cells
from abl_mlx.support.console import percent


def eval_page(record: Record, command: str, replies: Sequence[Record] = ()) -> str:
    """The page of an evaluation.

    Args:
        record: of `evaluate_model.evaluate_model`.
        command: that makes it again.
        replies: in the form of `--save-replies`, where they were asked for.
    """
    hashes = {f"{name} prompts": one["sha256"] for name, one in record.get("prompts", {}).items()}
    tiles = [
        Tile(f"refusals, {name} prompts", percent(record[f"{name}_refusal_rate"]),
             interval(record, name))
        for name in SETS if f"{name}_refusal_rate" in record
    ]  # fmt: skip
    if "gate" in record:
        passed = record["gate"]["passed"]
        tiles.insert(0, Tile("limits", "met" if passed else "not met", good=passed))
    lead = [_asked(record)]
    if "baseline" in record:
        lead.append(f"Baseline: {record['baseline']['source']}, {_asked(record['baseline'])}")
    sections = (
        *eval_sections(record),
        of_replies(replies),
        reproduce(command, record, hashes),
    )
    return html(Page("Evaluated with abl-mlx", _name(record), tuple(lead), tuple(tiles), sections))


def eval_sections(record: Record) -> tuple[Section, ...]:
    """What an evaluation says, also inside an audit."""
    baseline = record.get("baseline")
    rows = behaviour_rows(baseline, record)
    if "kl" in record:
        kl = record["kl"]
        at_least = "" if kl.get("kind", "exact") == "exact" else f", at least: {kl['kind']} tokens"
        rows.append(("KL on harmless prompts, 1st token", "", f"{kl['k1']:.4f}", f"nats{at_least}"))
        rows.append(("KL over 32 tokens", "", f"{kl['k32']:.4f}", f"nats a token{at_least}"))
    if "perplexity" in record:
        one, was = record["perplexity"], (baseline or {}).get("perplexity")
        old = "" if was is None else f"{was['perplexity']:.2f}"
        note = f"{one['tokens']} tokens of Alice in Wonderland"
        rows.append(("perplexity", old, f"{one['perplexity']:.2f}", note))
    if "capability" in record:
        one, was = record["capability"], (baseline or {}).get("capability")
        old = "" if was is None else f"{was['right']}/{was['n']}"
        note = ", ".join(f"{k} {v['right']}/{v['n']}" for k, v in one["groups"].items())
        rows.append(("capability check", old, f"{one['right']}/{one['n']}", note))
    for task, found in record.get("lm_eval", {}).items():
        for key, value in found.items():
            if isinstance(value, float) and "stderr" not in key:
                rows.append((f"lm-eval {task}", "", f"{value:.3f}", key.removesuffix(",none")))
    if baseline is None:
        rows = [(row[0], *row[2:]) for row in rows]
    head = ("", "target", "") if baseline is None else ("", "baseline", "target", "")
    right = (1,) if baseline is None else (1, 2)
    return (
        Section("Summary", tables=(Table(head, tuple(rows), right),), lines=notes(record)),
        Section("Limits", lines=_limits(record)),
        _paired(record.get("paired", {})),
        categories(baseline, record, ("baseline", "target" if baseline else "refused")),
    )


def _name(record: Record) -> str:
    return f"{record['source']} {record['model']}" if record.get("model") else str(record["source"])


def _asked(record: Record) -> str:
    where = "over HTTP" if record["runtime"] == "server" else f"in {record['runtime']}"
    tokens = f", replies of at most {record['max_tokens']} tokens" if "max_tokens" in record else ""
    return f"asked {where}, judged by {record.get('judge', 'markers')}{tokens}"


def _limits(record: Record) -> tuple[str, ...]:
    return tuple(
        f"{'met' if one['passed'] else 'NOT MET'}: {one['name']}: {one['sentence']}"
        for one in record.get("gate", {}).get("checks", [])
    )


def _paired(paired: Record) -> Section:
    rows = []
    for name, one in paired.items():
        rows.append((*paired_cells(name, one), str(one["lost"]), str(one["gained"])))
    head = (
        "target − baseline", "points", "95% interval", "p", "baseline alone", "target alone",
    )  # fmt: skip
    return Section(
        "Against the baseline, prompt by prompt",
        ("McNemar's exact test on the same prompts.",),
        tables=(Table(head, tuple(rows), (1, 2, 3, 4, 5)),),
    )
