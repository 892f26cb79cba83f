"""The commands' steps in order; each returns the record that is printed and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from abl_mlx import (
    __version__,
    capture,
    demo,
    directions,
    memory,
    outputs,
    plot,
    prompt_lengths,
    prompts,
    taken,
)
from abl_mlx.clock import Clock
from abl_mlx.measurement import edit_of, find_behind_openings, warn_of_strength
from abl_mlx.model_file import ModelFile, find_model
from abl_mlx.options import Options
from abl_mlx.prompts import PromptSets, Split
from abl_mlx.records import (
    combined_hash,
    hashes,
    measured,
    prompt_hashes,
    start_record,
    worst_leak,
)
from convert import ollama
from convert.atomic import claim
from convert.errors import UserError
from convert.suffixes import ends_in

Record = dict[str, Any]

#: Prompts of each set to measure, to choose on and to ask, with ``--quick``.
QUICK = (48, 16, 24)


# --- the commands ------------------------------------------------------------------------------


def apply(direction_path: Path, text: str, paths: Sequence[Path], options: Options) -> Record:
    """`abl-mlx apply`: write the edit that a direction file describes, without evaluating it."""
    warn_of_strength(options.strength)
    direction = directions.read(direction_path)
    clock = Clock()
    with find_model(text) as model:
        check_outputs(paths, model, options)
        model.check(paths, options)
        loaded = model.outline(options, clock)
        if loaded is not None:
            directions.check_width(direction, direction_path, loaded.chat)
        edit = edit_of(direction, options)
        planned = model.plan(edit, direction, paths, loaded, options)
        record = start_record(model.source, paths, options, direction)
        record.update(planned.predicting())
        with clock.step("hash the source"):
            record["hashes"] = hashes(model.hashes(), direction, options)
        with outputs.staging(paths) as staged:
            written = [planned.write(one, clock) for one in staged]
            facts = [one.facts for one in written]
            record.update(leak=worst_leak(facts), written=facts, seconds=clock.seconds)
            for one in written:
                outputs.write_companions(one.output, model.source, model.folder, record, one.facts)
    hand_to_ollama(paths, options)
    return record


def measure(text: str, out: Path, options: Options, picture: Path | None = None) -> Record:
    """`abl-mlx measure`: write the direction file.

    Args:
        picture: where its charts go, if they are wanted.
    """
    if not ends_in(out, ".safetensors"):
        raise UserError(f"{out}: the name of a direction file ends in .safetensors.")
    claim(out)
    if picture is not None:
        plot.check(picture)
    options = with_journal(options, out.with_suffix(""))
    clock = Clock()
    with find_model(text) as model:
        source = model.source
        sets = load_prompts(model, options)
        memory.check(model.source.title, model.size, asked=options.memory_check)
        with clock.step("load the model"):
            chat = model.load()
        with clock.step("find the residual writers"):
            capture.check_stream(chat)
            writers = model.find_writers(chat, options.tensors)
        found = find_behind_openings(chat, writers, sets, options, clock)
        with clock.step("hash the source"):
            sha256 = combined_hash(model.hashes())
    found = replace(
        found,
        metadata={
            **found.metadata,
            **{
                key: found.metadata["summary"][key]
                for key in ("layer", "position")
                if key in found.metadata["summary"]
            },
            "model": source.public_name,
            "model_type": chat.model_type,
            "model_sha256": sha256,
            "prompt_hashes": prompt_hashes(sets),
            "seed": options.seed,
        },
    )
    directions.save(out, found)
    record: Record = {
        "abl_mlx": __version__,
        "source": source.name,
        "outputs": [str(out)],
        "direction": {**found.metadata["summary"], "sha256": found.sha256},
        **measured(found),
        "seconds": clock.seconds,
    }
    if picture is not None:
        plot.draw(picture, record)
        record["plot"] = str(picture)
    return record


def inspect(text: str) -> Record:
    """`abl-mlx inspect`: what the model is and what an edit would touch."""
    with find_model(text) as model:
        return model.inspect()


# --- the steps ---------------------------------------------------------------------------------


def check_outputs(paths: Sequence[Path], model: ModelFile, options: Options) -> None:
    """Refuse, before any work, outputs that are not new, or do not go with the model and flags.

    Args:
        model: what is edited.

    Raises:
        UserError: naming the output or the flag.
    """
    outputs.check(paths, model.source, model.adapter)
    if options.keep_undo:
        taken.check_keep(paths, model.source.name, model.format, options.norm)
    if options.ollama_create is not None:
        ollama_first(paths, options.ollama_create)


def hand_to_ollama(paths: Sequence[Path], options: Options) -> None:
    """Give the first GGUF among the outputs to Ollama, if that was asked for."""
    if options.ollama_create is not None:
        file = outputs.companions(ollama_first(paths, None))["modelfile"]
        ollama.ollama_create(options.ollama_create, file)


def ollama_first(paths: Sequence[Path], name: str | None) -> Path:
    """The GGUF among the outputs that Ollama is given.

    Args:
        name: what the model will be called; checked before any long work unless None.

    Raises:
        UserError: when no output is a GGUF, or `ollama` is not there.
    """
    found = [path for path in paths if outputs.format_of(path) == outputs.GGUF]
    if not found:
        raise UserError("--ollama-create needs a GGUF: add -o NAME.gguf.")
    if name is not None:
        ollama.check_create(name)
    return found[0]


def with_journal(options: Options, output: Path) -> Options:
    """The options with a place for the journal of a search: beside the output, if not given."""
    if options.search is None or options.search_journal is not None:
        return options
    return replace(options, search_journal=output.with_name(f"{output.name}.search.journal"))


def load_prompts(model: ModelFile | None, options: Options) -> PromptSets:
    """The prompt sets of this run: the demo's own, the user's, or the bundled ones.

    A file made from the demo is asked what the demo is asked: it has heard of nothing else.

    Args:
        model: what is asked; None for a server.
    """
    speaks_demo = model is not None and (
        model.source.is_demo or model.has_tokens(demo.vocabulary())
    )
    if speaks_demo and options.harmful is None and options.harmless is None:
        sets = prompts.load_demo()
    else:
        sets = prompts.load_sets(options.harmful, options.harmless, options.seed)
    if options.borderline is not None:
        sets = replace(sets, borderline=prompts.load(options.borderline, "--borderline"))
    if options.quick:
        sets = cut(sets, *QUICK)
    sets = cut(sets, options.limit)
    return sets if model is None else prompt_lengths.fitting(sets, model)


def cut(
    sets: PromptSets, train: int | None, validation: int | None = None, test: int | None = None
) -> PromptSets:
    """At most so many prompts in each part of each set; ``train`` of all where it is alone."""
    if train is None:
        return sets
    validation, test = validation or train, test or train
    harmful, harmless = (
        Split(split.train.take(train), split.validation.take(validation), split.test.take(test))
        for split in (sets.harmful, sets.harmless)
    )
    borderline = sets.borderline and sets.borderline.take(train)
    return replace(sets, harmful=harmful, harmless=harmless, borderline=borderline)
