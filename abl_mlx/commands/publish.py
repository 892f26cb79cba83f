"""`abl-mlx publish`: a static page on which visitors ask a model and its edit in their browser."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from abl_mlx import __version__
from abl_mlx.choices import Prompting
from abl_mlx.commands import prompt_choice, show
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.inputs import thinking
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models import memory
from abl_mlx.outputs import reproduction, staging
from abl_mlx.outputs.model_file import ModelFile, find_model
from abl_mlx.outputs.other_format import NewTypes
from abl_mlx.records.edits import (
    ApplyRecord,
    PublishRecord,
    Reproduction,
    RunRecord,
    UploadedFile,
    WrittenEdit,
)
from abl_mlx.reports import site_page
from abl_mlx.support.arrays import let_go
from abl_mlx.support.clock import Clock
from abl_mlx.support.strict_json import to_json
from convert.base.atomic import new_folder
from convert.base.errors import UserError
from convert.gguf.file import metadata
from convert.gguf.parts import parts_there, whole_name
from convert.gguf.regroup import NewParts

#: A browser reads no file beyond 2 GB; smaller ones are fetched side by side.
PART = 512_000_000

#: How many held-out prompts of each set are offered.
_EXAMPLES = 2


def publish(
    edited: Path,
    out: Path,
    *,
    base: str | None = None,
    examples: Sequence[str] = (),
    part: int = PART,
) -> PublishRecord:
    """Write a page that any web server can offer, with both models in it.

    Args:
        edited: a GGUF that `run` or `apply` wrote, with its record beside it.
        out: the folder to write.
        base: the original as typed; None for the one that the record names.
        examples: the prompts that the page offers and shows; none for some that are held out.
        part: the largest size of a file in bytes; a single tensor may be larger.

    Raises:
        UserError: when there is no record, or a model cannot be found or is not the record's.
    """
    if staging.format_of(edited) != staging.GGUF:
        raise UserError(f"{edited}: browsers run GGUFs: name one that `run` or `apply` wrote.")
    place, values = reproduction.read_record(whole_name(edited))
    record = _record(place, values)
    source = base or record.source
    clock = Clock()
    with find_model(str(edited)) as after, _original(source, base) as before, new_folder(out) as to:
        with clock.step("hash the models"):
            hashes = {"original": before.hashes(), "edited": after.hashes()}
        if sorted(hashes["original"].values()) != sorted(record.hashes.source.values()):
            raise UserError(
                f"{source} is not the model that was edited, whose files have other SHA-256 "
                "hashes: name the original by --base."
            )
        site_page.write_files(to)
        shutil.copyfile(place, to / "abl.json")
        with clock.step("write the models"):
            quantize = None if before.format == staging.GGUF else record.options.writing.quantize
            files = {
                name: _model(file, to / f"{name}-{_short(hashes[name])}.gguf", part, kind)
                for name, file, kind in (("original", before, quantize), ("edited", after, None))
            }
        asking = record.options.prompting if isinstance(record, RunRecord) else Prompting()
        asked = _prompts(before, asking, examples)
        with clock.step("record the activations"):
            pictures, note = _pictures(before, after, values, asked)
        licence = site_page.licence_of(metadata(to / files["original"]["url"]))
        page = {
            **site_page.said(record, _entry(record, edited), before.source.title, licence),
            **files,
            "system": asked[0].system,
            "template_values": thinking.template_values(asked[0].thinking),
            "examples": [prompt.text for prompt in asked],
            "pictures": pictures,
        }
        (to / "site.json").write_text(to_json(page), encoding="utf-8")
        listed = [
            UploadedFile(name=one.name, bytes=one.stat().st_size) for one in sorted(to.iterdir())
        ]
    return PublishRecord(
        abl_mlx=__version__,
        edited=str(edited),
        source=source,
        output=str(out),
        files=listed,
        pictures=[one["prompt"] for one in pictures],
        note=note,
        seconds=clock.seconds,
    )


def _original(source: str, base: str | None) -> ModelFile:
    try:
        return find_model(source)
    except UserError as error:
        if base is not None:
            raise
        raise UserError(f"the original: {error} Or name it by --base.") from None


def _short(hashes: Mapping[str, str]) -> str:
    """A part of the weights' hash. Browsers keep models by their address, so it has to change."""
    return min(hashes.values())[:8]


def _record(place: Path, values: Mapping[str, Any]) -> RunRecord | ApplyRecord:
    try:
        return RunRecord.of(values) if "evaluations" in values else ApplyRecord.of(values)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{place} is no record of `run` or `apply` ({error}): name what they wrote."
        ) from None


def _entry(record: RunRecord | ApplyRecord, edited: Path) -> WrittenEdit:
    """The record's entry about an output, which may have another name by now."""
    entries = record.evaluations if isinstance(record, RunRecord) else record.written
    ggufs = [one for one in entries if one.format == staging.GGUF]
    return next((one for one in ggufs if Path(one.output).name == edited.name), ggufs[0])


def _prompts(before: ModelFile, chosen: Prompting, examples: Sequence[str]) -> list[Prompt]:
    """The prompts that are offered, asked as the record says."""
    sets = prompt_choice.load(before, Prompting(system=chosen.system, thinking=chosen.thinking))
    some = [*sets.harmful.test.prompts[:_EXAMPLES], *sets.harmless.test.prompts[:_EXAMPLES]]
    return [replace(some[0], text=text, answer=None) for text in examples] or some


def _model(file: ModelFile, out: Path, part: int, quantize: str | None) -> dict[str, Any]:
    """Write a model as a GGUF; gives the address of its first file in the page, and its size."""
    file.convert(out, NewTypes(quantize, parts=NewParts(part)))
    parts = [out] if out.exists() else parts_there(out)
    return {"url": parts[0].name, "bytes": sum(one.stat().st_size for one in parts)}


def _pictures(
    before: ModelFile, after: ModelFile, values: Mapping[str, Any], asked: Sequence[Prompt]
) -> tuple[list[dict[str, Any]], str | None]:
    """The component along the direction in both models, prompt by prompt; or why there is none."""
    stored = Reproduction.of(values.get("reproduction") or {"outputs": {}}).directions
    if stored is None:
        return [], "the record does not hold the direction, so the page shows no activations"
    try:
        memory.check(before.source.title, before.size)
    except UserError:
        return [], "the model is larger than the memory, so the page shows no activations"
    direction = reproduction.direction_of(stored)
    found = [_components(file, direction, asked) for file in (before, after)]
    return [
        {"prompt": prompt.text, "tokens": tokens, "before": one, "after": other}
        for prompt, (tokens, one), (_, other) in zip(asked, *found, strict=True)
    ], None


def _components(
    file: ModelFile, direction: DirectionFile, asked: Sequence[Prompt]
) -> list[tuple[list[str], list[list[float]]]]:
    """The tokens of each prompt, and r·h/|h| after every layer at each of them."""
    chat, found = file.load(), []
    for prompt in asked:
        tokens = chat.encode(prompt)
        along = show.cosines(show.stream(chat, tokens), direction.selected)
        if not np.isfinite(along).all():
            raise UserError(f"{file.source.name}: the residual stream is not finite: get it again.")
        found.append(
            (
                [chat.tokenizer.decode([one]) for one in tokens],
                along.astype(float).round(4).tolist(),
            )
        )
    del chat
    let_go()
    return found
