"""The rounding of a slab by MLX's arrays beside that by the kernels, in one run.

    python -m benchmarks.edit_arrays [MODE ...]

Prints, for each mode, the time that each weight takes, by the clock and after a first call that
compiles, how many codes differ, and which of the two `apply` would use. MLX computes on its default
device: on a Mac the GPU. On Linux g++ takes half a minute to compile a mode; MLX_DISABLE_COMPILE=1
leaves that out.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from abl_mlx.edits import projection, rounding, rounding_arrays
from convert.base.grids import Grid
from convert.mlx.grids import MlxCodec, Quantization

MODES = {
    **{f"affine{bits}": Quantization(bits, 64) for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": Quantization(4, 32, "mxfp4"),
    "mxfp8": Quantization(8, 32, "mxfp8"),
    "nvfp4": Quantization(4, 16, "nvfp4"),
}


def measured(work: Callable[[], Grid]) -> tuple[float, Grid]:
    """Seconds of the second call of a function, and its result."""
    work()
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def row(name: str, d: int, n: int) -> str:
    """The line of the table of one mode."""
    rng, mode = np.random.default_rng(0), MODES[name]
    values = (0.02 * rng.standard_normal((d, n))).astype(np.float32)
    own = MlxCodec(mode, "BF16" if mode.mode == "affine" else "U8").fresh(values)
    basis = projection.orthonormal(rng.standard_normal((1, d)).astype(np.float32))
    taken = np.ascontiguousarray(projection.along(basis, own, -2).T)
    edited = rounding.Edited(own, basis, 0, float(np.sqrt(np.mean(taken**2))), taken)
    kernels, found = measured(lambda: rounding.preserve(own, edited))
    arrays, other = measured(lambda: rounding_arrays.chosen(own, edited))
    uses = rounding_arrays.on_gpu() and rounding_arrays.pays(own, edited, found)
    each = 1e9 / values.size
    return (
        f"| {name} | {each * kernels:.1f} | {each * arrays:.0f} | {arrays / kernels:.0f} × | "
        f"{found.changed(other)} | {'MLX' if uses else 'kernels'} |"
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modes", nargs="*", help=f"of {', '.join(MODES)}; all without")
    parser.add_argument("--shape", nargs=2, type=int, default=(2048, 1024), metavar=("D", "N"))
    given = parser.parse_args()
    d, n = given.shape
    print(f"{d} by {n} on {mx.default_device()}, load {os.getloadavg()[0]:.1f}\n")
    print("| mode | kernels, ns | MLX, ns | ratio | codes that differ | apply uses |")
    print("|---|---|---|---|---|---|")
    for name in given.modes or MODES:
        print(row(name, d, n), flush=True)


if __name__ == "__main__":
    main()
