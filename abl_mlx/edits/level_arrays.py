"""The levels nearest to weights, as MLX arrays: what `level_kernels` computes, to the same bits.

MLX's own types have levels of three kinds: whole numbers in a row, and the numbers of E2M1 and
E4M3. The nearest of the latter is computed from the bits of a float32, so that nothing is searched.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from convert.base.grids import Grid

# How many numbers E2M1 and E4M3 have -> the exponent of the smallest, as float32 has it, and the
# bits of the mantissa.
_FORMS = {15: (127, 1), 253: (121, 3)}


@dataclass(frozen=True)
class Levels:
    """The levels of a grid, ascending.

    Attributes:
        values: the lowest and the highest, where they are whole numbers in a row; all others.
        whole: whether they are whole numbers in a row.
    """

    values: tuple[float, ...]
    whole: bool

    @staticmethod
    def of(grid: Grid) -> Levels:
        """The levels of one of MLX's own types.

        Raises:
            ValueError: when they are those of another type.
        """
        values = tuple(map(float, grid.levels))
        if grid.uniform:
            return Levels((values[0], values[-1]), True)
        found = Levels(values, False)
        if not found._has_form():
            raise ValueError(f"{len(values)} levels that no type of MLX has")
        return found

    @functools.cache  # noqa: B019 - there are a handful
    def _has_form(self) -> bool:
        if len(self.values) not in _FORMS:
            return False
        codes = mx.arange(len(self.values))
        level, code = self._number(self.at(codes))
        return bool(mx.array_equal(code, codes)) and level.tolist() == list(self.values)

    @property
    def last(self) -> int:
        """The highest code."""
        low, high = self.values[0], self.values[-1]
        return int(high - low) if self.whole else len(self.values) - 1

    @property
    def few(self) -> bool:
        """Whether they are whole numbers, or at most 16."""
        return self.whole or len(self.values) <= 16

    def at(self, codes: mx.array) -> mx.array:
        """The levels of codes."""
        if self.whole:
            return codes.astype(mx.float32) + self.values[0]
        return mx.take(mx.array(np.array(self.values, np.float32)), codes)

    def nearest(self, x: mx.array) -> mx.array:
        """The level nearest to x; of two the lower one, but of whole numbers the higher one."""
        if self.whole:
            return mx.clip(mx.floor(x + 0.5), self.values[0], self.values[-1])
        return self._number(x)[0]

    def codes(self, x: mx.array) -> mx.array:
        """The codes of the levels nearest to x, int32."""
        if self.whole:
            return (self.nearest(x) - self.values[0]).astype(mx.int32)
        return self._number(x)[1]

    def _number(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The numbers of a form nearest to x, and their codes."""
        least, mantissa = _FORMS[len(self.values)]
        size = mx.minimum(mx.abs(x), self.values[-1])
        exponent = mx.maximum(size.view(mx.int32) >> 23, least) - (127 + mantissa)
        size = size * power(-exponent)  # in steps of the numbers with this exponent
        steps, negative = mx.floor(size), x < 0
        more = size - steps
        steps = steps + ((more > 0.5) | (negative & (more == 0.5))).astype(mx.float32)
        below = (exponent - (least - 127 - mantissa)) << mantissa
        place, sign = steps.astype(mx.int32) + below, mx.where(negative, -1, 1)
        level = steps * power(exponent) * sign.astype(mx.float32)
        return level, len(self.values) // 2 + sign * place


def power(exponent: mx.array) -> mx.array:
    """2 to the power of int32 exponents from -126 to 127, exactly, as float32."""
    return ((exponent + 127) << 23).view(mx.float32)
