"""Scales near a tensor's own, with which its grid holds changed weights better.

ggml's quantizer looks for the scales of a group anew, which takes longer than all else in an edit
of a tensor. An edit changes weights by less than a step, so good scales lie next to the present
ones: of the numbers that the type can store, the nearest few are tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from gguf import GGMLQuantizationType as Q

from convert.base import halves, near_scales
from convert.base.grids import Grid
from convert.gguf.ggml_blocks import six_bits
from convert.gguf.ggml_codecs import GridCodec

# The steps of scale and offset that are tried, and whether these begin at the best so far.
# With an offset, a wider step goes along with a lower start, so that the middle of a group stays;
# then come steps to either side. With five bits the error is less smooth, so more pairs are tried.
_SCALES = np.array([(k, 0, 0) for k in (0, -1, 1, -2, 2, -3, 3, -4, 4)], np.int16)
_FLOATS = np.array([(k, 0, 0) for k in (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6)], np.int16)
_BESIDE = [(1, 0, 1), (-1, 0, 1), (0, 1, 1), (0, -1, 1)]
_PAIRS = np.array([(k, k, 0) for k in (0, 1, -1, 2, -2)] + _BESIDE, np.int16)
_MORE_PAIRS = np.array(
    [
        (0, 0, 0), (0, -1, 0), (0, 1, 0), (-1, 0, 0), (1, 0, 0), (-1, -1, 0), (1, 1, 0),
        (-2, -2, 0), (2, 2, 0), (-1, -2, 0), (1, 2, 0), (-2, -1, 0), (2, 1, 0), (1, -1, 0),
        (-1, 1, 0),
    ],
    np.int16,
)  # fmt: skip
_NONE = _SCALES[:1]

# A step of a scale that is a float16, in units of its last place: 0.6 to 1.2 percent.
_PLACES = 12


@dataclass(frozen=True)
class _Layout:
    """Where the whole numbers are whose multiples the scales and offsets of a type are.

    Attributes:
        read: blocks, uint8 (B, size) -> the numbers of scales and of offsets, int16 (2, B, groups);
            without offsets, (1, B, groups).
        write: puts such numbers into blocks.
        units: the bytes at which the float16 units of both begin.
        ends: the least and greatest number that can be stored.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray, np.ndarray], None]
    units: tuple[int, ...]
    ends: tuple[int, int]


def _read_bytes(blocks: np.ndarray) -> np.ndarray:
    return blocks[None, :, 192:208].view(np.int8).astype(np.int16)


def _write_bytes(blocks: np.ndarray, numbers: np.ndarray) -> None:
    blocks[:, 192:208] = numbers[0].astype(np.int8).view(np.uint8)


def _read_halves(blocks: np.ndarray) -> np.ndarray:
    return np.stack((blocks[:, :16] & 15, blocks[:, :16] >> 4)).astype(np.int16)


def _write_halves(blocks: np.ndarray, numbers: np.ndarray) -> None:
    low, high = numbers.astype(np.uint8)
    blocks[:, :16] = low | high << 4


def _read_six_bits(blocks: np.ndarray) -> np.ndarray:
    return np.stack([six_bits(blocks, kind) for kind in (0, 1)]).astype(np.int16)


def _write_six_bits(blocks: np.ndarray, numbers: np.ndarray) -> None:
    words = numbers.astype(np.uint8).view(np.uint32)  # four numbers at a time
    first, last = words[:, :, 0], words[:, :, 1]
    found = np.empty((len(blocks), 3), np.uint32)
    found[:, :2] = (first | ((last >> 4) & 0x03030303) << 6).T
    found[:, 2] = (last[0] & 0x0F0F0F0F) | (last[1] & 0x0F0F0F0F) << 4
    blocks[:, 4:16] = found.view(np.uint8)


def _read_q3(blocks: np.ndarray) -> np.ndarray:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    numbers = np.concatenate((low & 15, low >> 4), axis=1).astype(np.int16)
    for part in range(4):
        numbers[:, 4 * part : 4 * part + 4] |= ((high >> (2 * part)) & 3).astype(np.int16) << 4
    return numbers[None] - 32


