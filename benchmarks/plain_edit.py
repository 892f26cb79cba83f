"""The edit of most scripts: a difference of means at 60% of the depth, and ordinary requantizing.

    python benchmarks/plain_edit.py MODEL.gguf OUT.gguf

The direction r is the difference of the training prompts' means after that layer, at the prompts'
last token. Every weight that writes to the residual stream becomes W - r rᵀW in floats, and ggml
rounds it to the type it had.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from requantize import requantized  # noqa: E402

from abl_mlx.choices import MeasureOptions  # noqa: E402
from abl_mlx.commands import measure_apply  # noqa: E402
from abl_mlx.directions import direction_file  # noqa: E402
from abl_mlx.outputs.model_file import find_gguf  # noqa: E402
from convert.gguf.file import GgufSource  # noqa: E402

DEPTH = 0.6


def without(source: GgufSource, name: str, kind: str, r: np.ndarray) -> np.ndarray:
    """A writer's weights, without the component of their outputs along ``r``."""
    w = source.values(name).astype(np.float32)
    return w - (w @ r)[:, None] * r if kind == "embedding" else w - np.outer(r, r @ w)


def main() -> None:
    """Measure, edit and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, help="prompts of each set, for a quick look")
    given = parser.parse_args()
    with find_gguf(str(given.model)) as model, tempfile.TemporaryDirectory() as work:
        source = model.gguf
        layers = int(source.metadata[f"{source.architecture}.block_count"])
        file = Path(work) / "r.safetensors"
        options = MeasureOptions.of(layer=int(layers * DEPTH), position=-1, limit=given.limit)
        measure_apply.measure(str(given.model), file, options)
        r = np.array(direction_file.read(file).selected[0].astype(mx.float32))
        writers = model.named_writers()
        assert not any(one.gains or one.bias or one.kind == "experts" for one in writers)
        new = {one.name: partial(without, source, one.name, one.kind, r) for one in writers}
        requantized(source, new, given.out)


if __name__ == "__main__":
    main()
