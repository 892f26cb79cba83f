"""How much memory does `abl-mlx run` on a GGUF need, and how long does loading it take?

    python benchmarks/gguf_run.py              # a 1B-shaped Q4_K_M, about 0.8 GB, in --folder
    python benchmarks/gguf_run.py --layers 4   # a quick look

The file has random weights and refuses nothing, so the direction of a fixed layer is used and few
prompts are asked. The least possible memory is one copy of the weights, in MLX or in llama.cpp, and
that of the imported libraries. The least possible time on a CPU is that of 2 floating-point
operations per weight and token.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def peak_of(command: list[str]) -> tuple[float, dict[str, float]]:
    """Peak resident bytes of a command, in all and by the kinds that /proc distinguishes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    largest: dict[str, float] = {}

    def watch() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                text = status.read_text()
            except OSError:
                return
            for line in text.splitlines():
                name = line.split(":")[0]
                if name in ("RssAnon", "RssFile"):
                    largest[name] = max(largest.get(name, 0), int(line.split()[1]) * 1024)
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    out, _ = process.communicate()
    thread.join()
    if process.returncode:
        raise SystemExit(process.returncode)
    print(json.dumps(json.loads(out)["seconds"], indent=2))
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary one without")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        source = folder / f"run-{chosen.layers}.gguf"
        if not source.exists():
            # In another process, so that the peak of this one stays small.
            subprocess.run(
                [sys.executable, "-c",
                 "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
                 "from gguf_edit import make_file;"
                 "make_file(Path(sys.argv[2]), int(sys.argv[3]), tokenizer=True)",
                 str(Path(__file__).parent), str(source), str(chosen.layers)],
                check=True,
            )  # fmt: skip
        out = folder / "run-out.gguf"
        for old in folder.glob("run-out*"):
            old.unlink()
        baseline = [sys.executable, "-c", "import mlx_lm, transformers; print('{\"seconds\": 0}')"]
        empty, _ = peak_of(baseline)
        peak, parts = peak_of(
            [sys.executable, "-m", "abl_mlx", "run", str(source), "-o", str(out), "--json",
             "--layer", str(chosen.layers // 2), "--position", "-1", "--limit", "4",
             "--max-tokens", "4"]
        )  # fmt: skip
        size = source.stat().st_size
        print(f"file               {size / 1e6:8.0f} MB")
        print(f"libraries alone    {empty / 1e6:8.0f} MB")
        print(f"peak of run        {peak / 1e6:8.0f} MB   = file + {(peak - size) / 1e6:.0f} MB")
        for name, value in parts.items():
            print(f"  largest {name:<8} {value / 1e6:8.0f} MB")


if __name__ == "__main__":
    main()
