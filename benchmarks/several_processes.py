"""The time of measuring in several processes of mlx.launch, compared with one process.

    python benchmarks/several_processes.py
    python benchmarks/several_processes.py --processes 4 --width 1024 --layers 16

A Llama of random weights in float32 (so that a processor need not unpack them) is measured on
128 harmful and 128 harmless prompts, at 5 positions of every layer. Every process computes with one
thread. The best of ``--times`` runs counts, and runs of one process and of several take turns, so
that another load of the machine hits both. Loading is not counted, exchanging is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import POSITIONS, sequences  # noqa: E402

from abl_mlx.directions import measuring  # noqa: E402
from abl_mlx.models import chat_model  # noqa: E402
from abl_mlx.support import ranks  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.launched import free_ports  # noqa: E402

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


def timed(folder: Path, count: int) -> tuple[float, float]:
    """Seconds and the largest element of the mean, with ``count`` processes."""
    port = free_ports(1)[0] % 20000 + 40000
    launch = [
        str(Path(sys.executable).with_name("mlx.launch")), "-n", str(count), "--backend", "ring",
        "--starting-port", str(port), "--",
    ]  # fmt: skip
    command = [*launch, sys.executable, __file__, "--measure", str(folder)][
        0 if count > 1 else len(launch) :
    ]
    told = subprocess.run(
        command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, check=True
    )
    seconds, largest = json.loads(told.stdout.splitlines()[-1])
    return seconds, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        measured(given.measure)
        return
    with tempfile.TemporaryDirectory() as place:
        config = {
            "hidden_size": given.width, "intermediate_size": 4 * given.width,
            "num_hidden_layers": given.layers, "num_attention_heads": given.width // 64,
            "num_key_value_heads": given.width // 64,
        }  # fmt: skip
        folder = tiny.write_model(Path(place) / "model", "llama", dtype="float32", **config)
        one, several = [], []
        for _ in range(given.times):
            one.append(timed(folder, 1))
            several.append(timed(folder, given.processes))
    first, second = min(one)[0], min(several)[0]
    print(
        f"one process {first:.1f} s, {given.processes} processes {second:.1f} s: "
        f"{second / first:.2f} of its time; the largest element of the mean differs by "
        f"{abs(one[0][1] - several[0][1]) / abs(one[0][1]):.1e}"
    )


if __name__ == "__main__":
    main()
