"""`abl-mlx learn`: what was done to a base model, as a direction file that `apply` reads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx import __version__
from abl_mlx.audit_weights import learning, other_tensors
from abl_mlx.audit_weights.learning import EDITED, Learned
from abl_mlx.directions import direction_file
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.outputs import stream_weights
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.outputs.record_parts import combined_hash
from abl_mlx.outputs.remote_file import RemoteFile, find_in_parts, read_of
from abl_mlx.records.directions import Recipe
from abl_mlx.records.learned import LearnedStep, LearnRecord
from abl_mlx.records.looks import OtherTensors
from abl_mlx.reports import read_tables
from abl_mlx.support.clock import Clock
from convert.base.atomic import check_new
from convert.base.errors import UserError
from convert.base.suffixes import ends_in


def learn(base: str, edited: str, output: Path | None = None) -> LearnRecord:
    """Learn the edit that somebody made of a model.

    Args:
        base, edited: the models before and after the edit, as the user typed them.
        output: the direction file, a new .safetensors; written if there is such an edit.

    Raises:
        UserError: when a model cannot be read, or the two are not of the same shapes.
    """
    if output is not None:
        if not ends_in(output, ".safetensors"):
            raise UserError(f"{output}: the name of a direction file ends in .safetensors.")
        check_new(output)
    clock = Clock()
    with find_in_parts(base) as before, find_in_parts(edited) as after:
        others: OtherTensors | None = None
        try:
            with clock.step("compare the weights"):
                found = learning.learn(after, before)
            if not any(isinstance(one, RemoteFile) for one in (before, after)):
                with clock.step("compare the rest"):
                    others = other_tensors.compare(after, before, _tensors(after, before))
        except stream_weights.Unreachable as error:
            found = Learned(learning.CANNOT_TELL, [str(error)], {}, [])
        evidence = list(found.evidence)
        if others is not None:
            evidence += other_tensors.evidence(others)
        written = output is not None and found.verdict == EDITED
        files = _files(found, output) if output is not None and written else []
        if files:
            with clock.step("hash the files"):
                hashes = {"base": before.hashes(), "edited": after.hashes()}
            for path, one in files:
                direction_file.save(path, _file(one, before, after, hashes))
        directions = found.directions
        return LearnRecord(
            abl_mlx=__version__,
            source=base,
            base=base,
            edited=edited,
            verdict=found.verdict,
            evidence=evidence,
            rank=0 if directions is None else int(directions.shape[-2]),
            per_layer=None if directions is None else directions.ndim == 3,
            strength=found.strength,
            recipe=None if found.strength is None else Recipe.of(_recipe(found)),
            norm=found.norm,
            layers=found.layers,
            experts=_experts(found) or None,
            agreement=found.agreement,
            steps=_steps(found, files) or None,
            writers=found.writers,
            left_out=found.left_out,
            others=others,
            output=str(output) if written else None,
            apply=_command(found, files) if files else None,
            parts_read=read_of([before, after]),
            seconds=clock.seconds,
        )


def _tensors(after: ModelFile, before: ModelFile) -> list[str]:
    models = after.stream_weights(), before.stream_weights()
    return [name for model in models for one in model.writers for name in one.tensors]


def _recipe(found: Learned) -> dict[str, Any]:
    """The edit besides the directions, as a direction file has it."""
    recipe: dict[str, Any] = {"embedding": found.embedding}
    if found.strength != 1:
        recipe["strength"] = found.strength
    if found.profile is not None:
        recipe["profile"] = found.profile
    if found.norm not in (None, "none"):
        recipe["norm"] = found.norm
    return recipe


def _experts(found: Learned) -> list[str]:
    return [f"{layer}.{expert}" for layer, expert in found.experts]


def _file(
    found: Learned, before: ModelFile, after: ModelFile, hashes: dict[str, dict[str, str]]
) -> DirectionFile:
    assert found.directions is not None
    metadata: dict[str, Any] = {
        "summary": {"method": "learn", "layer": None, "position": None},
        "method": "learn",
        "model": before.source.public_name,
        "model_sha256": combined_hash(hashes["base"]),
        "learned_from": after.source.public_name,
        "learned_from_sha256": combined_hash(hashes["edited"]),
    }
    recipe = _recipe(found)
    if recipe != {"embedding": True}:  # which a direction alone means, too
        metadata["recipe"] = recipe
    return DirectionFile(mx.array(found.directions.astype(np.float32)), metadata=metadata)


def _files(found: Learned, output: Path) -> list[tuple[Path, Learned]]:
    """The direction files that are written, and what each of them holds.

    Raises:
        UserError: when the second of two exists already.
    """
    if not found.steps:
        return [(output, found)]
    second = output.with_name(f"{output.stem}-2.safetensors")
    check_new(second)
    return list(zip((output, second), found.steps, strict=True))


def _steps(found: Learned, files: Sequence[tuple[Path, Learned]]) -> list[LearnedStep]:
    """Each of two edits, for the record; none of a single one."""
    if not found.steps:
        return []
    paths: list[str | None] = [str(path) for path, _ in files] or [None, None]
    return [
        LearnedStep(
            strength=one.strength or 0.0,
            recipe=Recipe.of(_recipe(one)),
            layers=one.layers,
            output=path,
        )
        for path, one in zip(paths, found.steps, strict=True)
    ]


def _command(found: Learned, files: Sequence[tuple[Path, Learned]]) -> str:
    """The command that makes the same edit of another model, or one for each of two edits."""
    commands, model = [], "MODEL"
    for number, (path, _) in enumerate(files, 1):
        output = "OUTPUT" if number == len(files) else "BETWEEN"
        words = ["abl-mlx", "apply", str(path), model, "-o", output]
        if experts := _experts(found):
            words += ["--experts", ",".join(experts)]
        commands.append(shlex.join(words))
        model = output
    return " && ".join(commands)


def table(record: LearnRecord) -> str:
    """The record as a table."""
    lines = [f"{record.edited} against {record.base}: {record.verdict}"]
    if record.verdict == EDITED:
        own = ", those of each layer its own" if record.per_layer else ""
        lines.append(f"  directions   {record.rank}{own}")
        each: Sequence[LearnRecord | LearnedStep] = record.steps or [record]
        for one in each:
            lines.append(f"  strength     {_strength(one)}")
            embedding = one.recipe is not None and one.recipe.embedding
            lines.append(f"  embedding    {'edited' if embedding else 'not edited'}")
        lines.append(f"  norms        {record.norm or 'cannot be told'}")
    lines += [f"  - {one}" for one in record.evidence]
    lines += read_tables.lines(record.parts_read)
    if record.apply is not None:
        lines += ["", f"  the same edit of another model: {record.apply}"]
    return "\n".join(lines)


def _strength(record: LearnRecord | LearnedStep) -> str:
    profile = None if record.recipe is None else record.recipe.profile
    strength = record.strength or 0.0
    if profile is None:
        return f"{strength:g}"
    found = {name: [round(strength * one, 3) for one in alphas] for name, alphas in profile.items()}
    alike = {alpha for alphas in found.values() for alpha in alphas if alpha}
    if len(alike) == 1:
        return f"{alike.pop():g}"
    return "; ".join(f"{name} {json.dumps(alphas)}" for name, alphas in found.items())
