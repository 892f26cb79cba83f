"""The page of `abl-mlx run`: its sections, and where it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abl_mlx.behaviour import evaluate, reply_notes
from abl_mlx.choices import Replying, RunOptions
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.outputs import staging
from abl_mlx.outputs.provenance import without_home
from abl_mlx.records.directions import Chosen, SaeFound, TriedEdit
from abl_mlx.records.edits import EvaluatedEdit, RunRecord
from abl_mlx.records.explained import Explained
from abl_mlx.reports import explain_tables, figures, sae_tables
from abl_mlx.reports.page import Page, Section, Table, Tile, html, write
from abl_mlx.reports.page_parts import (
    categories,
    hash_rows,
    of_replies,
    reproduce,
)
from abl_mlx.reports.replay import command_line
from abl_mlx.reports.tables import asked_in, interval, output_rows, summary_line
from abl_mlx.support.console import percent


def write_run_page(
    record: RunRecord,
    paths: Sequence[Path],
    replying: Replying,
    replies: Mapping[str, evaluate.Behaviour],
    sets: PromptSets,
) -> None:
    """Write the page of a run into or beside each output, or where ``--report`` says.

    Args:
        replies: who -> their behaviour; the replies are shown only with ``--save-completions``.
    """
    lines = evaluate.reply_lines(replies, sets) if replying.save_completions else []
    text = run_page(RunRecord.of(without_home(record)), lines)
    places = [staging.report_place(path) for path in paths]
    for place in places if replying.report is None else [replying.report]:
        write(place, text)


def staged_run_page(
    record: RunRecord,
    staged: Sequence[Path],
    replying: Replying,
    replies: Mapping[str, evaluate.Behaviour],
    sets: PromptSets,
) -> bool:
    """Write the page of a run beside staged outputs, which get their final names together.

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


