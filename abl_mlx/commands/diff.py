"""`abl-mlx diff`: which tensors differ between two GGUFs, and how much of a direction is left."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from abl_mlx.choices import KINDS, PLACES, Editing
from abl_mlx.commands.edit_choice import edit_of
from abl_mlx.directions import direction_file
from abl_mlx.inputs.sources import Source
from abl_mlx.outputs import gguf_outputs
from abl_mlx.outputs.edit_label import gguf_label
from abl_mlx.outputs.gguf import GgufFile
from abl_mlx.outputs.gguf_plan import bytes_changed, plan
from abl_mlx.records.looks import Changed, DiffRecord
from abl_mlx.support.console import progress
from abl_mlx.support.flags import PARTS
from convert.base.errors import UserError
from convert.gguf.file import GgufSource


def diff(
    first: Path, second: Path, *, direction: Path | None = None, tensors: str | None = None
) -> DiffRecord:
    """`abl-mlx diff`: compare two GGUFs, and measure how much of a direction is left.

    Args:
        first, second: the files.
        direction: a direction file; the leak of its full removal from ``first`` is measured in
            ``second``. If its label names another kind of edit (a reflection; readers; some heads
            or experts), it is the leak of that.
        tensors: a regular expression that names the tensors for that measurement.
    """
    with GgufFile(Source(str(first), first)) as model, GgufSource(second) as after:
        before = model.gguf
        missing = sorted(set(before.tensors) ^ set(after.tensors))
        if missing:
            raise UserError(
                f"{first} and {second} do not hold the same tensors ({missing[0]} is in one of "
                "them alone): these are not the same model."
            )
        changed: dict[str, Changed] = {}
        with progress(len(before.tensors), "compare", "tensor") as bar:
            for name, entry in before.tensors.items():
                other = after.tensors[name]
                if other.shape != entry.shape:
                    raise UserError(
                        f"{name} has the shape {entry.shape} in {first} and {other.shape} in "
                        f"{second}: these are not the same model."
                    )
                if other.type != entry.type:
                    changed[name] = Changed(type=f"{entry.type.name} -> {other.type.name}")
                else:
                    count = bytes_changed(before.raw(name), after.raw(name))
                    before.release(name)
                    after.release(name)
                    if count:
                        changed[name] = Changed(type=entry.type.name, bytes_changed=count)
                bar.update()
        record = DiffRecord(
            first=str(first), second=str(second), tensors=len(before.tensors), changed=changed
        )
        if direction is None:
            return record
        file = direction_file.read(direction)
        editing = _editing(gguf_label(after))
        plans = plan(
            before,
            edit_of(file, editing),
            model.named_writers(tensors),
            readers=model.named_readers(editing.edit),
        )
        report = gguf_outputs.compare_all(before, after, plans)
    return replace(
        record,
        types=gguf_outputs.written_types(report),
        leak=report.record(),
        weight_error=report.error,
        direction=file.sha256,
    )


def _editing(label: Mapping[str, Any]) -> Editing:
    """The kind of the edit that a label names, at full strength.

    Args:
        label: the values of a label, which may be empty; what no flag accepts is ignored.
    """
    known: dict[str, Any] = {}
    for name, accepted in (
        ("kind", "|".join(KINDS)), ("edit", "|".join(PLACES)), ("heads", PARTS), ("experts", PARTS),
    ):  # fmt: skip
        value = str(label.get(name, ""))
        if re.fullmatch(accepted, value):
            known[name] = value
    return Editing(**known)
