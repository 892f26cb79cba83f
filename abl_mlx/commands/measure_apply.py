"""`abl-mlx apply`, `measure` and `inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from abl_mlx import __version__
from abl_mlx.choices import ApplyOptions, MeasureOptions
from abl_mlx.commands import (
    condition_choice,
    edit_choice,
    explain,
    part_ranking,
    prompt_choice,
    refusal_cliff,
    streaming,
)
from abl_mlx.commands.edit_choice import edit_of
from abl_mlx.commands.find import find_behind_openings
from abl_mlx.commands.same_everywhere import check_same
from abl_mlx.directions import direction_file
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.inputs.sets import PromptSets, prompt_hashes
from abl_mlx.models import capture, given_template
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.input_squares import InputSquares, recorded
from abl_mlx.models.writers import Writer
from abl_mlx.outputs import apps, destinations, reproduction, staging
from abl_mlx.outputs.model_file import find_model
from abl_mlx.outputs.record_parts import combined_hash, hashes, measured, start_record, worst_leak
from abl_mlx.records.edits import ApplyRecord, MeasureRecord
from abl_mlx.records.looks import InspectRecord
from abl_mlx.reports import plot
from abl_mlx.reports.companions import write_companions
from abl_mlx.support import ranks
from abl_mlx.support.clock import Clock
from convert.base.atomic import claim
from convert.base.cores import beside
from convert.base.errors import UserError
from convert.base.suffixes import ends_in
from convert.gguf import imatrix


def apply(
    direction: DirectionFile | Path,
    text: str,
    paths: Sequence[Path],
    options: ApplyOptions,
    *,
    kept: bool = True,
) -> ApplyRecord:
    """`abl-mlx apply`: write the edit along a direction, without evaluating it.

    Args:
        direction: the direction, or the file that holds it.
        text: the model as the user typed it.
        paths: the outputs.
        options: the chosen options.
        kept: whether the outputs stay, so that apps are given them and it is said how to open them.
    """
    named = "the direction"
    if isinstance(direction, Path):
        named, direction = str(direction), direction_file.read(direction)
    recipe = direction.metadata.get("recipe")
    options = options.but(norm=edit_choice.with_norm(options.editing, recipe).norm)
    editing, writing = options.editing, options.writing
    edit_choice.check(editing, writing)
    condition_choice.warn_unconditional(direction)
    clock = Clock()
    with find_model(text) as model:
        places = apps.placed(paths, model.source, overwrite=writing.overwrite)
        paths, options = places.paths, places.joined(options)
        writing = options.writing
        destinations.check(paths, model, editing, writing)
        model.check(paths, editing, writing)
        check_same(clock, None, model)
        loaded = model.outline(clock, lazy=options.lazy, memory_check=options.memory_check)
        if loaded is not None:
            direction_file.check_width(direction, named, loaded.chat)
        edit = edit_of(direction, editing)
        planned = model.plan(edit, direction, paths, loaded, editing, writing)
        files = beside(model.hashes)
        with staging.staging(paths) as staged:
            written = [planned.write(one, clock) for one in staged]
            with clock.step("hash the source"):
                hashed = hashes(files(), direction, options)
            known = start_record(
                model.source, paths, options, direction, hashes=hashed, mtp=planned.predicting()
            )
            facts = [one.facts for one in written]
            known = reproduction.described(known, direction, written, clock)
            record = ApplyRecord(
                **replace(known, seconds=clock.seconds).values_by_field,
                leak=worst_leak(facts),
                written=facts,
            )
            for one in written:
                write_companions(one.output, model, record, one.facts)
        if kept:
            destinations.hand_over(places, model, writing)
    return record


def measure(
    text: str,
    out: Path,
    options: MeasureOptions,
    picture: Path | None = None,
    importance: Path | None = None,
    explain_with: Sequence[Path] = (),
) -> MeasureRecord:
    """`abl-mlx measure`: write the direction file.

    Args:
        text: the model as the user typed it.
        out: the direction file.
        options: the chosen options.
        picture: the file for charts; None for none.
        importance: the file for an importance matrix; None for none.
        explain_with: with ``explain``, direction files that the direction is compared with.
    """
    _check_places(out, picture, importance)
    options = replace(options, searching=options.searching.beside(out.with_suffix("")))
    others = explain.check(options.explain, explain_with, options.prompting)
    refusal_cliff.check(options.refusal_cliff, options.prompting)
    clock = Clock()
    with find_model(text, options.chatting.template) as model:
        source = model.source
        sets = prompt_choice.load(model, options.prompting, options.finding.borderline)
        condition_choice.check(options.condition, sets, options.prompting)
        options = streaming.chosen(model, options)
        check_same(clock, sets, model)
        with clock.step("load the model"):
            chat = model.load(streamed=options.stream)
        with clock.step("find the residual writers"):
            capture.check_stream(chat)
            writers = model.find_writers(chat)
        for path, other in others.items():
            direction_file.check_width(other, path, chat)
        # Base models refuse little, and directions are there all the same.
        how = options.measuring.but(anyway=True) if chat.completes else options.measuring
        squares = InputSquares(chat.model, model.matrices()) if importance else None
        with recorded(chat, squares):
            found = find_behind_openings(chat, writers, sets, how, clock)
        found = _with_more(chat, writers, sets, options, found, clock, others)
        if importance is not None and squares is not None:
            squares.write(importance, [sets.harmful.train.name, sets.harmless.train.name])
        with clock.step("hash the source"):
            sha256 = combined_hash(model.hashes())
    about = {
        "model": source.public_name,
        "model_type": chat.model_type,
        "model_sha256": sha256,
        **given_template.entry(model.given),
        "prompt_hashes": prompt_hashes(sets),
        "seed": options.prompting.seed,
    }
    found = _described(found, about)
    found = part_ranking.with_all(chat, writers, sets, options, found, clock)
    direction_file.save(out, found)
    record = MeasureRecord(
        **measured(found).values_by_field,
        abl_mlx=__version__,
        source=source.name,
        outputs=[str(path) for path in (out, importance) if path is not None],
        template=given_template.record(model.given),
        note=given_template.note(model.given),
        seconds=clock.seconds,
    )
    if picture is None:
        return record
    plot.draw(picture, record)
    return replace(record, plot=str(picture))


def _with_more(
    chat: ChatModel,
    writers: Sequence[Writer],
    sets: PromptSets,
    options: MeasureOptions,
    found: DirectionFile,
    clock: Clock,
    others: Mapping[Path, DirectionFile],
) -> DirectionFile:
    """A direction with what further flags ask for."""
    if options.condition is not None:
        found = condition_choice.add_condition(
            chat, sets, options.prompting, options.condition, found, clock
        )
    if options.explain:
        found = explain.explain(chat, sets, options.prompting, others, found, clock)
    if options.refusal_cliff:
        found = refusal_cliff.measured(chat, writers, sets, options.measuring, found, clock)
    return found


def _described(found: DirectionFile, about: Mapping[str, Any]) -> DirectionFile:
    """A direction file that says where it comes from, and its layer and position."""
    summary = found.metadata["summary"]
    place = {key: summary[key] for key in ("layer", "position") if key in summary}
    return replace(found, metadata={**found.metadata, **place, **about})


def _check_places(out: Path, picture: Path | None, importance: Path | None) -> None:
    """Refuse files for the outputs that exist, cannot be written, or have another ending."""
    if importance is not None:
        if ranks.lockstep():
            raise UserError(
                "--imatrix needs every layer whole in one process, and --split-model leaves each a "
                "part: leave one of them out."
            )
        imatrix.check_name(importance)
        claim(importance)
    if not ends_in(out, ".safetensors"):
        raise UserError(f"{out}: the name of a direction file ends in .safetensors.")
    claim(out)
    if picture is not None:
        plot.check(picture)


def inspect(text: str) -> InspectRecord:
    """`abl-mlx inspect`: the architecture, the residual writers, and how much an edit changes."""
    with find_model(text) as model:
        return model.inspect()
