"""How fast, how big and how exact is the edit of a quantized GGUF?

    python benchmarks/gguf_edit.py              # a 1B-shaped file, about 0.8 GB, in --folder
    python benchmarks/gguf_edit.py --layers 2   # a quick look
    python benchmarks/gguf_edit.py --gigabytes 30   # a 70B's layers until the file has this size
    python benchmarks/gguf_edit.py --table      # leak of plain and of our rounding, by type

The file has the shape of Llama 3.2 1B in Q4_K_M: writers in Q4_K and Q6_K, the embedding in Q6_K.
Every edited weight is read, decoded, rounded about twelve times in the search for its line's
multiplier, encoded and written; the rest of the file is copied.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

import abl_mlx
import convert
from abl_mlx.directions import direction_file

WIDTH, VOCABULARY = 2048, 128256


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama.

    Attributes:
        name: what the model is called.
        width: of the residual stream.
        hidden: of an MLP.
        heads: how many there are of queries; there are eight of keys.
    """

    name: str
    width: int
    hidden: int
    heads: int

    @property
    def keys(self) -> int:
        """The width of keys and of values."""
        return self.width // self.heads * 8


SMALL = Shape("random-1b", WIDTH, 8192, 32)
LARGE = Shape("random-70b", 8192, 28672, 64)


def make_file(path: Path, layers: int, shape: Shape = SMALL, *, tokenizer: bool = False) -> None:
    """Random weights in the shape and types of a Llama 3 in Q4_K_M.

    Args:
        layers: how many there are.
        shape: 1B or 70B.
        tokenizer: whether to add the demo's tokenizer, padded with tokens, so that the file runs.
    """
    from convert.gguf import ggml

    rng = np.random.default_rng(0)
    made: dict[tuple[int, int, Q], np.ndarray] = {}

    def weights(rows: int, columns: int, kind: Q) -> np.ndarray:
        # Rows repeat, because the time of quantizing is not measured.
        if (rows, columns, kind) not in made:
            part = 0.02 * rng.standard_normal((min(512, rows), columns), np.float32)
            some = ggml.quantize(part, kind)
            made[rows, columns, kind] = np.resize(some, (rows, some.shape[1]))
        return made[rows, columns, kind]

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(shape.name)
    for key, value in (
        ("block_count", layers), ("context_length", 4096), ("embedding_length", shape.width),
        ("feed_forward_length", shape.hidden), ("attention.head_count", shape.heads),
        ("attention.head_count_kv", 8),
    ):  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)

    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    if tokenizer:
        from abl_mlx.demo import MODEL_PATH
        from convert.gguf.values import value_type
        from convert.tokenizers.to_gguf import read_tokenizer

        for key, value in read_tokenizer(MODEL_PATH, VOCABULARY).metadata().items():
            kind, inner = value_type(key, value)
            writer.add_key_value(key, value, kind, sub_type=inner)

    def add(name: str, rows: int, columns: int, kind: Q) -> None:
        writer.add_tensor(name, weights(rows, columns, kind), raw_dtype=kind)

    width, hidden, keys = shape.width, shape.hidden, shape.keys
    add("token_embd.weight", VOCABULARY, width, Q.Q6_K)
    for layer in range(layers):
        more = Q.Q6_K if layer < layers // 8 or layer % 3 == 2 else Q.Q4_K
        block = f"blk.{layer}."
        for name, rows, columns, kind in (
            ("attn_q", width, width, Q.Q4_K), ("attn_k", keys, width, Q.Q4_K),
            ("attn_v", keys, width, more), ("attn_output", width, width, Q.Q4_K),
            ("ffn_gate", hidden, width, Q.Q4_K), ("ffn_up", hidden, width, Q.Q4_K),
            ("ffn_down", width, hidden, more),
        ):  # fmt: skip
            add(f"{block}{name}.weight", rows, columns, kind)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}{norm}.weight", np.ones(width, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def edit(source: Path, out: Path, direction: Path) -> None:
    """Run the product's edit in this process, and print figures for the parent process."""
    from abl_mlx.choices import ApplyOptions
    from abl_mlx.commands import measure_apply
    from abl_mlx.edits.edit import Edit
    from abl_mlx.inputs.sources import Source
    from abl_mlx.outputs import gguf_plan
    from abl_mlx.outputs.gguf import GgufFile

    # Kernels are compiled once on each machine, which does not count as speed.
    measure_apply.apply(direction, str(source), [out.with_name("warm.gguf")],
                   ApplyOptions.of(tensors=r"blk\.0\.attn_output"))  # fmt: skip
    start = time.perf_counter()
    record = measure_apply.apply(direction, str(source), [out], ApplyOptions())
    seconds = record["seconds"]
    with GgufFile(Source(source.name, source)) as model:
        edit = Edit(direction_file.read(direction).selected)
        plans = gguf_plan.plan(model.gguf, edit, model.named_writers())
        weights = sum(math.prod(model.gguf.tensors[name].shape) for name in plans)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(time.perf_counter() - start, seconds["write"], seconds["measure the leak"], weights, peak,
          record["leak"]["total"], record["written"][0]["weight_error"])  # fmt: skip