def _write_q3(blocks: np.ndarray, numbers: np.ndarray) -> None:
    stored = (numbers[0] + 32).astype(np.uint8)
    blocks[:, 96:104] = (stored[:, :8] & 15) | stored[:, 8:] << 4
    upper = stored >> 4
    blocks[:, 104:108] = (
        upper[:, :4] | upper[:, 4:8] << 2 | upper[:, 8:12] << 4 | upper[:, 12:] << 6
    )


_SIX_BITS = _Layout(_read_six_bits, _write_six_bits, (0, 2), (0, 63))
_LAYOUTS = {
    Q.Q2_K: _Layout(_read_halves, _write_halves, (80, 82), (0, 15)),
    Q.Q3_K: _Layout(_read_q3, _write_q3, (108,), (-32, 31)),
    Q.Q4_K: _SIX_BITS,
    Q.Q5_K: _SIX_BITS,
    Q.Q6_K: _Layout(_read_bytes, _write_bytes, (208,), (-128, 127)),
}
# Types whose blocks begin with a float16 that is the scale itself.
_FLOAT_SCALES = (Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0)


def near(
    wanted: near_scales.Less, codec: GridCodec, importance: np.ndarray | None = None
) -> tuple[Grid, np.ndarray]:
    """Move a grid's scales to near ones that hold its weights better after something is taken away.

    Args:
        wanted: a tensor's own grid, and what is taken from its weights. Its levels are whole
            numbers in a row.
        codec: the codec of its type.
        importance: float32 (n,): weights of the columns' squared errors; None for equal ones.

    Returns:
        The grid, whose codes are unchanged; and the groups that have weights past their ends still,
        counted row after row.
    """
    grid = wanted.grid
    blocks = np.ascontiguousarray(grid.frame).reshape(-1, codec.size)
    layout = _LAYOUTS.get(codec.type)
    numbers = layout.read(blocks) if layout else np.zeros((1, len(blocks), 1), np.int16)
    choices = _choices(grid, codec, blocks, numbers)
    found, past = near_scales.search(wanted, choices, importance)
    if not found.any():
        return grid, past
    raw = np.array(grid.frame)
    blocks = raw.reshape(-1, codec.size)
    if layout:
        layout.write(blocks, numbers + found[: len(numbers)].reshape(numbers.shape))
    else:
        moved = grid.scales + found[0] * choices.steps[0]
        blocks[:, :2] = halves.narrowed(moved, "F16").reshape(-1, 1).view(np.uint8)
    return codec.with_scales(grid, raw), past


def _choices(
    grid: Grid, codec: GridCodec, blocks: np.ndarray, numbers: np.ndarray
) -> near_scales.Choices:
    """The scales near those of a grid that its type can store."""
    found = near_scales.Choices.none(grid)
    shape, layout = grid.scales.shape, _LAYOUTS.get(codec.type)
    if codec.type in _FLOAT_SCALES:
        # The last place of a float16 is the power of two that its exponent means, times 2⁻¹⁰.
        powers = (grid.scales.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
        found.steps[0] = _PLACES * np.maximum(powers * np.float32(2**-10), np.float32(2**-24))
        found.limits[0], found.limits[1] = _FLOATS.min(), _FLOATS.max()
    if layout is None:
        return replace(found, moves=_FLOATS if codec.type in _FLOAT_SCALES else _NONE)
    for which, whole in enumerate(numbers):
        unit = _float16(blocks, layout.units[which]).astype(np.float32)
        unit = unit if which == 0 else -unit
        found.steps[which] = np.broadcast_to(unit, whole.shape).reshape(shape)
        least, most = layout.ends[0] - whole, layout.ends[1] - whole
        if which == 0:  # a scale keeps its sign, and a group without one stays
            least = np.where(whole > 0, np.maximum(least, 1 - whole), least) * (whole != 0)
            most = np.where(whole < 0, np.minimum(most, -1 - whole), most) * (whole != 0)
        found.limits[2 * which], found.limits[2 * which + 1] = (
            least.reshape(shape), most.reshape(shape)
        )  # fmt: skip
    pairs = _MORE_PAIRS if codec.type == Q.Q5_K else _PAIRS
    return replace(found, moves=pairs if len(numbers) > 1 else _SCALES)


def _float16(blocks: np.ndarray, at: int) -> np.ndarray:
    return blocks[:, at : at + 2].view("<f2")
