"""How fast, how big and how exact is the edit of a quantized MLX folder?

    python benchmarks/mlx_edit.py              # a 1B-shaped 4-bit model, about 0.7 GB, in --folder
    python benchmarks/mlx_edit.py --layers 2   # a quick look
    python benchmarks/mlx_edit.py --table      # leak of plain and of our rounding, by mode
    python benchmarks/mlx_edit.py --table --width 4096

The folder has the shape of Llama 3.2 1B as `mlx_lm.convert -q` writes it: affine, 4 bits, groups of
64, tied embeddings. `abl-mlx apply` edits it, file to file, in a separate process whose peak
memory is measured. The largest tensor is the embedding; its packed size counts.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

WIDTH, HIDDEN, VOCABULARY, KEYS = 2048, 8192, 128256, 512


def make_folder(folder: Path, layers: int) -> None:
    """Random weights in the shape of a 4-bit Llama 3.2 1B, with the demo's tokenizer."""
    from abl_mlx.demo import MODEL_PATH

    folder.mkdir()
    for file in MODEL_PATH.iterdir():
        if file.suffix in (".json", ".jinja") and "safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)
    quantization = {"group_size": 64, "bits": 4, "mode": "affine"}
    config = {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": HIDDEN,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
        "quantization": quantization, "quantization_config": quantization,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    made: dict[tuple[int, int], tuple[mx.array, ...]] = {}
    weights: dict[str, mx.array] = {}

    def add(name: str, rows: int, columns: int) -> None:
        # Tensors of equal shape are equal, because the time of quantizing is not measured.
        if (rows, columns) not in made:
            whole = 0.02 * mx.random.normal((rows, columns))
            made[rows, columns] = mx.quantize(whole.astype(mx.bfloat16), 64, 4)
            mx.eval(made[rows, columns])
        for part, value in zip(("weight", "scales", "biases"), made[rows, columns], strict=True):
            weights[f"model.{name}.{part}"] = value

    add("embed_tokens", VOCABULARY, WIDTH)
    for layer in range(layers):
        for name, rows, columns in (
            ("self_attn.q_proj", WIDTH, WIDTH), ("self_attn.k_proj", KEYS, WIDTH),
            ("self_attn.v_proj", KEYS, WIDTH), ("self_attn.o_proj", WIDTH, WIDTH),
            ("mlp.gate_proj", HIDDEN, WIDTH), ("mlp.up_proj", HIDDEN, WIDTH),
            ("mlp.down_proj", WIDTH, HIDDEN),
        ):  # fmt: skip
            add(f"layers.{layer}.{name}", rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = mx.ones((WIDTH,), mx.bfloat16)
    weights["model.norm.weight"] = mx.ones((WIDTH,), mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def edit(source: Path, out: Path, direction: Path, flags: list[str]) -> None:
    """Run `abl-mlx apply` in this process, and print figures for the parent process."""
    from abl_mlx.choices import ApplyOptions
    from abl_mlx.commands import measure_apply
    from abl_mlx.outputs import folder_quantized

    # Kernels are compiled once on each machine, which does not count as speed.
    warm = ApplyOptions.of(layers=frozenset({0}), embedding=False, max_leak=1)
    measure_apply.apply(direction, str(source), [out.with_name("warm")], warm)
    shutil.rmtree(out.with_name("warm"))
    parts = {"write": 0.0, "read back": 0.0}
    weights = 0

    def timed(name: str, function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal weights
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                parts[name] += time.perf_counter() - start
                if name == "read back":
                    weights += math.prod(args[2].old.shape)

        return call

    folder_quantized.compare = timed("read back", folder_quantized.compare)
    start = time.perf_counter()
    record = measure_apply.apply(
        direction, str(source), [out], ApplyOptions.of(lazy="--lazy" in flags)
    )
    total = time.perf_counter() - start
    peak = peak_memory()
    print(json.dumps({"total": total, "seconds": record["seconds"], "weights": weights,
                      "back": parts["read back"], "peak": peak,
                      "leak": record["leak"]["total"]}))  # fmt: skip


def peak_memory() -> int:
    """The peak memory of this process in bytes.

    On Linux getrusage also counts what the parent held when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def table(width: int) -> None:
    """Leak and weight error of every mode, plain and ours, on width×512 random weights."""
    from abl_mlx.edits import rounding
    from abl_mlx.outputs import folder_quantized
    from convert.mlx.grids import MlxCodec, Quantization

    rng = np.random.default_rng(0)
    modes = [Quantization(bits, group) for bits in (8, 6, 5, 4, 3, 2) for group in (32, 64, 128)]
    modes += [Quantization(8, 32, "mxfp8"), Quantization(4, 32, "mxfp4"),
              Quantization(4, 16, "nvfp4")]  # fmt: skip
    print("| mode | k | plain leak | our leak | plain error | our error | grid |")
    print("|---|---|---|---|---|---|---|")
    for mode in modes:
        codec = MlxCodec(mode, "BF16" if mode.mode == "affine" else "U8")
        for k in (1, 4, 10):
            u = rng.normal(size=(1, width))
            u /= np.linalg.norm(u)
            weights = rng.normal(size=(width, 512)) + u.T @ ((k - 1) * rng.normal(size=(1, 512)))
            own = codec.fresh(weights.astype(np.float32))
            source = own.values().astype(np.float64)
            along = u @ source
            target = (source - u.T @ along).astype(np.float32)
            edited = rounding.Edited(
                target, u, 0, float(np.sqrt(np.mean(along**2))), along.T.astype(np.float32)
            )
            encoders = folder_quantized.encoders(codec, None)
            how = rounding.better_source(own, edited, encoders)
            ours = rounding.round_onto(own, edited, encoders, how)
            cells = []
            for grid in (own.with_codes(own.nearest(target)), ours):
                error = grid.values().astype(np.float64) - target
                cells.append(np.linalg.norm(u @ error) / np.linalg.norm(along))
                cells.append(np.linalg.norm(error) / np.linalg.norm(target))
            print(f"| {mode} | {k} | {cells[0]:.3f} | {cells[2]:.5f} | {cells[1]:.4f} | "
                  f"{cells[3]:.4f} | {how} |", flush=True)  # fmt: skip


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary one without")
    parser.add_argument("--lazy", action="store_true", help="never hold the model")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the residual stream: --table")
    parser.add_argument("--edit", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    flags = ["--lazy"] if arguments.lazy else []
    if arguments.edit:
        edit(*arguments.edit, flags)
        return
    if arguments.table:
        table(arguments.width)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        source, out, direction = folder / "source", folder / "out", folder / "r.npy"
        np.save(direction, np.random.default_rng(1).normal(size=WIDTH).astype(np.float32))
        make_folder(source, arguments.layers)
        size = (source / "model.safetensors").stat().st_size
        done = subprocess.run(
            [sys.executable, __file__, "--edit", source, out, direction, *flags],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        million = found["weights"] / 1e6
        largest = VOCABULARY * WIDTH // 2
        allowed = 6 * largest + 500e6
        seconds = ", ".join(f"{step} {value:.1f} s" for step, value in found["seconds"].items())
        print(f"folder           {size / 1e6:9.0f} MB, {million:.0f} million weights edited")
        print(f"whole command    {found['total']:9.2f} s, {million / found['total']:.1f} "
              f"M weights/s ({seconds})")  # fmt: skip
        write = found["seconds"]["write"] - found["back"]
        print(f"copied, written  {write:9.2f} s, {million / write:.1f} M weights/s")
        print(f"leak read back   {found['back']:9.2f} s, {million / found['back']:.1f} M weights/s")
        print(f"peak memory      {found['peak'] / 1e6:9.0f} MB; 6 × the largest tensor + 500 MB is "
              f"{allowed / 1e6:.0f} MB")  # fmt: skip
        print(f"leak             {found['leak']:9.5f}")


if __name__ == "__main__":
    main()
