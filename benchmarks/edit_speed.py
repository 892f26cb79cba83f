"""How near is the edit of a quantized tensor to what the machine allows, type by type?

    python -m benchmarks                     # every type
    python -m benchmarks Q4_K Q6_K affine4   # some of them
    python -m benchmarks --json speed.json --history speed.jsonl

A column-wise writer of 2048 x 2048 weights is edited along one direction, in memory: bytes are
decoded, rounded so that the edit is preserved, and encoded; then the leak is read from the new
bytes. Times are those of the CPU, of all threads together, so other programs disturb them little.

The bound is the greater of two times, both measured in the same run: moving the bytes that an edit
reads and writes, and the least number of multiply-adds for each weight, done by a kernel that does
nothing else. ggml's figure is that of decoding and quantizing again by its own functions.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType

from abl_mlx import __version__
from abl_mlx.edits import projection
from abl_mlx.edits.edit import Edit, leak_read
from abl_mlx.edits.slabs import Slab
from abl_mlx.models.writers import Writer
from abl_mlx.outputs import folder_quantized, gguf_plan
from convert.base.kept_memory import kept_memory
from convert.gguf import ggml, ggml_types
from convert.mlx.grids import MlxCodec, Quantization, Rows
from convert.mlx.matrix import Matrix

ROWS, COLUMNS = 2048, 2048

#: Multiply-adds that no method does without: decoding, the component, the residual at both ends of
#: a bracket, the levels that are chosen, their errors, and what later lines are told of these.
LEAST_WORK = 8

#: MLX's affine modes, by name.
AFFINE = {f"affine{bits}": bits for bits in (2, 3, 4, 6, 8)}


@dataclass(frozen=True)
class Speed:
    """Nanoseconds of CPU time for each weight, on one core.

    Attributes:
        type: the type's name.
        bytes: bytes for each weight that an edit reads and writes.
        bound: the least time.
        edit: from bytes to bytes.
        leak: reading the leak from both files' bytes.
        ggml: decoding and quantizing by ggml; None for MLX's modes.
    """

    type: str
    bytes: float
    bound: float
    edit: float
    leak: float
    ggml: float | None

    @staticmethod
    def header() -> str:
        """The head of the table."""
        return (
            "| type | bytes | bound, ns | edit, ns | of bound | leak, ns | M weights/s a core, "
            "edit and leak | two cores | ggml, M/s |\n|---|---|---|---|---|---|---|---|---|"
        )

    def row(self) -> str:
        """A line of the table."""
        rate = 1e3 / (self.edit + self.leak)
        ggml = "" if self.ggml is None else f"{1e3 / self.ggml:.0f}"
        return (
            f"| {self.type} | {self.bytes:.2f} | {self.bound:.1f} | {self.edit:.1f} | "
            f"{self.edit / self.bound:.1f} × | {self.leak:.1f} | {rate:.0f} | {2 * rate:.0f} | "
            f"{ggml} |"
        )


def cost(work: Callable[[], Any], times: int = 3) -> float:
    """CPU seconds of a function: the least of some calls, after one that compiles."""
    work()
    least = float("inf")
    for _ in range(times):
        start = time.process_time()
        work()
        least = min(least, time.process_time() - start)
    return least


def bounds() -> tuple[float, float]:
    """Seconds on one core to read and write a byte of memory, and for a multiply-add."""
    source = np.ones(1 << 27, np.uint8)
    target = np.zeros_like(source)
    a_byte = cost(lambda: np.copyto(target, source)) / (2 * source.nbytes)
    values = np.ones((512, 1024), np.float32)  # in the cache
    basis = np.ones((8, 1024), np.float32)
    work = cost(lambda: [projection.along(basis, values, -1) for _ in range(20)])
    return a_byte, work / (20 * 8 * values.size)


def of_gguf(kind: GGMLQuantizationType, edit: Edit, a_byte: float, a_step: float) -> Speed:
    """The speed of a GGML type."""
    writer = Writer("w", "linear", 0, None, False, None)  # type: ignore[arg-type]
    one = gguf_plan.TensorPlan("w", edit, writer, "weight", kind, kind)
    part = np.random.default_rng(0).standard_normal((256, COLUMNS)).astype(np.float32)
    codec: Any = ggml_types.codec(kind)
    old = np.tile(codec.encode(ggml_types.fresh(part, kind)), (ROWS // 256, 1))
    whole = Slab(slice(0, ROWS), slice(0, COLUMNS))

    def edited() -> np.ndarray:
        return gguf_plan.edit_slab(one, gguf_plan.read(old, kind, whole), "own")

    new = edited()

    def both(rows: slice, columns: slice) -> Any:
        piece = Slab(rows, columns)
        return [gguf_plan.weights_of(gguf_plan.read(raw, kind, piece)) for raw in (old, new)]

    def leaked() -> Any:
        return leak_read(one.edit, one.writer, one.parameter, both, whole.shape)

    assert leaked().value < 0.002
    ggmls = None
    if ggml.available():
        ggmls = cost(lambda: ggml.quantize(ggml.dequantize(old[:256], kind), kind), 1)
        ggmls *= 1e9 / part.size
    return _speed(kind.name, 2 * codec.bits / 8, edited, leaked, ggmls, a_byte, a_step)


def of_mlx(name: str, edit: Edit, a_byte: float, a_step: float) -> Speed:
    """The speed of one of MLX's affine modes, in groups of 64."""
    quantization = Quantization(AFFINE[name], 64)
    codec = MlxCodec(quantization, "BF16")
    writer = Writer("w", "linear", 0, None, False, None)  # type: ignore[arg-type]
    matrix = Matrix({"weight": "w"}, (ROWS, COLUMNS), quantization, "BF16")
    one = folder_quantized.MatrixEdit(edit, writer, matrix, matrix)
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    old: Rows = codec.encode(codec.fresh(values, None))

    def edited() -> Rows:
        return folder_quantized.edit_slab(one, codec.decode(old), "own")

    new = edited()

    def both(rows: slice, columns: slice) -> Any:
        def part(one: np.ndarray) -> np.ndarray:
            width = one.shape[1]
            return one[rows, columns.start * width // COLUMNS : columns.stop * width // COLUMNS]

        return [codec.decode(Rows(*map(part, raw[:3]))) for raw in (old, new)]

    def leaked() -> Any:
        return leak_read(one.edit, one.writer, one.parameter, both, (ROWS, COLUMNS))

    assert leaked().value < 0.002
    read = sum(part.nbytes for part in old if part is not None) / values.size
    return _speed(name, 2 * read, edited, leaked, None, a_byte, a_step)


def _speed(
    name: str,
    moved: float,
    edited: Callable[[], Any],
    leak: Callable[[], Any],
    ggmls: float | None,
    a_byte: float,
    a_step: float,
) -> Speed:
    each = 1e9 / (ROWS * COLUMNS)
    bound = 1e9 * max(moved * a_byte, LEAST_WORK * a_step)
    return Speed(name, moved, bound, cost(edited) * each, cost(leak) * each, ggmls)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="names of GGML types, or affine4 and the like")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--history", type=Path, help="a file to which a line is added")
    given = parser.parse_args(arguments)
    names = given.types or [kind.name for kind in ggml_types.GRID_TYPES] + list(AFFINE)
    direction = np.random.default_rng(1).standard_normal((1, ROWS)).astype(np.float32)
    edit = Edit(mx.array(direction))
    a_byte, a_step = bounds()
    print(f"a byte {1e9 * a_byte:.3f} ns, a multiply-add {1e9 * a_step:.3f} ns; "
          f"load {os.getloadavg()[0]:.1f}\n\n{Speed.header()}", flush=True)  # fmt: skip
    found = []
    for name in names:
        measure = of_mlx if name in AFFINE else of_gguf
        kind: Any = name if name in AFFINE else GGMLQuantizationType[name]
        with kept_memory():  # as in `apply`
            found.append(measure(kind, edit, a_byte, a_step))
        print(found[-1].row(), flush=True)
    figures = {
        "abl_mlx": __version__, "byte_ns": 1e9 * a_byte, "multiply_add_ns": 1e9 * a_step,
        "load": os.getloadavg()[0], "types": [asdict(one) for one in found],
    }  # fmt: skip
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if given.history is not None:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **figures}
        with open(given.history, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
