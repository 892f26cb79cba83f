"""Parts of a run's record: its inputs and their hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from abl_mlx import __version__
from abl_mlx.choices import ApplyOptions, RunOptions
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.flag_values import Choices
from abl_mlx.inputs.sources import Source
from abl_mlx.records.directions import Chosen, Found, Recipe
from abl_mlx.records.edits import Drafting, Edited, Hashes, WorstLeak, WrittenEdit
from abl_mlx.records.evaluations import Template
from abl_mlx.support.console import progress


def start_record(
    source: Source,
    paths: Sequence[Path],
    options: RunOptions | ApplyOptions,
    direction: DirectionFile,
    *,
    hashes: Hashes,
    mtp: Drafting | None,
) -> Edited:
    """The parts of a record that are known before anything is written.

    Args:
        source: the model that is edited.
        paths: the outputs.
        options: the chosen options.
        direction: the directions.
        hashes: the hashes of all of these.
        mtp: the entry about tensors of multi-token prediction.
    """
    recipe = direction.metadata.get("recipe")
    taken = chosen(direction)
    if recipe is not None:
        taken = replace(taken, recipe=Recipe.of(recipe))
    return Edited(
        abl_mlx=__version__,
        source=source.name,
        source_is_repository=source.is_repository,
        base_model=source.public_name,
        repository=source.hub_id,
        outputs=[str(path) for path in paths],
        options=options,
        mtp=mtp,
        hashes=hashes,
        seconds={},
        **replace(measured(direction), direction=taken).values_by_field,
    )


def chosen(direction: DirectionFile) -> Chosen:
    """The chosen directions, as a direction file describes them."""
    summary = direction.metadata.get("summary", {"method": "given"})
    return Chosen.of({**summary, "sha256": direction.sha256})


def measured(direction: DirectionFile) -> Found:
    """Results of measuring a direction.

    Results that a direction from another program lacks are left out.
    """
    metadata = direction.metadata
    kept = (
        "first_look", "scores", "trials", "finalists", "sae", "condition", "updates", "explained",
        "cliff",
    )  # fmt: skip
    found = {key: metadata[key] for key in kept if key in metadata}
    if direction.clouds is not None:
        sets = zip(("harmful", "harmless"), direction.clouds, strict=True)
        points = {name: cloud.astype(float).round(4).tolist() for name, cloud in sets}
        found["cloud"] = {**metadata.get("cloud", {}), **points}
    return Found.of({"direction": chosen(direction), **found})


def file_hashes(files: Sequence[Path]) -> dict[str, str]:
    """Name of each file -> its SHA-256; read in pieces (hashlib.file_digest needs Python 3.11)."""
    found, piece = {}, memoryview(bytearray(1 << 20))
    total = sum(file.stat().st_size for file in files)
    with progress(total, "hash the source", "B") as bar:
        for file in files:
            digest = hashlib.sha256()
            with open(file, "rb", buffering=0) as stream:
                while count := stream.readinto(piece):
                    digest.update(piece[:count])
                    bar.update(count)
            found[file.name] = digest.hexdigest()
    return found


def fingerprint(files: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of change of each file, which show that one was changed."""
    stats = sorted((path.name, path.stat()) for path in files)
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def combined_hash(parts: Mapping[str, Any]) -> str:
    """One SHA-256 of several named JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def hashes(
    source: Mapping[str, str],
    direction: DirectionFile,
    options: Choices,
    template: Template | None = None,
) -> Hashes:
    """Hashes of the source's files, of the direction and of the options.

    Args:
        source: name -> SHA-256 of every file that holds weights.
        direction: the directions.
        options: the chosen options.
        template: the record's entry about a given template, which counts as an option.
    """
    given = {} if template is None else {"template": template.json}
    return Hashes(
        source=dict(source),
        direction=direction.sha256,
        options=combined_hash({**options.record(), **given}),
    )


def worst_leak(written: Sequence[WrittenEdit]) -> WorstLeak:
    """The largest total leak, and the largest leak of a tensor, of all outputs."""
    leaks = [one.leak for one in written if one.leak is not None]
    return WorstLeak(total=max(one.total for one in leaks), max=max(one.max for one in leaks))
