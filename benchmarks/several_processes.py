"""The time of measuring in several processes of mlx.launch, compared with one process.

    python benchmarks/several_processes.py
    python benchmarks/several_processes.py --processes 4 --width 1024 --layers 16
    python benchmarks/several_processes.py --apply FILE.gguf

A Llama of random weights in float32 (so that a processor need not unpack them) is measured on
128 harmful and 128 harmless prompts, at 5 positions of every layer. Every process computes with one
thread. The best of ``--times`` runs counts, and runs of one process and of several take turns, so
that another load of the machine hits both. Loading is not counted, exchanging is.

With ``--apply`` an edit along a random direction is written into a copy of a GGUF instead, and the
time is that of the steps "write" and "measure the leak".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import POSITIONS, sequences  # noqa: E402

from abl_mlx.directions import direction_file, measuring  # noqa: E402
from abl_mlx.directions.direction_file import DirectionFile  # noqa: E402
from abl_mlx.models import chat_model  # noqa: E402
from abl_mlx.support import ranks  # noqa: E402
from convert.gguf.file import GgufSource  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.launched import COMMAND, free_ports  # noqa: E402

ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MLX_NUM_THREADS"), "1")


def measured(folder: Path) -> None:
    """What each process does; rank 0 prints the seconds and the largest element of the mean."""
    chat = chat_model.load(folder)
    with ranks.together():
        harmful, harmless = sequences(128, 0, 0), sequences(128, 0, 1)
        measuring.measure(chat, harmful[:8], harmless[:8], POSITIONS)  # compiles, and connects
        ranks.agree("warm")
        start = time.perf_counter()
        found = measuring.measure(chat, harmful, harmless, POSITIONS)
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, found.harmful_mean.max().item()]), flush=True)


def called(count: int, *command: str) -> list[float]:
    """What a command prints as JSON when it is started ``count`` times."""
    port = free_ports(1)[0] % 20000 + 40000
    launch = [
        str(Path(sys.executable).with_name("mlx.launch")), "-n", str(count), "--backend", "ring",
        "--starting-port", str(port), "--",
    ]  # fmt: skip
    told = subprocess.run(
        [*(launch if count > 1 else ()), *command],
        env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: list[float] = json.loads(told.stdout)
    return found


def timed(folder: Path, count: int) -> list[float]:
    """Seconds and the largest element of the mean, with ``count`` processes."""
    return called(count, sys.executable, __file__, "--measure", str(folder))


def applied(file: Path, direction: Path, count: int) -> list[float]:
    """Seconds of an edit of a GGUF, and its leak, with ``count`` processes."""
    with tempfile.TemporaryDirectory() as place:
        record: Any = called(
            count, *COMMAND, "apply", str(direction), str(file), "-o", f"{place}/out.gguf", "--json"
        )
    steps = record["seconds"]
    return [steps["write"] + steps["measure the leak"], record["leak"]["total"]]


def random_direction(file: Path, place: Path) -> Path:
    """A direction file with a random direction of a GGUF's width."""
    with GgufSource(file) as gguf:
        width = gguf.tensors["token_embd.weight"].shape[-1]
    direction = mx.random.normal((1, width), key=mx.random.key(0))
    path = place / "d.safetensors"
    direction_file.save(path, DirectionFile(direction / mx.sqrt((direction * direction).sum())))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--apply", type=Path, metavar="FILE.gguf")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        measured(given.measure)
        return
    with tempfile.TemporaryDirectory() as place:
        if given.apply is not None:
            direction = random_direction(given.apply, Path(place))
            of = partial(applied, given.apply, direction)
        else:
            config = {
                "hidden_size": given.width, "intermediate_size": 4 * given.width,
                "num_hidden_layers": given.layers, "num_attention_heads": given.width // 64,
                "num_key_value_heads": given.width // 64,
            }  # fmt: skip
            of = partial(
                timed, tiny.write_model(Path(place) / "model", "llama", dtype="float32", **config)
            )
        one, several = [], []
        for _ in range(given.times):
            one.append(of(1))
            several.append(of(given.processes))
    first, second = min(one)[0], min(several)[0]
    print(
        f"one process {first:.1f} s, {given.processes} processes {second:.1f} s: "
        f"{second / first:.2f} of its time; the figure that both find differs by "
        f"{abs(one[0][1] - several[0][1]) / abs(one[0][1]):.1e}"
    )


if __name__ == "__main__":
    main()
