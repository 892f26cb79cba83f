"""`abl-mlx reproduce`: makes the edit of a record again, and compares every byte."""

from __future__ import annotations

import glob
import platform
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abl_mlx import __version__
from abl_mlx.choices import ApplyOptions, MeasureOptions
from abl_mlx.commands.measure_apply import apply, measure
from abl_mlx.directions import direction_file
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.inputs import hub, sources
from abl_mlx.inputs.hub import Reference
from abl_mlx.outputs import reproduction, staging
from abl_mlx.records.edits import OutputHashes, ReproduceRecord, Reproduction
from abl_mlx.support.arrays import numpy_of
from convert.base.errors import UserError

_SAME, _DIFFERENT = "identical", "different"


@dataclass(frozen=True)
class _Wanted:
    """What a record says of one output.

    Attributes:
        record: the record's file.
        values: its contents.
        name: the output's name.
        hashes: the output's hashes.
        stored: everything that the record holds for this.
    """

    record: Path
    values: Mapping[str, Any]
    name: str
    hashes: OutputHashes
    stored: Reproduction

    @property
    def options(self) -> ApplyOptions:
        """The options of the edit, without what is done with the output afterwards."""
        given = ApplyOptions.of_record(self.values["options"])
        return given.but(ollama_create=None, overwrite=False, keep_undo=False)


def reproduce(
    text: str,
    output: Path | None = None,
    *,
    base: str | None = None,
    direction: Path | None = None,
    remeasure: bool = False,
) -> ReproduceRecord:
    """Make the edit of a record again, and say whether every byte is the same.

    Args:
        text: the record (abl.json), or the folder or GGUF that it lies in or beside, here or on
            Hugging Face, of which nothing but the record is downloaded.
        output: where the model goes; None to compare it and keep nothing.
        base: the base model as typed; None for the one that the record names.
        direction: the direction file, if the record is too small to hold it.
        remeasure: also measure the direction again, and say how far it lies from the record's.

    Raises:
        UserError: when the record is none of `run` or `apply`, lacks what is needed, or the base
            cannot be found.
    """
    reference = sources.on_the_hub(text)
    wanted = _read(Path(text).expanduser() if reference is None else _downloaded(reference))
    given = _direction(wanted, direction)
    source = base or str(wanted.values["source"])
    with ExitStack() as stack:
        if output is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            output, kept = Path(folder) / wanted.name, None
        else:
            kept = str(output)
        form = staging.format_of(Path(wanted.name))
        if staging.format_of(output) != form:
            kind = "a GGUF" if form == staging.GGUF else "a folder"
            raise UserError(f"{output}: {wanted.record} is of {kind}: name such an output.")
        made = apply(given, source, [output], wanted.options, kept=kept is not None)
        cosine = _measured_again(wanted, given, source) if remeasure else None
    assert made.reproduction is not None
    found = made.reproduction.outputs[output.name]
    differing = sorted(
        name
        for name in {*found.tensors, *wanted.hashes.tensors}
        if found.tensors.get(name) != wanted.hashes.tensors.get(name)
    )
    same = sorted(found.files.values()) == sorted(wanted.hashes.files.values())
    return ReproduceRecord(
        abl_mlx=__version__,
        source=source,
        record=str(wanted.record),
        verdict=_SAME if same else _DIFFERENT,
        tensors=len(wanted.hashes.tensors),
        differing=differing,
        reasons=[] if same else _reasons(wanted, made.hashes.source, differing),
        files=found.files,
        output=kept,
        cosine=cosine,
        seconds=made.seconds,
    )


def _downloaded(reference: Reference) -> Path:
    """The record in a repository, or the one of a GGUF in it."""
    names = ["abl.json"]
    if reference.is_gguf:
        file = Path(hub.gguf_files(reference)[0])
        names = [str(file.with_name(f"{file.stem}.abl.json")), str(file.with_name("abl.json"))]
    folder = hub.downloaded(reference, [glob.escape(name) for name in names])
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{reference.name} on Hugging Face holds no {names[0]}, the record of an edit by abl-mlx: "
        "ask its maker for it, or compare it with its base (`abl-mlx learn`)."
    )