def run_page(record: RunRecord, replies: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of a run.

    Args:
        record: the record of `run.run`.
        replies: lines of `evaluate.reply_lines`, if replies are to be shown.
    """
    before, evaluations = record.before, record.evaluations
    cloud = figures.cloud_chart(record.cloud)
    source = record.source if record.measured_on is None else record.measured_on
    command = command_line(
        ("run", source, *(("--induce",) if record.induced else ())),
        record.options.record(),
        RunOptions().record(),
        record.outputs,
    )
    sections = [
        _before_and_after(record),
        Section(
            "By layer",
            (_layers_text(record.direction),),
            charts=tuple(figures.layer_charts(record)),
        ),
        Section(
            "The two clouds",
            (
                "Held-out prompts of both sets, as the model holds them. Across: how much of the "
                "direction; up: along which they differ most besides.",
            ),
            charts=() if cloud is None else (cloud,),
        ),
        *(
            categories(before, one.after, ("before", _named("after", one, evaluations)))
            for one in evaluations
        ),
        *(_leak_section(one, len(evaluations) > 1) for one in evaluations),
        *_features(record.sae),
        *_explained(record.explained),
        _trials(record.trials or []),
        of_replies(replies),
        reproduce(
            command,
            record.abl_mlx,
            hash_rows(record.hashes),
            options=record.options,
            seconds=record.seconds,
        ),
    ]
    did = "Induced refusals in" if record.induced else "Edited"
    return html(
        Page(
            f"{did} with abl-mlx",
            record.source,
            (summary_line(record.direction),),
            tuple(_run_tiles(record, evaluations[0])),
            tuple(sections),
        )
    )


def _before_and_after(record: RunRecord) -> Section:
    notes = [f"{one.output}: {one.note}" for one in record.evaluations if one.note]
    notes += reply_notes.sentences(record.before, "before")
    for one in record.evaluations:
        notes += [f"{one.output}: {note}" for note in reply_notes.sentences(one.after)]
    tables = tuple(_output_table(record, one) for one in record.evaluations)
    return Section("Before and after", tables=tables, lines=tuple(notes))


def _named(word: str, one: EvaluatedEdit, evaluations: Sequence[EvaluatedEdit]) -> str:
    return word if len(evaluations) == 1 else f"{word}: {one.output}"


def _run_tiles(record: RunRecord, first: EvaluatedEdit) -> list[Tile]:
    was, now = record.before.rates, first.after.rates
    tiles = [
        Tile(
            f"refusals, {name} prompts",
            f"{percent(was[name].share)} → {percent(now[name].share)}",
            interval(now[name]),
        )
        for name in ("harmful", "harmless")
    ]
    note = "nats, first reply token, harmless prompts; 0 = same"
    tiles.append(Tile("KL", f"{first.kl.k1:.4f}", note))
    if first.leak is not None:
        total, limit = first.leak.total, record.options.writing.max_leak
        note = "share of the edit lost in writing"
        tiles.append(Tile("leak", f"{total:.2g}", note, total <= limit))
    return tiles


def _output_table(record: RunRecord, one: EvaluatedEdit) -> Table:
    rows = output_rows(record, one)
    if one.leak is not None:
        note = "share of the edit lost in writing"
        rows.append(("leak", "", f"{one.leak.total:.2g}", note))
    asked = asked_in(one.runtime, record.options.prompting.thinking)
    about = [one.format, *(one.types or []), asked]
    title = f"{one.output} ({', '.join(filter(None, about))})"
    return Table((title, "before", "after", ""), tuple(rows), (1, 2))


def _layers_text(direction: Chosen) -> str:
    text = f"Chosen: {summary_line(direction)}"
    if direction.chosen_by is not None:
        text += f" ({direction.chosen_by})"
    scores = direction.refusal_score
    if scores is not None:
        text += (
            f". Refusal scores of the unedited model: harmful {scores.harmful:+.2f}, harmless "
            f"{scores.harmless:+.2f}; harmful with the direction removed "
            f"{scores.harmful_ablated:+.2f}"
        )
    return f"{text}. Layers count from 0."


def _leak_section(one: EvaluatedEdit, several: bool) -> Section:
    tensors = {} if one.leak is None else one.leak.tensors
    rows = [
        (
            name,
            each.type or "",
            "" if each.bytes_changed is None else f"{each.bytes_changed:,}",
            f"{each.weight_error:.4f}",
            f"{each.leak:.5f}",
        )
        for name, each in tensors.items()
    ]
    head = ("tensor", "type", "bytes changed", "weight error", "leak")
    used = [k for k in range(len(head)) if k == 0 or any(row[k] for row in rows)]
    table = Table(
        tuple(head[k] for k in used),
        tuple(tuple(row[k] for k in used) for row in rows),
        tuple(place for place, k in enumerate(used) if k >= 2),
        f"All {len(rows)} tensors",
    )
    title = "Leak by tensor" + (f": {one.output}" if several else "")
    text = "Read back from the written bytes. " + (
        ""
        if one.leak is None
        else f"In all {one.leak.total:.2g}, at most {one.leak.max:.2g} in a tensor."
    )
    return Section(
        title, (text,), charts=tuple(figures.leak_charts(tensors)), tables=(table,) if rows else ()
    )


def _features(found: SaeFound | None) -> list[Section]:
    if found is None:
        return []
    table = Table(sae_tables.HEAD, tuple(sae_tables.rows(found)), (1, 2, 3, 4, 5))
    about = f"{sae_tables.title(found)}. {sae_tables.ABOUT}."
    return [Section("Features of the autoencoder", (about,), tables=(table,))]


def _explained(found: Explained | None) -> list[Section]:
    """What the direction is made of, if its file says it."""
    if found is None:
        return []
    text = "\n".join(explain_tables.lines(found)).strip("\n")
    charts = tuple(explain_tables.explain_charts(found))
    return [Section("What the direction is made of", charts=charts, code=text)]


def _trials(trials: Sequence[TriedEdit]) -> Section:
    rows = tuple(
        (
            summary_line(one),
            "" if one.refusal is None else f"{one.refusal:+.2f}",
            "" if one.refused is None else percent(one.refused),
            "" if one.kl is None else f"{one.kl:.4f}",
            one.dropped or "",
        )
        for one in trials
    )
    head = ("edit", "refusal score", "refused", "KL", "dropped because")
    return Section(
        "What else was tried",
        ("By the first reply tokens to validation prompts.",),
        tables=(Table(head, rows, (1, 2, 3), f"{len(rows)} edits"),),
    )
