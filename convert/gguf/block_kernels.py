"""Numba kernels of `ggml_blocks`: codes, scales and offsets of blocks of bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from convert.base.compiled import compiled
from convert.gguf.block_layout import (
    EIGHT,
    FOUR_BITS,
    ONE,
    SIGNED_BYTES,
    SIX_BITS,
    SIXTEEN,
    TABLE,
)

F, I, U = np.float32, np.int64, np.uint64

# One in each byte, and a bit more in each.
_ONES, _BITS = 0x0101010101010101, 0x8040201008040201

# 2 ** (e - 25) for each exponent e of a float16, whose first one is that of the subnormal numbers,
# and whose last one that of infinity and NaN.
_POWERS = np.ldexp(F(1), np.arange(32) - 25).astype(F)
_POWERS[0], _POWERS[31] = 2.0**-24, np.nan


@intrinsic
def eight(typing: Any, data: Any, at: Any) -> Any:
    """The eight bytes of a uint8 array from ``at`` on as a uint64; they need not be aligned."""

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        kind = context.get_data_type(types.uint64)
        place = builder.gep(array.data, [arguments[1]])
        word = builder.load(builder.bitcast(place, kind.as_pointer()))
        word.align = 1
        return word

    return types.uint64(data, types.intp), make


@compiled(inner=True)
def half(data, at):
    """The float16 at byte ``at`` as float32; NaN if it is not finite."""
    high = I(data[at + 1])
    exponent, mantissa = (high >> 2) & 31, I(data[at]) | ((high & 3) << 8)
    size = F(mantissa + (1024 if exponent else 0)) * _POWERS[exponent]
    return -size if high >> 7 else size


@compiled(inner=True)
def two(data, how, at, g):
    """The whole numbers that stand before scale and offset ``g`` of the block at byte ``at``."""
    if how == SIX_BITS:
        if g < 4:
            return I(data[at + g]) & 63, I(data[at + 4 + g]) & 63
        low = I(data[at + 4 + g])
        first, second = I(data[at + g - 4]) >> 6, I(data[at + g]) >> 6
        return low & 15 | first << 4, low >> 4 | second << 4
    if how == FOUR_BITS:
        byte = I(data[at + g])
        return byte & 15, byte >> 4
    if how == SIGNED_BYTES:
        byte = I(data[at + g])
        return byte - ((byte & 128) << 1), I(0)
    if how == SIXTEEN:
        low = I(data[at + g % 8]) >> (g // 8 * 4)
        return (low & 15 | (I(data[at + 8 + g % 4]) >> (g // 4 * 2) & 3) << 4) - 32, I(0)
    if how == EIGHT:
        low = I(data[at + 2 + g // 2]) >> (g % 2 * 4)
        return (low & 15 | (I(data[at + g // 4]) >> (g % 4 * 2) & 3) << 4) - 32, I(0)
    return I(1), I(1)


@compiled()
def decode(data, size, planes, fifth, flip, how, at, d, dmin, table, codes, scales, offsets):
    """Write the codes, scales and offsets of B blocks.

    Args:
        data: their bytes, one block after the other: uint8, (B · size,).
        size: bytes in a block.
        planes, fifth, flip, how, at, d, dmin, table: `convert.gguf.block_layout.Layout.numbers`.
        codes: the result, eight in each uint64, (B, block / 8).
        scales, offsets: the result, (B, groups), or (B, 0) where there are none or none are wanted.

    Returns:
        The first block with a scale or offset that is not finite, or -1.
    """
    bad, over, shifted = -1, U(flip) * U(_ONES), offsets.shape[1] > 0
    for block in range(scales.shape[0] if scales.shape[1] else 0):
        base, fine = block * size, True
        scale = F(1) if how == TABLE else half(data, base + d)
        offset = half(data, base + dmin) if shifted else F(0)
        for g in range(scales.shape[1]):
            if how == TABLE:
                scales[block, g] = table[data[base + at + g]]
            else:
                first, second = two(data, how, base + at, g)
                scales[block, g] = scale * F(first)
                if shifted:
                    offsets[block, g] = offset if how == ONE else -(offset * F(second))
            fine &= scales[block, g] - scales[block, g] == 0
        if not fine or offset - offset != 0:
            bad = block if bad < 0 else bad
    count = codes.shape[1]
    for p in range(planes.shape[0]):
        run, bits, left = planes[p, 1], planes[p, 2], U(planes[p, 3])
        parts, mask = 8 // bits, U(((1 << bits) - 1) * _ONES)
        words = count // parts
        for block in range(codes.shape[0]):
            start = block * size + planes[p, 0]
            if words == 2 and bits == 4:  # a loop of two takes longer than its steps
                one, other = eight(data, start), eight(data, start + 8)
                codes[block, 0], codes[block, 1] = one & mask, other & mask
                codes[block, 2], codes[block, 3] = one >> U(4) & mask, other >> U(4) & mask
                continue
            if bits == 8:
                for i in range(words):
                    codes[block, i] = eight(data, start + 8 * i) ^ over
                continue
            for first in range(0, words, run):
                for part in range(parts):
                    right, to = U(bits * part), first * parts + part * run
                    for i in range(run):
                        word = ((eight(data, start + 8 * (first + i)) >> right) & mask) << left
                        codes[block, to + i] = codes[block, to + i] | word if p else word
    if fifth >= 0:
        for block in range(codes.shape[0]):
            start = block * size + fifth
            for i in range(count):
                word = (U(data[start + i]) * U(_ONES)) & U(_BITS)
                word = ((word + U(127 * _ONES)) >> U(7)) & U(_ONES)
                codes[block, i] |= word << U(4)
    return bad
