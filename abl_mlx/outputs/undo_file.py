"""The components that an edit removes from float weights, and the undo file that keeps them.

W' = W − α U(UᵀW) lacks UᵀW, which is k numbers for each column of a writer or row of an embedding.
With these numbers `abl-mlx undo` restores W, except for the rounding of W'.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from abl_mlx import __version__
from abl_mlx.edits.routing import Routing
from abl_mlx.edits.update import Update
from abl_mlx.outputs.folder_plan import Plan, TensorEdit
from abl_mlx.outputs.gguf_plan import TensorPlan, stored_values
from abl_mlx.outputs.staging import ADAPTERS, format_of, is_file
from convert.base import json_text
from convert.base.atomic import check_new
from convert.base.errors import UserError
from convert.base.schema import FLAG, TEXT, Kind, Refused, check, map_of, number, one_of, record
from convert.gguf.file import GgufSource
from convert.mlx import safetensors_files
from convert.mlx.folder import FLOAT_DTYPES
from convert.mlx.safetensors_files import TensorFiles

#: The file inside an edited folder; beside NAME.gguf it is NAME.undo.safetensors.
KEPT = "undo.safetensors"


@dataclass(frozen=True)
class Taken:
    """The components that an edit removed from one float tensor.

    Attributes:
        along: float32: UᵀW, (..., k, n), for the tensor in the layout in which it is multiplied; or
            the components of the rows, (..., k), of an embedding or a bias.
        basis: U, float32 (k, d), orthonormal.
        axis: the axis of the residual stream, -1 or -2.
        transposed: whether the last two axes are swapped in the file.
        strength: α.
        fixed: what the edit takes away, in the shape of ``along``, where that does not depend on
            the weights; else None.
    """

    along: mx.array
    basis: mx.array
    axis: int
    transposed: bool
    strength: float
    fixed: mx.array | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether these can be the components of a tensor with that shape in the file's layout."""
        if len(shape) < -self.axis or (self.transposed and len(shape) < 2):
            return False
        turned = (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape
        k, width = self.basis.shape
        lost = list(turned)
        lost[self.axis] = k
        return width == turned[self.axis] and tuple(self.along.shape) == tuple(lost)

    def put_back(self, values: mx.array) -> mx.array:
        """An edited tensor's values as float32, with the removed components set: in its layout.

        α U(UᵀW) is not simply added: edit-preserving rounding also shifted each line along the
        directions, and setting the components undoes that as well.
        """
        values = values.astype(mx.float32)
        lost = self.lost(values)
        more = lost @ self.basis if self.axis == -1 else self.basis.T @ lost
        return values + (mx.swapaxes(more, -1, -2) if self.transposed else more)

    def lost(self, values: mx.array) -> mx.array:
        """The difference of the components from those of an edited tensor, shaped as ``along``."""
        return self.along - self.of(values)

    def of(self, values: mx.array) -> mx.array:
        """The components of a tensor, whose float32 values are in the file's layout."""
        turned = mx.swapaxes(values, -1, -2) if self.transposed else values
        return turned @ self.basis.T if self.axis == -1 else self.basis @ turned


class Tensors(Protocol):
    """An object from which tensors can be read by name."""

    def values(self, name: str) -> mx.array:
        """A tensor in float32, in the file's layout."""


def taken(one: TensorEdit | TensorPlan, values: mx.array) -> Taken:
    """The components that an edit removes from a tensor.

    Args:
        one: the edit of the tensor.
        values: its float32 values before the edit, in the file's layout.
    """
    transposed = isinstance(one, TensorEdit) and one.transposed
    basis = one.edit.basis(one.writer)
    axis = one.edit.axis(one.writer, one.parameter)
    strength = one.edit.strength_of(one.writer)
    nothing = Taken(basis, basis, axis, transposed, strength)
    along = nothing.of(values.astype(mx.float32))
    mx.eval(along)
    fixed = None
    if isinstance(one.edit, Update | Routing):
        fixed = one.edit.taken(one.writer, along, axis)
    return Taken(along, basis, axis, transposed, strength, fixed)


# --- keeping it --------------------------------------------------------------------------------


def kept_path(path: Path) -> Path:
    """The path of an edited model's undo file: inside the folder, or beside the GGUF."""
    return path.with_name(f"{path.stem}.{KEPT}") if is_file(path) else path / KEPT


def check_keep(paths: Sequence[Path], name: str, form: str, norm: str = "none") -> None:
    """Check that ``--keep-undo`` is possible for these outputs.

    Args:
        paths: the outputs.
        name: the source's name.
        form: the source's format.
        norm: the value of ``--norm``.

    Raises:
        UserError: naming the output.
    """
    if norm != "none":
        raise UserError(
            f"--keep-undo: --norm {norm} changes every weight, which what the edit took out does "
            "not give back; leave one of the flags out."
        )
    for path in paths:
        if format_of(path) in ADAPTERS:
            raise UserError(
                f"--keep-undo: {path} is an adapter, which is undone by leaving it out; leave the "
                "flag out."
            )
        if format_of(path) != form:
            raise UserError(
                f"--keep-undo: {path} has another format than {name}; write the edit in the "
                "source's own format, and convert that."
            )
        if is_file(path):
            check_new(kept_path(path))


def keep(path: Path, parts: Iterable[tuple[str, Taken]], direction_sha256: str) -> None:
    """Write an undo file.

    Args:
        path: where it is written.
        parts: (tensor name in the edited model, components removed from it).
        direction_sha256: the hash of the directions, which shows that the file and an edited model
            belong together.
    """
    tensors, layouts = {}, {}
    for name, one in parts:
        tensors[f"{name}.along"], tensors[f"{name}.basis"] = one.along, one.basis
        layouts[name] = [one.axis, one.transposed, one.strength]
    mx.save_safetensors(
        str(path),
        tensors,
        {
            "format": "abl-mlx undo",
            "format_version": "1",
            "abl_mlx": __version__,
            "direction_sha256": direction_sha256,
            "tensors": json.dumps(layouts),
        },
    )


def keep_folder(path: Path, files: TensorFiles, plan: Plan, direction_sha256: str) -> None:
    """Write the undo file of an edit of a folder.

    Raises:
        UserError: when a tensor is quantized.
    """
    if plan.matrices:
        raise UserError(
            f"--keep-undo: {next(iter(plan.matrices))} is quantized, and its rounding cannot be "
            "undone; write -o NAME.adapter, which leaves the model as it is."
        )
    keep(
        path,
        (
            (name, taken(one, files.read(name).astype(mx.float32)))
            for name, one in plan.edits.items()
        ),
        direction_sha256,
    )


def keep_gguf(
    path: Path, gguf: GgufSource, plans: Mapping[str, TensorPlan], direction_sha256: str
) -> None:
    """Write the undo file of an edit of a GGUF.

    Raises:
        UserError: when a tensor is quantized.
    """
    for name, one in plans.items():
        if one.new.name not in FLOAT_DTYPES:
            raise UserError(
                f"--keep-undo: {name} is of the type {one.new.name}, whose rounding cannot be "
                "undone; write -o NAME.lora.gguf, which leaves the model as it is."
            )

    parts = ((name, taken(one, stored_values(gguf, name))) for name, one in plans.items())
    keep(path, parts, direction_sha256)


def read_kept(path: Path, direction_sha256: str) -> dict[str, Taken]:
    """Read an undo file.

    Raises:
        UserError: when it is damaged, or belongs to another edit.
    """
    tensors, metadata = safetensors_files.load(path)
    try:
        check(metadata, _METADATA)
        layouts: dict[str, Any] = json_text.parse(metadata["tensors"], _LAYOUTS)
    except Refused as refused:
        raise UserError(
            f"{path} could not be read as an undo file: of its metadata, {refused}; take the file "
            "that --keep-undo wrote."
        ) from None
    if metadata["direction_sha256"] != direction_sha256:
        raise UserError(f"{path} belongs to an edit along another direction.")
    found = {}
    for name, (axis, transposed, strength) in layouts.items():
        along, basis = (tensors.get(f"{name}.{part}") for part in ("along", "basis"))
        if along is None or basis is None or basis.ndim != 2:
            raise UserError(
                f"{path} could not be read as an undo file: it lacks what was taken of {name}."
            )
        found[name] = Taken(along, basis, axis, transposed, strength)
    return found


_METADATA = record({}, {"tensors": TEXT, "direction_sha256": TEXT})
_LAYOUT = (one_of([-1, -2]), FLAG, number())
_LAYOUTS = map_of(
    Kind(
        "[axis, transposed, strength]",
        lambda value: isinstance(value, list) and len(value) == len(_LAYOUT),
        lambda value: zip(("[0]", "[1]", "[2]"), value, _LAYOUT, strict=True),
    )
)
