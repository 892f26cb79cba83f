"""Slabs: parts of a tensor that are edited separately, which bounds the memory in use.

A slab is a run of columns of a writer or of rows of an embedding. Each column or row has its own
constraint, so slabs are independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from abl_mlx.edits import edit, projection, rounding
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.models.writers import Writer
from abl_mlx.support.arrays import numpy_of
from convert.base.errors import UserError
from convert.base.grids import Grid

#: Weights in a slab: 32 MB of float32. A few such arrays are in memory at the same time.
SLAB = 1 << 23

#: The number of lines of a tensor on which its own grid and a fresh one are compared.
SAMPLE = 256


class Edited(Protocol):
    """The edit of one tensor, as this module needs it."""

    @property
    def name(self) -> str:
        """The tensor's name, for messages."""

    @property
    def edit(self) -> WeightEdit:
        """The edit; of the rows of a slab only, where that is what is edited."""

    @property
    def writer(self) -> Writer:
        """The writer that the tensor belongs to."""

    @property
    def parameter(self) -> str:
        """``weight`` or ``bias``."""


@dataclass(frozen=True)
class Slab:
    """A part of a tensor that is edited separately.

    Attributes:
        rows: a range of the tensor's rows, counted through all experts.
        columns: a range of columns, in whole blocks of the tensor's type.
    """

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(R, n)."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def part(self, rows: slice, columns: slice) -> Slab:
        """Some of its rows and columns, counted from its first."""
        top, left = self.rows.start, self.columns.start
        return Slab(
            slice(top + rows.start, top + rows.stop),
            slice(left + columns.start, left + columns.stop),
        )


def slabs(shape: tuple[int, ...], axis: int, block: int) -> Iterator[Slab]:
    """Cover a tensor with slabs of about `SLAB` weights, expert by expert, in file order.

    Args:
        shape: (out, in), (E, out, in), (V, d) or (d,).
        axis: the axis along which the edit's lines run, -1 or -2; a slab holds whole lines.
        block: weights in a block of the type; a slab has whole blocks.
    """
    n = shape[-1]
    total = int(np.prod(shape[:-1]))
    if axis == -1:
        step = max(1, SLAB // n)
        each = shape[-2] if len(shape) == 3 else total
        for expert in range(0, total, each):
            for first in range(expert, expert + each, step):
                yield Slab(slice(first, min(expert + each, first + step)), slice(0, n))
        return
    d = shape[-2]
    step = max(1, SLAB // (d * block)) * block
    for first in range(0, total, d):
        for start in range(0, n, step):
            yield Slab(slice(first, first + d), slice(start, min(n, start + step)))


def sample(shape: tuple[int, ...], axis: int, block: int) -> Slab:
    """A few whole lines from the middle of a tensor (of its first expert, if it has several)."""
    n, total = shape[-1], int(np.prod(shape[:-1]))
    if axis == -1:
        first = max(0, (total - SAMPLE) // 2)
        return Slab(slice(first, min(total, first + SAMPLE)), slice(0, n))
    lines = max(1, SAMPLE // block) * block
    first = max(0, (n - lines) // 2 // block * block)
    return Slab(slice(0, shape[-2]), slice(first, min(n, first + lines)))


def exact_edit(one: Edited, source: np.ndarray | Grid) -> rounding.Edited:
    """The exact edited values of a slab, float32, and the component that rounding must preserve.

    Args:
        one: the edit of the tensor.
        source: its weights before the edit, (R, n) float32 or a grid.

    Raises:
        UserError: when the values are not finite; or when the edit keeps the norms of rows, which
            is impossible for a slab because it does not hold whole rows.
    """
    if one.edit.norm == "rows":
        raise UserError(
            f"--norm rows is for float folders only, and {one.name} is quantized or in a GGUF: use "
            "--norm columns, which keeps a full removal full."
        )
    axis = 1 if one.edit.axis(one.writer, one.parameter) == -1 else 0
    basis, stream = numpy_of(one.edit.basis(one.writer)), axis - 2
    if one.edit.norm == "none":
        # A weight that is not finite makes its line's component not finite.
        taken = one.edit.taken(one.writer, projection.along(basis, source, stream), stream)
        finite = bool(np.isfinite(taken).all())
        exact: np.ndarray | Grid = source
        if not isinstance(source, Grid):
            exact = projection.without(basis, taken, source, stream)
    else:
        values = source.values() if isinstance(source, Grid) else source
        exact = edit.exact(one.edit, one.writer, one.parameter, values)
        finite = bool(np.isfinite(exact).all())
        taken = projection.along(basis, values - exact, stream)
    if not finite:
        raise UserError(
            f"{one.name} holds NaN or infinity after the edit: the file is damaged, or --strength "
            "is too large."
        )
    taken = np.ascontiguousarray(taken if axis == 1 else taken.T, dtype=np.float32)
    length = math.sqrt(projection.square(taken) / len(taken))
    return rounding.Edited(exact, basis, axis, length, taken)
