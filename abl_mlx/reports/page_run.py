"""The page of `abl-mlx run`: what is on it, where it goes, and what of the replies it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abl_mlx.behaviour import evaluate, reply_notes
from abl_mlx.choices import Replying, RunOptions
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.outputs import staging
from abl_mlx.outputs.provenance import without_home
from abl_mlx.reports import figures
from abl_mlx.reports.page import Page, Record, Section, Table, Tile, html, write
from abl_mlx.reports.page_parts import (
    SETS,
    behaviour_rows,
    categories,
    hash_rows,
    of_replies,
    reproduce,
)
from abl_mlx.reports.replay import command_line
from abl_mlx.reports.tables import interval, summary_line
from abl_mlx.support.console import percent


def write_run_page(
    record: Mapping[str, Any],
    paths: Sequence[Path],
    replying: Replying,
    replies: Mapping[str, evaluate.Behaviour],
    sets: PromptSets,
) -> None:
    """Write the page of a run into or beside each output, or where ``--report`` says.

    Args:
        replies: who -> what they did; shown with ``--save-completions`` alone.
    """
    lines = evaluate.reply_lines(replies, sets) if replying.save_completions else []
    text = run_page(without_home(record), lines)
    places = [staging.report_place(path) for path in paths]
    for place in places if replying.report is None else [replying.report]:
        write(place, text)


def staged_run_page(
    record: Mapping[str, Any],
    staged: Sequence[Path],
    replying: Replying,
    replies: Mapping[str, evaluate.Behaviour],
    sets: PromptSets,
) -> bool:
    """The same while the outputs are staged, so that they get their names with their pages.

    Returns:
        False where the page has a place of its own, or could not be written: it is then written,
        or what is wrong with it is told, when the outputs have their names. A model that took an
        hour is not lost with its page.
    """
    if replying.report is not None:
        return False
    try:
        write_run_page(record, staged, replying, replies, sets)
    except Exception:  # told by the second attempt
        return False
    return True


def run_page(record: Record, replies: Sequence[Record] = ()) -> str:
    """The page of a run.

    Args:
        record: of `run.run`.
        replies: lines of `evaluate.reply_lines`, where they were asked for.
    """

    before, evaluations = record["before"], record["evaluations"]
    first = evaluations[0]
    scores, cloud = figures.layer_charts(record), figures.cloud_chart(record)
    options = record["options"]
    induced = ("--induce",) if record.get("induced") else ()
    command = command_line(
        ("run", record.get("measured_on", record["source"]), *induced),
        options,
        RunOptions().record(),
        record["outputs"],
    )
    summary = Section(
        "Before and after",
        tables=tuple(_output_table(record, one) for one in evaluations),
        lines=(
            *(f"{one['output']}: {one['note']}" for one in evaluations if one.get("note")),
            *reply_notes.sentences(record.get("before") or {}, "before"),
            *(
                f"{one['output']}: {note}"
                for one in evaluations
                for note in reply_notes.sentences(one["after"])
            ),
            *([record["note"]] if record.get("note") else []),
        ),
    )
    sections = [
        summary,
        Section("By layer", (_layers_text(record),), charts=tuple(scores)),
        Section(
            "The two clouds",
            (
                "Held-out prompts of both sets, as the model holds them. Across: how much of the "
                "direction; up: along which they differ most besides.",
            ),
            charts=() if cloud is None else (cloud,),
        ),
        *(
            categories(before, one["after"], ("before", _named("after", one, evaluations)))
            for one in evaluations
        ),
        *(_leak_section(one, len(evaluations) > 1) for one in evaluations),
        _trials(record.get("trials", [])),
        of_replies(replies),
        reproduce(command, record, hash_rows(record.get("hashes", {}))),
    ]
    did = "Induced refusals in" if record.get("induced") else "Edited"
    return html(
        Page(
            f"{did} with abl-mlx",
            record["source"],
            (summary_line(record["direction"]),),
            tuple(_run_tiles(record, before, first)),
            tuple(sections),
        )
    )


def _named(word: str, one: Record, evaluations: Sequence[Record]) -> str:
    return word if len(evaluations) == 1 else f"{word}: {one['output']}"


def _run_tiles(record: Record, before: Record, first: Record) -> list[Tile]:
    after, tiles = first["after"], []
    for name in SETS[:2]:
        key = f"{name}_refusal_rate"
        value = f"{percent(before[key])} → {percent(after[key])}"
        tiles.append(Tile(f"refusals, {name} prompts", value, interval(after, name)))
    if "kl" in first:
        note = "nats, first reply token, harmless prompts; 0 = same"
        tiles.append(Tile("KL", f"{first['kl']['k1']:.4f}", note))
    if "leak" in first:
        limit = record["options"].get("max_leak")
        total = first["leak"]["total"]
        note = "share of the edit lost in writing"
        good = None if limit is None else total <= limit
        tiles.append(Tile("leak", f"{total:.2g}", note, good))
    return tiles


def _output_table(record: Record, one: Record) -> Table:
    rows = behaviour_rows(record["before"], one["after"])
    if "kl" in one:
        rows.append(
            ("KL on harmless prompts, 1st token", "", f"{one['kl']['k1']:.4f}", "nats; 0 = same")
        )
        rows.append(("KL over 32 tokens", "", f"{one['kl']['k32']:.4f}", "nats a token"))
    if "component" in one and "component" in record:
        rows.append(
            (
                "component |r·h|/|h|, largest",
                f"{record['component']['before']:.4f}",
                f"{one['component']:.2g}",
                "over layers and prompts",
            )
        )
    if "leak" in one:
        note = "share of the edit lost in writing"
        rows.append(("leak", "", f"{one['leak']['total']:.2g}", note))
    about = [one.get("format", ""), *one.get("types", []), f"asked in {one['runtime']}"]
    title = f"{one['output']} ({', '.join(filter(None, about))})"
    return Table((title, "before", "after", ""), tuple(rows), (1, 2))


def _layers_text(record: Record) -> str:
    direction = record["direction"]
    text = f"Chosen: {summary_line(direction)}"
    if "chosen_by" in direction:
        text += f" ({direction['chosen_by']})"
    scores = direction.get("refusal_score")
    if scores:
        text += (
            f". Refusal scores of the unedited model: harmful {scores['harmful']:+.2f}, harmless "
            f"{scores['harmless']:+.2f}; harmful with the direction removed "
            f"{scores['harmful_ablated']:+.2f}"
        )
    return f"{text}. Layers count from 0."


def _leak_section(one: Record, several: bool) -> Section:
    tensors = one.get("leak", {}).get("tensors", {})
    rows = []
    for name, each in tensors.items():
        changed = each.get("bytes_changed")
        rows.append(
            (
                name,
                each.get("type", ""),
                "" if changed is None else f"{changed:,}",
                f"{each['weight_error']:.4f}" if "weight_error" in each else "",
                f"{each['leak']:.5f}" if "leak" in each else "",
            )
        )
    head = ("tensor", "type", "bytes changed", "weight error", "leak")
    used = [k for k in range(len(head)) if k == 0 or any(row[k] for row in rows)]
    table = Table(
        tuple(head[k] for k in used),
        tuple(tuple(row[k] for k in used) for row in rows),
        tuple(place for place, k in enumerate(used) if k >= 2),
        f"All {len(rows)} tensors",
    )
    title = "Leak by tensor" + (f": {one['output']}" if several else "")
    total = one.get("leak", {}).get("total")
    text = "Read back from the written bytes. " + (
        ""
        if total is None
        else f"In all {total:.2g}, at most {one['leak']['max']:.2g} in a tensor."
    )
    return Section(
        title, (text,), charts=tuple(figures.leak_charts(tensors)), tables=(table,) if rows else ()
    )


def _trials(trials: Sequence[Record]) -> Section:
    rows = tuple(
        (
            summary_line({"method": "edit", **one}),
            f"{one['refusal']:+.2f}" if "refusal" in one else "",
            percent(one["refused"]) if "refused" in one else "",
            f"{one['kl']:.4f}" if "kl" in one else "",
            str(one.get("dropped", "")),
        )
        for one in trials
    )
    head = ("edit", "refusal score", "refused", "KL", "dropped because")
    return Section(
        "What else was tried",
        ("By the first reply tokens to validation prompts.",),
        tables=(Table(head, rows, (1, 2, 3), f"{len(rows)} edits"),),
    )
