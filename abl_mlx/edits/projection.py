"""Components of weights along directions, and their removal, with the same result on every CPU.

BLAS sums in an order that depends on the CPU, its number of cores, and the library. Quantization
codes depend on these sums, so here the order is fixed: short pieces are summed in float32, and the
pieces in float64. All arrays are float32 in NumPy. The residual stream is axis -2 of weights
(..., d, n), or the last axis of weights (..., d).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.base.grids import CHUNK, Grid, in_chunks


def along(basis: np.ndarray, values: np.ndarray | Grid, axis: int) -> np.ndarray:
    """The components of weights along each direction.

    Args:
        basis: the directions, (k, d).
        values: (..., d, n) for axis -2, (..., d) for axis -1; or a grid of such weights, of which
            no array is made.
        axis: the axis of the residual stream.

    Returns:
        (..., k, n), or (..., k).
    """
    from abl_mlx.edits import projection_kernels as kernels

    basis = _plain(basis)
    k, d = basis.shape
    if isinstance(values, Grid):
        return _along_grid(basis, values, axis)
    if axis == -1:
        rows = _plain(values).reshape(-1, d)
        out = np.empty((len(rows), k), np.float32)
        in_chunks(lambda p: kernels.across(basis, rows, out, p.start, p.stop), len(rows), d)
        return out.reshape(*values.shape[:-1], k)
    out = np.empty((*values.shape[:-2], k, values.shape[-1]), np.float32)
    for one, found in _matrices(values, out):
        in_chunks(
            lambda p, one=one, found=found: kernels.down(  # type: ignore[misc]
                basis, one, found, p.start, p.stop
            ),
            one.shape[1], min(d, CHUNK // 512),
        )  # fmt: skip
    return out


def _along_grid(basis: np.ndarray, grid: Grid, axis: int) -> np.ndarray:
    from abl_mlx.edits import projection_kernels as kernels

    k, (rows, n) = len(basis), grid.shape
    out = np.empty((rows, k) if axis == -1 else (k, n), np.float32)
    arguments = (basis, *of_grid(grid))
    if axis == -1:
        in_chunks(lambda p: kernels.grid_across(*arguments, out, p.start, p.stop), rows, n)
    else:
        strip = -(-_STRIP // grid.group) * grid.group
        in_chunks(
            lambda p: kernels.grid_down(*arguments, strip, out, p.start, p.stop),
            -(-n // strip), min(rows, CHUNK // strip) * strip,
        )  # fmt: skip
    return out


# Columns that are summed together.
_STRIP = 512


def of_grid(grid: Grid) -> tuple[Any, ...]:
    """Codes, scales, offsets, group, uniformity and levels of a grid, as the kernels want them."""
    rows = len(grid.codes)
    offsets = np.empty((rows, 0), np.float32) if grid.offsets is None else _plain(grid.offsets)
    codes, levels = np.ascontiguousarray(grid.codes), np.array(grid.levels, np.float32)
    return codes, _plain(grid.scales), offsets, grid.group, grid.uniform, levels


def without(basis: np.ndarray, components: np.ndarray, values: np.ndarray, axis: int) -> np.ndarray:
    """Weights without these components: W − Uᵀ c (axis -2), or W − c U (axis -1).

    Args:
        basis: the directions U, (k, d).
        components: c, in the shape that `along` returns.
        values: W, as for `along`.
        axis: the axis of the residual stream.
    """
    basis, components = _plain(basis), _plain(components)
    k, d = basis.shape
    made = np.empty(values.shape, np.float32)
    if axis == -1:
        _subtract(_plain(values).reshape(-1, d), components.reshape(-1, k), basis,
                  made.reshape(-1, d))  # fmt: skip
        return made
    each = components.reshape(-1, k, values.shape[-1])
    for (one, out), part in zip(_matrices(values, made), each, strict=True):
        _subtract(one, basis.T, part, out)
    return made


def _subtract(values: np.ndarray, left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
    """Write values − left @ right to ``out``, for (R, n), (R, k) and (k, n), term after term."""

    few = max(1, _PRODUCT // max(1, values.shape[1]))

    def work(part: slice) -> None:
        for first in range(part.start, part.stop, few):
            some = slice(first, min(part.stop, first + few))
            rest = values[some]
            for a in range(len(right)):
                rest = np.subtract(rest, left[some, a : a + 1] * right[a], out=out[some])

    in_chunks(work, *values.shape)


# Weights of which a product is made at a time: it stays in the CPU's cache.
_PRODUCT = 1 << 15


def in_lines(work: Callable[..., None], axis: int, *arrays: np.ndarray) -> None:
    """Call ``work`` with views of whole lines of arrays of one shape, all of them, on all cores.

    Args:
        work: called with a matrix of each array, of about `CHUNK` weights.
        axis: the axis along which lines run; see `along`.
        arrays: writeable ones have their memory in order.
    """
    if axis == -1:
        flat = [one.reshape(-1, one.shape[-1]) for one in arrays]
        in_chunks(lambda part: work(*(one[part] for one in flat)), *flat[0].shape)
        return
    d, n = arrays[0].shape[-2:]
    for each in zip(*(one.reshape(-1, d, n) for one in arrays), strict=True):
        in_chunks(lambda part, each=each: work(*(one[:, part] for one in each)), n, d)  # type: ignore[misc]


# Up to so many numbers are squared and added one after the other, which the kernel also does.
_FEW = 32


def squares(values: np.ndarray, axis: int) -> np.ndarray:
    """Σ w² along an axis: float64 (..., n) for axis -2, (...) for axis -1."""
    from abl_mlx.edits import projection_kernels as kernels

    if axis == -1:
        rows = _plain(values).reshape(-1, values.shape[-1])
        sums = np.zeros(len(rows), np.float64)
        if rows.shape[1] <= _FEW:
            for column in rows.T:  # to the same bits as the kernel, which need not be compiled
                sums += np.square(column, dtype=np.float64)
            return sums.reshape(values.shape[:-1])
        in_chunks(lambda p: kernels.squares_across(rows, sums, p.start, p.stop), *rows.shape)
        return sums.reshape(values.shape[:-1])
    out = np.empty((*values.shape[:-2], 1, values.shape[-1]), np.float64)
    for one, found in _matrices(values, out):
        in_chunks(
            lambda p, one=one, found=found: kernels.squares_down(  # type: ignore[misc]
                one, found[0], p.start, p.stop
            ),
            one.shape[1], min(one.shape[0], CHUNK // 512),
        )  # fmt: skip
    return out[..., 0, :]


def square(values: np.ndarray) -> float:
    """Σ w² over all values."""
    if values.size == 0:
        return 0.0
    rows = values.reshape(1, -1) if values.ndim < 2 else values.reshape(-1, values.shape[-1])
    return math.fsum(squares(rows, -1))


@dataclass(frozen=True)
class Compared:
    """What is compared of a matrix before and after an edit.

    Attributes:
        before, after: its components, in the shape that `along` gives.
        moved: Σ (w' − w)².
        squares: Σ w².
    """

    before: np.ndarray
    after: np.ndarray
    moved: float
    squares: float


def compare(basis: np.ndarray, old: np.ndarray, new: np.ndarray, axis: int) -> Compared:
    """Compare two float32 arrays of weights, w and w'.

    Args:
        basis: the directions, (k, d).
        old, new: w and w', as for `along`.
        axis: the axis of the residual stream.
    """
    found = along(basis, old, axis), along(basis, new, axis)
    moved: list[float] = []
    in_lines(lambda one, other: moved.append(square(other - one)), axis, old, new)
    return Compared(*found, math.fsum(moved), square(old))


#: Weights w and w' of some rows and columns of two matrices: float32, or grids.
Pair = Callable[[slice, slice], tuple[np.ndarray | Grid, np.ndarray | Grid]]


def compare_read(basis: np.ndarray, pair: Pair, shape: tuple[int, int], axis: int) -> Compared:
    """Compare two matrices that are decoded in pieces, which stay in the CPU's cache.

    Args:
        basis: the directions, (k, d).
        pair: reads both matrices; it is called in several threads. The columns that it is asked
            for begin at a multiple of 512.
        shape: (R, n).
        axis: the axis of the residual stream.
    """
    basis = _plain(basis)
    k, (rows, n) = len(basis), shape
    if axis == -1:
        sums = np.zeros((2 * k + 2, rows), np.float64)
        whole = slice(0, n)
        in_chunks(lambda p: _add(basis, *pair(p, whole), axis, sums[:, p]), rows, n)
        return Compared(sums[:k].T, sums[k:-2].T, math.fsum(sums[-2]), math.fsum(sums[-1]))
    sums = np.zeros((2 * k + 2, n), np.float64)

    def down(columns: slice) -> None:
        for top in range(0, rows, CHUNK // _STRIP):
            some = slice(top, min(rows, top + CHUNK // _STRIP))
            _add(_plain(basis[:, some]), *pair(some, columns), axis, sums[:, columns])

    in_chunks(down, n, CHUNK // _STRIP)
    return Compared(sums[:k], sums[k:-2], math.fsum(sums[-2]), math.fsum(sums[-1]))


def _add(
    basis: np.ndarray, old: np.ndarray | Grid, new: np.ndarray | Grid, axis: int, sums: np.ndarray
) -> None:
    """Add the components of w and w' and the squares of w' − w and w, of each line, to sums."""
    from abl_mlx.edits import projection_kernels as kernels

    if isinstance(old, Grid) and isinstance(new, Grid):
        work = kernels.both_across if axis == -1 else kernels.both_down
        work(basis, of_grid(old), of_grid(new), sums)
        return
    one, other = (part.values() if isinstance(part, Grid) else part for part in (old, new))
    found = [along(basis, part, axis) for part in (one, other)]
    sums[:-2] += np.concatenate([part.T if axis == -1 else part for part in found])
    sums[-2:] += squares(other - one, axis), squares(one, axis)


def orthonormal(directions: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the span of ``directions`` (k, d) by Gram-Schmidt: float32 (k, d).

    It is computed in float64 with correctly rounded sums. Each direction keeps its sign.

    Raises:
        ValueError: when a direction is zero, not finite, or linearly dependent on earlier ones.
    """
    found: list[np.ndarray] = []
    for one in directions.astype(np.float64):
        length = math.sqrt(math.fsum(one * one)) if np.isfinite(one).all() else 0.0
        if not 0 < length < math.inf:
            raise ValueError("zero or not finite")
        left = one / length
        for _ in range(2 if found else 0):  # the second time removes what rounding left
            for other in found:
                left = left - math.fsum(left * other) * other
        rest = math.sqrt(math.fsum(left * left))
        if rest < 1e-4:
            raise ValueError("dependent")
        found.append(left / rest)
    return np.array(found).astype(np.float32)


def _plain(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32)


def _matrices(values: np.ndarray, out: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each matrix (d, n) of a stack with the part of ``out`` that belongs to it."""
    stack = _plain(values).reshape(-1, *values.shape[-2:])
    yield from zip(stack, out.reshape(-1, *out.shape[-2:]), strict=True)