def _read(path: Path) -> _Wanted:
    """The record that a path names, and the output that it is of."""
    record, values = reproduction.read_record(path)
    if not isinstance(values.get("reproduction"), Mapping):
        raise UserError(
            f"{record} does not hold what is needed to make the edit again: only records of `run` "
            "and `apply` do, by this version of abl-mlx or a newer one."
        )
    try:
        stored = Reproduction.of(values["reproduction"])
        named = path.name if path.name in stored.outputs else None
        beside = record.name.removesuffix(".abl.json") + ".gguf"
        name = named or next((one for one in (record.parent.name, beside) if one in stored.outputs),
                             next(iter(stored.outputs), None))  # fmt: skip
        if name is None:
            raise UserError(f"{record} is of adapters, whose bytes it does not name.")
        if values.get("induced"):
            raise UserError(
                f"{record} is of `run --induce`, which adds a constant; only removals are made "
                "again."
            )
        return _Wanted(record, values, name, stored.outputs[name], stored)
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{record} is damaged ({error}): get it again.") from None


def _direction(wanted: _Wanted, path: Path | None) -> DirectionFile:
    """The record's directions, or those of the file, which must be the same."""
    stored = wanted.stored.directions
    if path is not None:
        found = direction_file.read(path)
    elif stored is None:
        changes_mlps = wanted.values["direction"].get("update") is not None
        what = "what `--method rome` adds to MLPs" if changes_mlps else "the directions"
        raise UserError(
            f"{wanted.record} does not hold {what}, which is too large for a record: name the "
            "direction file by --direction."
        )
    else:
        try:
            found = reproduction.direction_of(stored)
        except ValueError:
            raise UserError(f"{wanted.record}: its directions are damaged: get it again.") from None
    sha256 = wanted.values["hashes"]["direction"]
    if found.sha256 != sha256:
        where = path or wanted.record
        raise UserError(
            f"{where}: these are other directions than the record's, whose SHA-256 is {sha256}."
        )
    return found


def _measured_again(wanted: _Wanted, given: DirectionFile, source: str) -> float:
    """The least |cos| of the record's directions and those that the same flags find now."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "direction.safetensors"
        measure(source, out, MeasureOptions.of_record(wanted.values["options"]))
        found = numpy_of(direction_file.read(out).selected)
    recorded = numpy_of(given.selected)
    layers = max(len(one) if one.ndim == 3 else 1 for one in (found, recorded))
    pairs = (np.broadcast_to(one, (layers, *one.shape[-2:])) for one in (found, recorded))
    cosines = (np.linalg.svd(a @ b.T, compute_uv=False).min() for a, b in zip(*pairs, strict=True))
    return float(min(cosines))


def _reasons(wanted: _Wanted, source: Mapping[str, str], differing: list[str]) -> list[str]:
    """Why the bytes may differ, a sentence each."""
    said: Mapping[str, str] = wanted.values["hashes"]["source"]
    reasons = []
    others = sorted(name for name, sha256 in said.items() if sha256 not in source.values())
    if others:
        reasons.append(
            f"the base is another one: no file of it has the SHA-256 of {', '.join(others)}"
        )
    if wanted.values.get("abl_mlx") != __version__:
        reasons.append(
            f"the record is of abl-mlx {wanted.values.get('abl_mlx')}, and this is {__version__}"
        )
    if not differing:
        reasons.append("every tensor is the same: only metadata differ, such as the base's name")
    elif not reasons:
        reasons.append(
            f"base and version are the same, so this platform computes otherwise "
            f"({platform.machine()}, {platform.system()}): please report it"
        )
    return reasons


def table(record: ReproduceRecord) -> str:
    """The record as a table."""
    lines = [f"{record.record}: {record.verdict}"]
    if record.differing:
        shown = ", ".join(record.differing[:8]) + (" …" if record.differing[8:] else "")
        lines.append(f"  {len(record.differing)} of {record.tensors} tensors differ: {shown}")
    else:
        lines.append(f"  all {record.tensors} tensors are the same")
    lines += [f"  - {one}" for one in record.reasons]
    if record.cosine is not None:
        lines.append(f"  |cos| of the directions with those measured again: {record.cosine:.4f}")
    lines += ["", "  files"]
    lines += [f"    {sha256}  {name}" for name, sha256 in record.files.items()]
    return "\n".join(lines)
