"""Grid: the values a quantized tensor can take, whatever the file format.

A quantized weight is ``scale * level[code] + offset``. The scale and the offset belong to a group
of neighbouring weights in a row, the levels to the type; only the codes are chosen per weight. A
Grid knows nothing of bytes: the codec that made it (``convert/gguf/ggml_types.py``,
``convert/mlx/types.py``) turns it back into its format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from convert.base.cores import in_pieces

CHUNK = 1 << 18
"""Weights per piece of work: few enough for the CPU's cache, enough to occupy a thread."""


@dataclass(frozen=True, eq=False)
class Grid:
    """R rows of n quantized weights, each with one of the K levels of its group.

    A scale may be negative: the highest level is then the lowest value. ggml writes such scales in
    Q4_0, Q5_0, Q3_K, Q6_K, IQ4_NL and IQ4_XS, and MLX in affine mode. A scale may also be zero:
    every code then means the offset.

    Attributes:
        codes: uint8, (R, n): indices into ``levels``.
        levels: float32, (K,): strictly ascending, 2 <= K <= 256. Code k means the k-th level; where
            a format stores another number for that level, its codec translates.
        scales: float32, (R, n // group), finite.
        offsets: float32, (R, n // group), finite; None where the type has none.
        group: number of neighbouring weights in a row that share a scale and an offset.
        frame: private to the codec: whatever else it needs to write this tensor back, including the
            scales and offsets exactly as stored. It is not a copy, so the bytes that the Grid was
            decoded from must stay unchanged.
    """

    codes: np.ndarray
    levels: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None
    group: int
    frame: Any = None

    def __post_init__(self) -> None:
        rows, width = self.codes.shape
        if self.group < 1 or width % self.group:
            raise ValueError(f"rows of {width} codes are no multiple of groups of {self.group}")
        for part in (self.scales, self.offsets):
            if part is not None and part.shape != (rows, width // self.group):
                raise ValueError(f"{part.shape} scales or offsets for {self.codes.shape} codes")
        _check_codes(self.codes, len(self.levels))

    @property
    def shape(self) -> tuple[int, int]:
        """(R, n)."""
        rows, width = self.codes.shape
        return rows, width

    @property
    def uniform(self) -> bool:
        """Whether the levels are whole numbers, each by one greater than the last."""
        return _uniform(np.asarray(self.levels, np.float32).tobytes())

    def values(self) -> np.ndarray:
        """The weights, float32 (R, n), bit for bit as the format's own decoder gives them.

        One multiplication, then one addition, each rounded to float32, as gguf-py and ggml do it.
        """
        rows, width = self.shape
        values = np.empty((rows, width), dtype=np.float32)
        grouped = (rows * width // self.group, self.group)
        scales = self.scales.reshape(-1, 1)
        offsets = None if self.offsets is None else self.offsets.reshape(-1, 1)
        codes, flat = self.codes.reshape(grouped), values.reshape(grouped)

        def look_up(part: slice) -> None:
            # Mode "clip" is the fastest: it skips the check of indices, and all codes are below K.
            np.take(self.levels, codes[part], out=flat[part], mode="clip")
            with np.errstate(over="ignore"):
                flat[part] *= scales[part]
            if offsets is not None:
                flat[part] += offsets[part]

        in_chunks(look_up, len(codes), self.group)
        return values

    def with_codes(self, codes: np.ndarray) -> Grid:
        """The same grid with other codes, uint8 (R, n); scales, offsets and frame are shared.

        Raises:
            ValueError: when a code has no level, or the codes have another shape or dtype.
        """
        if codes.shape != self.codes.shape:
            raise ValueError(f"{codes.shape} codes for a grid of {self.codes.shape}")
        return replace(self, codes=codes)

    def changed(self, other: Grid) -> int:
        """The number of weights whose code is another in a grid of this shape."""
        return int(np.count_nonzero(self.codes != other.codes))

    def ends(self, beyond: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest value of every group, float32 (R, n // group) each.

        Args:
            beyond: how far past them to go, in units of the outermost step. At 0.5 these are the
                limits outside which every level is more than half a step away.
        """
        first = self.levels[0] - beyond * (self.levels[1] - self.levels[0])
        last = self.levels[-1] + beyond * (self.levels[-1] - self.levels[-2])
        with np.errstate(over="ignore"):
            one, other = self.scales * np.float32(first), self.scales * np.float32(last)
        if self.offsets is not None:
            one, other = one + self.offsets, other + self.offsets
        return np.minimum(one, other), np.maximum(one, other)

    def left_by(self, values: np.ndarray) -> np.ndarray:
        """Which groups cannot hold these values: those with a value over half a step past an end.

        Args:
            values: float32, (R, n).

        Returns:
            Indices of the groups, counted row after row.
        """
        rows, width = self.shape
        wanted = np.ascontiguousarray(values, dtype=np.float32)
        wanted = wanted.reshape(rows, width // self.group, self.group)
        lowest, highest = self.ends(beyond=0.5)
        left = np.empty(lowest.shape, dtype=bool)

        def look(part: slice) -> None:
            least, most = wanted[part].min(axis=2), wanted[part].max(axis=2)
            left[part] = (least < lowest[part]) | (most > highest[part])

        in_chunks(look, rows, width)
        return np.flatnonzero(left)

    def groups(self, which: np.ndarray) -> Grid:
        """The groups ``which`` (indices counted row after row), one a row, without a frame."""
        codes = self.codes.reshape(-1, self.group)[which]
        scales = self.scales.reshape(-1, 1)[which]
        offsets = None if self.offsets is None else self.offsets.reshape(-1, 1)[which]
        return Grid(codes, self.levels, scales, offsets, self.group)

    def squared_error(self, wanted: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """Sum over each row of (weight - wanted)²: float64 (R,), for ``wanted`` float32 (R, n).

        Args:
            wanted: what the weights should be.
            importance: factors of the squares, (n,) or (R, n); None for equal ones.
        """
        squares = np.square(self.values() - wanted, dtype=np.float64)
        return (squares if importance is None else squares * importance).sum(axis=1)

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """For each value the code whose weight is nearest: uint8 (R, n).

        Every weight is rounded separately. Where a scale is zero the code stays as it is.

        Args:
            values: float32, (R, n), finite.
        """
        rows, width = self.shape
        grouped = (rows * width // self.group, self.group)
        wanted = np.ascontiguousarray(values, dtype=np.float32).reshape(grouped)
        codes = np.array(self.codes).reshape(grouped)
        scales = self.scales.reshape(-1, 1)
        offsets = None if self.offsets is None else self.offsets.reshape(-1, 1)
        edges, uniform = (self.levels[1:] + self.levels[:-1]) / 2, self.uniform

        def round_part(part: slice) -> None:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                at = wanted[part] if offsets is None else wanted[part] - offsets[part]
                at = at / scales[part]
                if uniform:  # the number of edges below, which float64 counts exactly
                    count = np.ceil(at.astype(np.float64) - edges[0])
                    found = np.clip(count, 0, len(edges)).astype(np.uint8)
                else:
                    found = np.searchsorted(edges, at).astype(np.uint8)
            np.copyto(codes[part], found, where=scales[part] != 0)

        in_chunks(round_part, len(codes), self.group)
        return codes.reshape(rows, width)


@dataclass(frozen=True, eq=False)
class FloatGrid:
    """R rows of n weights in a plain float type such as float16, which has no groups or codes.

    So it has no ``with_codes``: the codec's ``round`` makes a FloatGrid of other values.

    Attributes:
        numbers: float32, (R, n), finite; the float type holds each of them exactly.
    """

    numbers: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(R, n)."""
        rows, width = self.numbers.shape
        return rows, width

    def values(self) -> np.ndarray:
        """The weights, float32 (R, n)."""
        return self.numbers


def in_chunks(work: Callable[[slice], None], count: int, width: int) -> None:
    """Call ``work`` on slices that together cover ``range(count)``, on all cores.

    NumPy releases the interpreter lock inside its loops, so threads are enough.

    Args:
        work: called with one slice; different calls must not write to the same place.
        count: how many items there are.
        width: number of weights in an item.
    """
    in_pieces(work, count, max(1, CHUNK // max(width, 1)))


@cache
def _uniform(levels: bytes) -> bool:
    """Whether float32 numbers are `Grid.uniform`; there are as many sorts of levels as of types."""
    numbers = np.frombuffer(levels, np.float32)
    return float(numbers[0]).is_integer() and bool(np.all(np.diff(numbers) == 1))


def _check_codes(codes: np.ndarray, levels: int) -> None:
    if codes.dtype != np.uint8:
        raise ValueError(f"codes of dtype {codes.dtype}, not uint8")
    if levels < 256 and codes.size and (highest := int(codes.max())) >= levels:
        raise ValueError(f"code {highest} in a grid of {levels} levels")
