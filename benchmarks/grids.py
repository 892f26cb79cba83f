"""Speed of decoding, computing values and encoding, by GGML type, in million weights per second.

    python benchmarks/grids.py [millions of weights] [type ...]

The best of five runs, on all cores, of a tensor quantized by ggml.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType

from convert.base.grids import Grid
from convert.gguf import ggml_types

WIDTH = 4096


def main(millions: int, names: list[str]) -> None:
    """Print a line per type."""
    rows = millions * 1_000_000 // WIDTH
    normal = np.random.default_rng(0).standard_normal((64, WIDTH)).astype(np.float32)
    print(f"{'type':8}{'decode':>10}{'values':>10}{'encode':>10}   million weights/s")
    for name in names:
        codec = ggml_types.grid_codec(GGMLQuantizationType[name])
        few = codec.encode(ggml_types.fresh(normal, codec.type))
        raw = np.resize(few, (rows, few.shape[1]))
        grid = codec.decode(raw, WIDTH)
        rates = [
            rows * WIDTH / seconds / 1e6
            for seconds in (
                _seconds(codec.decode, raw, WIDTH),
                _seconds(Grid.values, grid),
                _seconds(codec.encode, grid),
            )
        ]
        print(f"{name:8}" + "".join(f"{rate:10.0f}" for rate in rates))


def _seconds(work: Callable[..., object], *given: object) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        work(*given)
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    main(size, sys.argv[2:] or [kind.name for kind in ggml_types.GRID_TYPES])