def command(source: Path, out: Path, direction: Path, cache: Path) -> tuple[float, float, float]:
    """`abl-mlx apply` in a process of its own: wall seconds, CPU seconds, peak memory in bytes.

    Args:
        cache: the folder of compiled kernels; with an empty one they are compiled.
    """
    asked = [sys.executable, "-m", "abl_mlx", "apply", direction, source, "-o", out]
    start = time.perf_counter()
    child = subprocess.Popen(
        asked, env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, f"apply ended with {child.returncode}"
    seconds = time.perf_counter() - start
    out.unlink()
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def copy(source: Path, out: Path) -> tuple[float, float]:
    """Copy a file and flush it to the disk, as `apply` does: wall and CPU seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    shutil.copyfile(source, out)
    with open(out, "rb") as stream:
        os.fsync(stream.fileno())
    found = time.perf_counter() - start, time.process_time() - cpu
    out.unlink()
    return found


def large(folder: Path, gigabytes: float) -> None:
    """Edit a file of some size by the command, and print its time beside that of a copy."""
    source, small, direction = folder / "source.gguf", folder / "small.gguf", folder / "r.npy"
    np.save(direction, np.random.default_rng(1).normal(size=LARGE.width).astype(np.float32))
    _in_process(make_file, small, 1, LARGE)
    _in_process(make_file, source, 2, LARGE)
    least = small.stat().st_size
    a_layer = source.stat().st_size - least
    layers = 1 + max(0, round((1e9 * gigabytes - least) / a_layer))
    _in_process(make_file, source, layers, LARGE)
    size = source.stat().st_size
    copied, copied_cpu = copy(source, folder / "copy.gguf")
    print(f"file                    {size / 1e9:9.1f} GB, {layers} layers")
    print(f"file copied and flushed {copied:9.1f} s, {copied_cpu:.1f} s of CPU", flush=True)
    kernels = folder / "kernels"
    command(small, folder / "first.gguf", direction, kernels)  # compiles them
    seconds, cpu, peak = command(source, folder / "out.gguf", direction, kernels)
    print(f"command                 {seconds:9.1f} s, {cpu:.1f} s of CPU, {seconds / copied:.1f} x "
          f"the copy, peak memory {peak / 1e9:.2f} GB")  # fmt: skip


def _in_process(work: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a new process, because a child's peak memory counts from its parent's."""
    maker = multiprocessing.Process(target=work, args=arguments)
    maker.start()
    maker.join()
    assert maker.exitcode == 0


def plainly(source: Path, direction: Path) -> tuple[float, float]:
    """The same edit by dequantizing and ggml's own requantizing: seconds, and the leak."""
    from abl_mlx.inputs.sources import Source
    from abl_mlx.outputs.gguf import GgufFile
    from convert.gguf import ggml

    r = np.load(direction).astype(np.float32)
    r /= np.linalg.norm(r)
    missing = wanted = 0.0
    start = time.perf_counter()
    with GgufFile(Source(source.name, source)) as model:
        file = model.gguf
        for one in model.named_writers():
            entry = file.tensors[one.name]
            values = ggml.dequantize(np.array(file.raw(one.name)), entry.type)
            along = values @ r if one.kind == "embedding" else r @ values
            if one.kind == "embedding":
                exact = values - np.outer(along, r)
            else:
                exact = values - np.outer(r, along)
            written = ggml.dequantize(ggml.quantize(exact, entry.type), entry.type)
            left = written @ r if one.kind == "embedding" else r @ written
            missing += float(left @ left)
            wanted += float(along @ along)
    return time.perf_counter() - start, (missing / wanted) ** 0.5


def table(types: list[Q]) -> None:
    """Print the table of docs/gguf.md for these types, or for all: plain rounding and ours."""
    from abl_mlx.edits import rounding
    from abl_mlx.outputs import gguf_plan
    from convert.gguf import ggml_types

    rng = np.random.default_rng(0)
    print("| type | k | plain leak | our leak | plain error | our error | of quantizing | grid |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in types or sorted(ggml_types.GRID_TYPES + ggml_types.CODEBOOK_TYPES):
        for k in (1, 4, 10):
            u = rng.normal(size=(1, WIDTH))
            u /= np.linalg.norm(u)
            weights = rng.normal(size=(WIDTH, WIDTH)) + u.T @ (
                (k - 1) * rng.normal(size=(1, WIDTH))
            )
            own = ggml_types.fresh(weights.astype(np.float32), kind)
            source = own.values().astype(np.float64)
            exact = source - u.T @ (u @ source)
            target = exact.astype(np.float32)
            removed = float(np.sqrt(np.mean((u @ source) ** 2)))
            taken = np.ascontiguousarray((u @ source).T, dtype=np.float32)
            edited = rounding.Edited(target, u.astype(np.float32), 0, removed, taken)
            encoders = gguf_plan.encoders(kind)
            how = rounding.better_source(own, edited, encoders)
            ours = rounding.round_onto(own, edited, encoders, how)
            quantizing = np.linalg.norm(source - weights) / np.linalg.norm(weights)
            cells = []
            if kind in ggml_types.GRID_TYPES:
                plain = own.with_codes(own.nearest(target))
            else:
                plain = ggml_types.fresh(target, kind)
            for grid in (plain, ours):
                written = grid.values().astype(np.float64)
                leak = np.linalg.norm(u @ (written - exact)) / np.linalg.norm(u @ source)
                error = np.linalg.norm(written - exact) / np.linalg.norm(exact)
                cells.append((leak, error))
            (plain_leak, plain_error), (our_leak, our_error) = cells
            print(f"| {kind.name} | {k} | {plain_leak:.3f} | {our_leak:.5f} | {plain_error:.4f} | "
                  f"{our_error:.4f} | {quantizing:.3f} | {how} |", flush=True)  # fmt: skip


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--gigabytes", type=float, help="the size of a file in the shape of a 70B")
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary one without")
    parser.add_argument("--table", nargs="*", metavar="TYPE", type=lambda name: Q[name])
    parser.add_argument("--edit", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.edit:
        edit(*arguments.edit)
        return
    if arguments.table is not None:
        table(arguments.table)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.gigabytes:
            large(folder, arguments.gigabytes)
            return
        source, out, direction = folder / "source.gguf", folder / "out.gguf", folder / "r.npy"
        np.save(direction, np.random.default_rng(1).normal(size=WIDTH).astype(np.float32))
        _in_process(make_file, source, arguments.layers)
        size = source.stat().st_size
        copied, copied_cpu = copy(source, folder / "copy.gguf")
        # pip leaves bytecode beside the modules, so that users' Python does not compile these.
        packages = [str(Path(one.__file__).parent) for one in (abl_mlx, convert)]
        subprocess.run([sys.executable, "-m", "compileall", "-q", *packages], check=True)
        first, again = (
            command(source, folder / name, direction, folder / "kernels")
            for name in ("first.gguf", "again.gguf")
        )
        done = subprocess.run(
            [sys.executable, __file__, "--edit", source, out, direction],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        total, write, back, weights, peak, leak, error = map(float, done.stdout.split())
        million = weights / 1e6
        print(f"file                    {size / 1e6:9.0f} MB, {million:.0f} million weights edited")
        print(f"file copied and flushed {copied:9.2f} s, {copied_cpu:.2f} s of CPU")
        print(f"command, first run      {first[0]:9.2f} s, {first[1]:.2f} s of CPU")
        print(
            f"command, later runs     {again[0]:9.2f} s, {again[1]:.2f} s of CPU, "
            f"{again[0] / copied:.1f} x the copy, peak memory {again[2] / 1e9:.2f} GB"
        )
        print(f"edit, decode to written {write:9.2f} s, {million / write:.1f} M weights/s")
        print(f"leak read back          {back:9.2f} s, {million / back:.1f} M weights/s")
        print(f"apply without start-up  {total:9.2f} s, peak memory {peak / 1e9:.2f} GB")
        seconds, lost = plainly(source, direction)
        print(f"ggml's own round trip   {seconds:9.2f} s, {million / seconds:.1f} M weights/s")
        print(f"leak: ours {leak:.5f} (weight error {error:.4f}), ggml's own {lost:.3f}")


if __name__ == "__main__":
    main()
