"""Moves values between stored tensors and parameters, by the records of `weights`.

`joined` makes a parameter from the tensors that hold it, and `put` does the reverse: it fills the
part of a tensor that a parameter holds. Rows are arrays of numbers, or bytes of quantized blocks,
which are moved without being decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from convert.architectures.weights import Weight

GROUP = 32
"""Weights in a block of the quantized types that are moved."""


def whole_groups(columns: np.ndarray, group: int = GROUP) -> np.ndarray | None:
    """The order of groups in an order of columns; None when columns of one group are separated."""
    if len(columns) % group:
        return None
    table = columns.reshape(-1, group)
    if (table[:, 0] % group).any() or (np.diff(table, axis=1) != 1).any():
        return None
    return table[:, 0] // group


def _grouped(values: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of blocks as (rows, blocks, bytes), and the order of blocks that the columns have."""
    order = whole_groups(columns)
    assert order is not None
    return values.reshape(len(values), len(order), -1), order


def joined(weight: Weight, read: Callable[[str], np.ndarray], *, raw: bool = False) -> np.ndarray:
    """The values of a parameter.

    Args:
        weight: which tensors hold it.
        read: gives a tensor's values in its shape.
        raw: the values are rows of blocks, (rows, bytes): neither reshaped nor changed. Columns
            are moved by whole blocks.
    """
    parts = []
    for piece in weight.pieces:
        values = read(piece.tensor)
        if piece.rows is not None or piece.columns is not None or len(weight.pieces) > 1 or raw:
            values = rows_of(values)
        if piece.rows is not None:
            values = values[piece.rows]
        if piece.columns is not None and raw:
            blocks, order = _grouped(values, piece.columns)
            values = blocks[:, order].reshape(len(values), -1)
        elif piece.columns is not None:
            values = values[:, piece.columns]
        parts.append(values)
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if raw:
        return whole
    if weight.shape is not None:
        whole = whole.reshape(weight.shape)
    return whole if weight.change is None else weight.change(whole)


def put(
    weight: Weight,
    values: np.ndarray,
    tensor: str,
    into: np.ndarray,
    rows: Callable[[str], int],
    *,
    raw: bool = False,
) -> None:
    """Fill the rows and columns of a tensor that a parameter holds.

    Args:
        weight: which tensors hold the parameter.
        values: the parameter's values.
        tensor: one of those tensors.
        into: its values, to be filled: (rows, n), or (n,) of a vector.
        rows: gives the number of a tensor's rows, or of a vector's elements.
        raw: as for `joined`.
    """
    if weight.change is not None and not raw:
        assert weight.change.undo is not None, weight.path
        values = weight.change.undo(values)
    columns = (
        None
        if raw
        else next((piece.columns for piece in weight.pieces if piece.columns is not None), None)
    )
    width = () if into.ndim == 1 else (into.shape[-1] if columns is None else len(columns),)
    values = values.reshape(-1, *width)
    first = 0
    for piece in weight.pieces:
        count = rows(piece.tensor) if piece.rows is None else len(piece.rows)
        if piece.tensor == tensor:
            part = values[first : first + count]
            if piece.rows is None and piece.columns is None:
                into[...] = part
            elif piece.columns is None:
                into[piece.rows] = part
            else:
                taken = into if piece.rows is None else into[piece.rows]
                if raw:
                    blocks, order = _grouped(taken, piece.columns)
                    blocks[:, order] = part.reshape(blocks.shape)
                else:
                    taken[:, piece.columns] = part
                if piece.rows is not None:
                    into[piece.rows] = taken
        first += count


def row_count(shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], int]:
    """For `put`: the number of rows of a tensor of these shapes, or of a vector's elements."""

    def rows(name: str) -> int:
        shape = shapes[name]
        return shape[0] if len(shape) == 1 else math.prod(shape[:-1])

    return rows


def rows_of(values: np.ndarray) -> np.ndarray:
    """A view of values as rows, (rows, n); a vector stays one."""
    return values if values.ndim == 1 else values.reshape(-1, values.shape[-1])
