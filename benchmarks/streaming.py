"""Measure a folder in memory and streamed, under a limit of memory: figures, time and peak.

    python benchmarks/streaming.py FOLDER                    # in memory, then streamed
    python benchmarks/streaming.py FOLDER --limit-mb 700     # the streamed one under a hard limit
    python benchmarks/streaming.py /tmp/8b --make --limit-mb 4000

``--make`` first writes a folder of the shape of an 8B Llama with random weights in float16, the
same in every layer: 16 GB.

The limit is a memory cgroup of its own, which root can make on Linux: the kernel ends the process
when what it holds, files that it reads included, cannot be brought below the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import tiny  # noqa: E402

_8B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "hidden_act": "silu",
}  # fmt: skip


def make(folder: Path) -> None:
    """Write a folder of the shape of an 8B Llama: random weights, the same in every layer."""
    folder.mkdir(parents=True)
    special = tiny.write_tokenizer(folder, "bpe-llama3")
    (folder / "config.json").write_text(json.dumps({**special, **_8B}))
    d, ff, kv = 4096, 14336, 1024
    outside = {"model.embed_tokens.weight": (128256, d), "lm_head.weight": (128256, d)}
    inside = {f"{name}.weight": shape for name, shape in {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d),
        "mlp.down_proj": (d, ff), "input_layernorm": (d,), "post_attention_layernorm": (d,),
    }.items()}  # fmt: skip
    shapes = {**outside, "model.norm.weight": (d,)}
    shapes |= {
        f"model.layers.{n}.{name}": shape for n in range(32) for name, shape in inside.items()
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)

    def weights(shape: tuple[int, ...]) -> bytes:
        if len(shape) == 1:
            return np.ones(shape, np.float16).tobytes()
        return (0.02 * rng.standard_normal(shape, np.float32)).astype(np.float16).tobytes()

    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in [*outside.values(), (d,)]:
            stream.write(weights(shape))
        layer = b"".join(map(weights, inside.values()))
        for _ in range(32):
            stream.write(layer)


@contextlib.contextmanager
def group(megabytes: int) -> Iterator[Path | None]:
    """A memory cgroup with a limit, as a folder; None where the limit is 0."""
    if not megabytes:
        yield None
        return
    # Version 1 has a hierarchy for each resource, version 2 one for all.
    of_memory = Path("/sys/fs/cgroup/memory")
    root, name = (
        (of_memory, "memory.limit_in_bytes")
        if of_memory.is_dir()
        else (Path("/sys/fs/cgroup"), "memory.max")
    )
    made = root / f"abl-mlx-streaming-{os.getpid()}"
    made.mkdir()
    try:
        (made / name).write_text(str(megabytes * 10**6))
        yield made
    finally:
        made.rmdir()


def measured(folder: str, streamed: bool, prompts: int) -> dict[str, Any]:
    """Measure candidates in this process: seconds, peak bytes in memory, and the direction."""
    from abl_mlx.directions import measuring
    from abl_mlx.models import chat_model, sweeps
    from abl_mlx.support.arrays import numbers

    peak = [0]

    def watch() -> None:
        while True:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            here = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            peak[0] = max(peak[0], 1024 * here)
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    start, cpu = time.perf_counter(), time.process_time()
    chat = chat_model.load(Path(folder), streamed=streamed)
    asked = [[chat.encode(f"How do I {verb} {number} gardens?") for number in range(prompts)]
             for verb in ("plan", "burn")]  # fmt: skip
    candidates = measuring.measure(chat, asked[1], asked[0], [-1])
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak": peak[0],
        "direction": numbers(candidates.difference(len(chat.layers) // 2, -1)),
    }
    if (streaming := sweeps.of(chat.model)) is not None:
        traffic = streaming.stages.traffic
        found |= {"read": traffic.bytes, "waited": traffic.share_waited}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", action="store_true", help="write a folder of 16 GB first")
    parser.add_argument("--streamed", action="store_true", help="only streamed")
    parser.add_argument("--limit-mb", type=int, default=0, help="limit of the streamed one")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each of two sets")
    parser.add_argument("--child", choices=["memory", "streamed"], help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        if given.group:
            (given.group / "cgroup.procs").write_text(str(os.getpid()))
        found = measured(str(given.folder), given.child == "streamed", given.prompts)
        print(json.dumps(found))
        return
    if given.make and not given.folder.exists():
        make(given.folder)
    results = {}
    for kind in ["streamed"] if given.streamed else ["memory", "streamed"]:
        words = [sys.executable, __file__, str(given.folder), "--child", kind,
                 "--prompts", str(given.prompts)]  # fmt: skip
        with group(given.limit_mb if kind == "streamed" else 0) as limited:
            words += ["--group", str(limited)] if limited else []
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        results[kind] = json.loads(done.stdout.splitlines()[-1])
        shown = {key: value for key, value in results[kind].items() if key != "direction"}
        print(kind, json.dumps(shown))
    if len(results) == 2:
        one, other = (results[kind]["direction"] for kind in ("memory", "streamed"))
        dot = sum(a * b for a, b in zip(one, other, strict=True))
        lengths = math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))
        print(f"cosine {dot / lengths:.7f}")


if __name__ == "__main__":
    main()
