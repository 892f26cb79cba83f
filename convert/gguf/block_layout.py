"""Where the codes, scales and offsets of a GGML type stand in the bytes of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

#: How the whole numbers are stored that stand before a block's scales and offsets.
#: ONE: there are none; a scale is d, and an offset dmin itself.
#: FOUR_BITS: a byte for each group: a scale in its low half, an offset in its high half.
#: SIX_BITS: 12 bytes with 8 scales and 8 offsets. The low six bits of bytes 0-3 are the first four
#: scales, those of bytes 4-7 the first four offsets. Bytes 8-11 hold the low four bits of the other
#: scales and offsets, whose upper two bits are the upper two bits of bytes 0-7.
#: SIGNED_BYTES: a byte for each scale.
#: TABLE: a byte for each scale, which a table tells.
#: SIXTEEN: 16 scales of six bits less 32: eight bytes with two low halves, four with upper bits.
#: EIGHT: 8 scales of six bits less 32: two bytes with upper bits, four with two low halves.
ONE, FOUR_BITS, SIX_BITS, SIGNED_BYTES, TABLE, SIXTEEN, EIGHT = range(7)


@dataclass(frozen=True, eq=False)
class Layout:
    """The layout of a block.

    Attributes:
        planes: bits of the codes: for each plane its first byte, the bytes of a run, how many bits
            of a code it has, and the lowest of these. Byte i of a run of r bytes holds the bits of
            the weights i, r + i, 2 r + i, ... from its lowest bits upwards.
        fifth: the first of the bytes whose bit i is weight i's fifth bit; None if there are none.
        flip: bits of each code that are turned over.
        how: how the numbers before the scales and offsets are stored.
        at: the first byte of these numbers.
        d, dmin: the first bytes of the float16 factors of scales and offsets; None where there are
            no offsets.
        table: the scale of each byte, float32 numbers, where a table tells them.
    """

    planes: tuple[tuple[int, int, int, int], ...] = ()
    fifth: int | None = None
    flip: int = 0
    how: int = ONE
    at: int = 0
    d: int = 0
    dmin: int | None = None
    table: tuple[float, ...] = ()

    @cached_property
    def numbers(self) -> tuple[Any, ...]:
        """The same as `convert.gguf.block_kernels.decode` wants it, runs in words of 8 bytes."""
        planes = np.array(self.planes, np.int64).reshape(-1, 4)
        planes[:, 1] //= 8
        fifth, dmin = (-1 if one is None else one for one in (self.fifth, self.dmin))
        table = np.array(self.table, np.float32)
        return planes, fifth, self.flip, self.how, self.at, self.d, dmin, table
