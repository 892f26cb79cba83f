"""CodebookGrid: weights that are stored by the group, as entries of a codebook.

A group of G neighbouring weights in a row is ``scale * (signs * entry + shift)``. The entry is one
of the K vectors of the type's codebook; the signs of its G numbers are stored beside it where the
type has signs. As `convert.base.grids.Grid`, it knows nothing of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convert.base.grids import in_chunks

NONE, EVEN, FREE = "none", "even", "free"
"""Which signs a type stores: none; any with an even number of minus signs; or any."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """The vectors that a group of weights can be.

    Attributes:
        entries: float32, (K, G). With signs they are positive.
        signs: `NONE`, `EVEN` or `FREE`. An even number is meant within each group.
    """

    entries: np.ndarray
    signs: str

    @property
    def group(self) -> int:
        """G, the number of weights in an entry."""
        return int(self.entries.shape[1])


@dataclass(frozen=True, eq=False)
class CodebookGrid:
    """R rows of n weights in groups of G.

    Attributes:
        codes: uint16, (R, n // G): indices of entries.
        signs: uint8, (R, n // G): bit j is set where weight j of the group is negated.
        scales: float32, (R, n // G), finite.
        shifts: float32, (R, n // G); None where the type has none.
        book: the codebook.
        frame: private to the codec: the bytes that the grid was decoded from.
    """

    codes: np.ndarray
    signs: np.ndarray
    scales: np.ndarray
    shifts: np.ndarray | None
    book: Codebook
    frame: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(R, n)."""
        rows, groups = self.codes.shape
        return rows, groups * self.book.group

    def values(self) -> np.ndarray:
        """The weights, float32 (R, n), bit for bit as the format's own decoder gives them."""
        group = self.book.group
        codes, signs, scales = (
            part.reshape(-1) for part in (self.codes, self.signs, self.scales)
        )  # fmt: skip
        shifts = None if self.shifts is None else self.shifts.reshape(-1, 1)
        values = np.empty((len(codes), group), dtype=np.float32)
        bits = np.arange(group, dtype=np.uint8)

        def look_up(part: slice) -> None:
            found = self.book.entries[codes[part]]
            if self.book.signs != NONE:
                found *= 1 - 2 * ((signs[part, None] >> bits) & 1).astype(np.float32)
            if shifts is not None:
                found += shifts[part]
            with np.errstate(over="ignore"):
                np.multiply(found, scales[part, None], out=values[part])

        in_chunks(look_up, len(codes), group)
        return values.reshape(self.shape)

    def with_codes(self, codes: np.ndarray, signs: np.ndarray) -> CodebookGrid:
        """The same grid with other entries and signs; scales, shifts and frame are shared."""
        if codes.shape != self.codes.shape or signs.shape != self.signs.shape:
            raise ValueError(f"{codes.shape} codes for a grid of {self.codes.shape}")
        return replace(self, codes=codes, signs=signs)

    def changed(self, other: CodebookGrid) -> int:
        """The number of weights whose entry, or whose sign, is another in a grid of this shape."""
        same = (self.codes == other.codes) & (self.signs == other.signs)
        return int(np.count_nonzero(~same)) * self.book.group
