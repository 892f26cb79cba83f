"""Parts of a run's record: its inputs and their hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from abl_mlx import __version__
from abl_mlx.choices import Choices
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.inputs.sources import Source
from abl_mlx.support.console import progress

Record = dict[str, Any]


def start_record(
    source: Source, paths: Sequence[Path], options: Choices, direction: DirectionFile
) -> Record:
    """The entries of a run's record that are known before anything is written."""
    metadata = direction.metadata
    summary = metadata.get("summary", {"method": "given"})
    return {
        "abl_mlx": __version__,
        "source": source.name,
        "source_is_repository": source.is_repository,
        "base_model": source.public_name,
        **({"repository": source.hub_id} if source.hub_id is not None else {}),
        "outputs": [str(path) for path in paths],
        "direction": {
            **summary,
            "sha256": direction.sha256,
            **({"recipe": metadata["recipe"]} if "recipe" in metadata else {}),
        },
        "options": options.record(),
        **measured(direction),
    }


def measured(direction: DirectionFile) -> Record:
    """Results of measuring a direction: ``first_look``, ``scores``, ``trials`` and ``cloud``.

    The cloud has the coordinates [x, y] of each prompt of the two sets in a plane. Entries that a
    direction from another program lacks are left out.
    """
    metadata = direction.metadata
    kept = ("first_look", "scores", "trials")
    found: Record = {key: metadata[key] for key in kept if key in metadata}
    if direction.clouds is not None:
        sets = zip(("harmful", "harmless"), direction.clouds, strict=True)
        points = {name: cloud.astype(float).round(4).tolist() for name, cloud in sets}
        found["cloud"] = {**metadata.get("cloud", {}), **points}
    return found


def file_hashes(files: Sequence[Path]) -> dict[str, str]:
    """Name of each file -> its SHA-256; read in pieces (hashlib.file_digest needs Python 3.11)."""
    found = {}
    total = sum(file.stat().st_size for file in files)
    with progress(total, "hash the source", "B") as bar:
        for file in files:
            digest = hashlib.sha256()
            with open(file, "rb") as stream:
                while piece := stream.read(1 << 20):
                    digest.update(piece)
                    bar.update(len(piece))
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
    template: Mapping[str, Any] | None = None,
) -> Record:
    """Hashes of the source's files, of the direction and of the options.

    Args:
        source: name -> SHA-256 of every file that holds weights.
        direction: the directions.
        options: the chosen options.
        template: the record's entry about a given template, which counts as an option.
    """
    return {
        "source": dict(source),
        "direction": direction.sha256,
        "options": combined_hash({**options.record(), **(template or {})}),
    }


def worst_leak(written: Sequence[Record]) -> Record:
    """The largest total leak, and the largest leak of a tensor, of all outputs."""
    return {
        "total": max(one["leak"]["total"] for one in written),
        "max": max(one["leak"]["max"] for one in written),
    }
