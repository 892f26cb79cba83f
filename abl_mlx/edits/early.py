"""Machine code of kernels, compiled by a second process from a command's begin.

The interpreter lock keeps threads from compiling side by side. So where the largest kernel was
never compiled on this machine, a process of its own compiles it and those that are needed late,
while the command reads its model and compiles the ones that it needs first.
"""

from __future__ import annotations

import atexit
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

from convert.base.suffixes import is_gguf_name

#: The exit code of the process if the one ended that began it.
ENDED = 3


def begin(model: str, quantize: str | None) -> None:
    """Start the process, if there is something to compile. It ends with this process at the latest.

    Args:
        model: what is edited, as the user named it: only for GGUFs it is known that the kernels are
            needed.
        quantize: the type to quantize to, if one is asked for.
    """
    if quantize is None and not is_gguf_name(Path(model)):
        return
    from abl_mlx.edits import rounding_kernels
    from convert.base.compiled import first_arguments

    floats = quantize is not None
    known = first_arguments(rounding_kernels.lines)
    if any((name == "none") != floats for name in known):
        return
    form = "floats" if floats else "grids"
    try:
        helper = subprocess.Popen(
            [sys.executable, "-m", "abl_mlx.edits.early", form],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        return  # this process compiles everything

    atexit.register(helper.communicate)  # closes its standard input


def _end_with_parent() -> None:
    """End this process when the other end of its standard input is closed."""
    os.read(0, 1)
    os._exit(ENDED)


def main() -> None:
    """Use the kernels, the largest first, on a few weights."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import numpy as np

    from abl_mlx.edits import projection, rounding
    from convert.base import near_scales
    from convert.base.grids import Grid

    rows, columns = 32, 64
    codes = np.zeros((rows, columns), np.uint8)
    scales = np.ones((rows, columns // 32), np.float32)
    grid = Grid(codes, np.arange(16, dtype=np.float32), scales, scales, 32)
    exact = grid.values() if sys.argv[1] == "floats" else grid
    cases = []
    for axis, width, lines in ((1, columns, rows), (0, rows, columns)):
        basis = np.full((1, width), width**-0.5, np.float32)
        cases.append(
            (basis, rounding.Edited(exact, basis, axis, 1.0, np.ones((lines, 1), np.float32)))
        )
    for _, edited in cases:
        edited.on(grid)
    for basis, edited in cases:
        part = exact, exact
        projection.compare_read(basis, lambda *_: part, grid.shape, edited.axis - 2)  # noqa: B023
    for basis, edited in cases:
        projection.along(basis, exact, edited.axis - 2)
    if (less := cases[0][1].less) is not None:
        near_scales.search(less, near_scales.Choices.none(grid))


if __name__ == "__main__":
    gc.disable()  # it ends before its garbage matters
    main()
