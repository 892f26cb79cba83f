"""float16 and bfloat16 numbers as their bits in NumPy, which is slow with one and lacks the other.

Values are rounded to the nearest number of the type, halfway to an even one, and become infinite
beyond its largest.
"""

from __future__ import annotations

import numpy as np

#: Larger arrays of float16 are converted by kernels; numba takes a third of a second to import.
SMALL = 1 << 14


def widened(bits: np.ndarray, kind: str) -> np.ndarray:
    """The numbers as float32.

    Args:
        bits: uint16, of any shape.
        kind: ``F16`` or ``BF16``.
    """
    out = np.empty(bits.shape, np.float32)
    widen_into(bits, kind, out)
    return out


def widen_into(bits: np.ndarray, kind: str, out: np.ndarray) -> None:
    """`widened`, written to ``out``: float32, contiguous, in the shape of ``bits``."""
    if kind == "BF16":
        np.left_shift(bits, 16, out=out.view(np.uint32), casting="unsafe", dtype=np.uint32)
    elif bits.size <= SMALL:
        out[...] = bits.view(np.float16)
    else:
        from convert.base.half_kernels import widen  # lazily: it brings numba

        widen(_rows(bits), _rows(out.view(np.uint32)), _rows(out))


def narrowed(values: np.ndarray, kind: str) -> np.ndarray:
    """The bits, uint16, of the nearest numbers.

    Args:
        values: float32, of any shape.
        kind: ``F16`` or ``BF16``.
    """
    values = np.ascontiguousarray(values, np.float32)
    if kind == "F16" and values.size <= SMALL:
        with np.errstate(over="ignore", under="ignore"):
            return values.astype(np.float16).view(np.uint16)
    from convert.base import half_kernels as kernels  # lazily: it brings numba

    found, bits = np.empty(values.shape, np.uint16), values.view(np.uint32)
    if kind == "BF16":
        kernels.narrow_bfloat16(_rows(bits), _rows(found))
    else:
        kernels.narrow(_rows(bits), _rows(values), _rows(found))
    return found


def _rows(values: np.ndarray) -> np.ndarray:
    """The array with two axes; a copy only where its memory is not in order."""
    return np.ascontiguousarray(values).reshape(-1, values.shape[-1])
