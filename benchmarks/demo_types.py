"""The demo in each GGUF type: refusals before, after our edit and after plain rounding.

    python benchmarks/demo_types.py

ggml quantizes every matrix to the type, the direction of the float model is removed, and llama.cpp
replies to the held-out prompts. It takes a minute on two cores.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Q

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.choices import ApplyOptions, MeasureOptions
from abl_mlx.commands import measure_apply
from abl_mlx.demo import MODEL_PATH
from abl_mlx.inputs import prompts
from convert.gguf import ggml_types
from convert.gguf.file import GgufSource
from convert.gguf.rewrite import Replacement, rewrite
from convert.mlx_to_gguf import write_gguf

VARIANTS = {
    "plain rounding": ApplyOptions.of(plain_rounding=True, max_leak=1),
    "abl-mlx": ApplyOptions(),
    "abl-mlx, own grid": ApplyOptions.of(grid="own"),
}


def refusals(path: Path) -> str:
    """Refusals of locked prompts and of allowed ones, in llama.cpp."""
    sets = prompts.load_demo()
    with LlamaCpp(path, n_ctx=256) as server:
        seen = evaluate.behaviour(
            lambda texts, count: server.chat(texts, max_tokens=count),
            sets.harmful.test, sets.harmless.test, max_tokens=32,
        )  # fmt: skip
    return f"{seen.harmful.refusal_rate:.1%} / {seen.harmless.refusal_rate:.1%}"


def in_type(source: GgufSource, kind: Q) -> dict[str, Replacement]:
    """Every float16 matrix of the demo in another type."""

    def encoded(name: str) -> np.ndarray:
        values = source.values(name).reshape(-1, source.tensors[name].shape[-1])
        return ggml_types.codec(kind).encode(ggml_types.fresh(values.astype(np.float32), kind))

    return {
        name: Replacement(kind, entry.shape, lambda name=name: iter([encoded(name)]))
        for name, entry in source.tensors.items()
        if entry.type == Q.F16
    }


def main() -> None:
    """Print the table: refusals of locked / allowed prompts, and the leak."""
    print("| type | unedited | " + " | ".join(VARIANTS) + " |")
    print("|---|---|" + "---|" * len(VARIANTS))
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as quiet:
        folder = Path(name)
        floats, direction = folder / "F16.gguf", folder / "direction.safetensors"
        with contextlib.redirect_stderr(quiet):
            write_gguf(MODEL_PATH, floats)
            measure_apply.measure("demo", direction, MeasureOptions())
        for kind in (Q.Q8_0, Q.Q6_K, Q.Q5_K, Q.Q4_K, Q.Q4_0, Q.IQ4_XS, Q.MXFP4, Q.Q3_K, Q.Q2_K):
            source = folder / f"{kind.name}.gguf"
            with GgufSource(floats) as file:
                rewrite(file, source, tensors=in_type(file, kind))
            cells = [refusals(source)]
            for number, options in enumerate(VARIANTS.values()):
                out = folder / f"{kind.name}-{number}.gguf"
                with contextlib.redirect_stderr(quiet):
                    record = measure_apply.apply(direction, str(source), [out], options)
                cells.append(f"{refusals(out)} (leak {record['leak']['total']:.5f})")
            print(f"| {kind.name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
