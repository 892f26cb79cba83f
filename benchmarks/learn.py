"""How well `learn` recovers edits: 43 of the demo, by abl-mlx and by a plain script.

    python benchmarks/learn.py            # prints the table
    python benchmarks/learn.py --write    # puts it into docs/learn.md

Nine edits along the demo's refusal direction are each made in up to five ways: by abl-mlx in a
folder, in a Q8_0 and in a Q4_K_M GGUF, and by a script in NumPy, whose folder is also quantized to
Q4_K_M. Each is learned against the demo in floats. What was learned from 4 bits is applied to the
demo in Q6_K, and its refusals are compared with those of the same edit of that file as it was made.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import abl_mlx  # noqa: E402
from abl_mlx.behaviour import refusals  # noqa: E402
from abl_mlx.choices import ApplyOptions, MeasureOptions  # noqa: E402
from abl_mlx.commands.conversion import convert  # noqa: E402
from abl_mlx.commands.learn import learn  # noqa: E402
from abl_mlx.commands.measure_apply import apply, measure  # noqa: E402
from abl_mlx.demo import MODEL_PATH  # noqa: E402
from abl_mlx.directions import direction_file  # noqa: E402
from abl_mlx.directions.direction_file import DirectionFile  # noqa: E402
from abl_mlx.inputs.sets import PromptSet  # noqa: E402
from abl_mlx.records.learned import LearnRecord  # noqa: E402
from abl_mlx.support.arrays import numpy_of  # noqa: E402
from tools import marked  # noqa: E402

WRITERS = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
TOKENS = 24


@dataclass(frozen=True)
class Made:
    """An edit.

    Attributes:
        name: for the table.
        strength: α.
        norm: the norms that are kept.
        layers: the edited layers; None for all.
        own: whether each layer loses its own direction.
    """

    name: str
    strength: float = 1.0
    norm: str = "none"
    layers: frozenset[int] | None = None
    own: bool = False

    @property
    def options(self) -> ApplyOptions:
        """For `apply`."""
        return ApplyOptions.of(
            strength=self.strength, norm=self.norm, layers=self.layers, max_leak=9.0
        )


EDITS = (
    Made("strength 0.3", 0.3),
    Made("strength 0.5", 0.5),
    Made("strength 0.7", 0.7),
    Made("strength 1"),
    Made("strength 1.3", 1.3),
    Made("norms of columns kept", norm="columns"),
    Made("layers 1 and 2 alone", layers=frozenset([1, 2])),
    Made("each layer its own direction", own=True),
    Made("norms of rows kept", norm="rows"),
)


def script(folder: Path, out: Path, made: Made, directions: np.ndarray) -> None:
    """The edit in NumPy, in float64, of all writers of a folder."""
    shutil.copytree(folder, out)
    file = out / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    for name, value in tensors.items():
        if not name.endswith(WRITERS):
            continue
        layer = int(name.split(".")[2]) if "layers" in name else -1
        r = (directions if directions.ndim == 2 else directions[max(0, layer)]).astype(np.float64)
        w = numpy_of(value).astype(np.float64)
        if made.layers is not None and layer >= 0 and layer not in made.layers:
            continue
        w = w.T if "embed" in name else w
        edited = w - made.strength * r.T @ (r @ w)
        if made.norm != "none":
            axis = 0 if made.norm == "columns" else 1
            lengths = np.linalg.norm(w, axis=axis, keepdims=True)
            edited *= lengths / np.linalg.norm(edited, axis=axis, keepdims=True)
        edited = edited.T if "embed" in name else edited
        tensors[name] = mx.array(edited.astype(np.float32)).astype(value.dtype)
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors, {"format": "mlx"})


def makers(work: Path) -> dict[str, Callable[[Made, DirectionFile, Path], Path]]:
    """Way -> makes an edit of the demo that way, and returns the model."""

    def tool(source: str, name: str) -> Callable[[Made, DirectionFile, Path], Path]:
        def make(made: Made, direction: DirectionFile, folder: Path) -> Path:
            apply(direction, source, [folder / name], made.options)
            return folder / name

        return make

    def plain(made: Made, direction: DirectionFile, folder: Path) -> Path:
        script(MODEL_PATH, folder / "script", made, numpy_of(direction.selected))
        return folder / "script"

    def quantized(made: Made, direction: DirectionFile, folder: Path) -> Path:
        source = plain(made, direction, folder)
        convert(str(source), folder / "script.gguf", quantize="Q4_K_M")
        return folder / "script.gguf"

    return {
        "folder": tool("demo", "edited"),
        "Q8_0": tool(str(work / "Q8_0.gguf"), "edited.gguf"),
        "Q4_K_M": tool(str(work / "Q4_K_M.gguf"), "edited.gguf"),
        "script": plain,
        "script, then Q4_K_M": quantized,
    }


def refused(path: Path, asked: PromptSet) -> float:
    """The share of prompts that a GGUF refuses."""
    replies = abl_mlx.load(path).reply(asked.prompts, TOKENS)
    return refusals.rates(replies, asked).refusal_rate


def cosine(found: np.ndarray, true: np.ndarray) -> float:
    """The least |cos| of the directions of any layer."""
    layers = max(len(one) if one.ndim == 3 else 1 for one in (found, true))
    pair = (np.broadcast_to(one, (layers, *one.shape[-2:])) for one in (found, true))
    return min(
        float(np.linalg.svd(a @ b.T, compute_uv=False).min()) for a, b in zip(*pair, strict=True)
    )


def kind(made: Made, record: LearnRecord) -> bool:
    """Whether the kind of the edit was learned: number of directions, layers, norms."""
    layers = sorted(made.layers or range(4))
    norm = made.norm == record.norm and record.layers == layers
    return (record.verdict, record.rank, record.per_layer) == ("edited", 1, made.own) and norm


def row(made: Made, way: str, record: LearnRecord, cos: float, points: float | None) -> str:
    """A line of the table."""
    strength = record.strength or 0.0
    right = "yes" if kind(made, record) else "NO"
    norm = record.norm or "cannot tell"
    return (
        f"| {made.name} | {way} | {cos:.4f} | {strength:.3f} | {norm} | {right} | "
        f"{'' if points is None else f'{points:+.1f}'} |"
    )


def rows(work: Path) -> list[str]:
    """The table's lines, from measuring the direction on."""
    prepared = work / "direction.safetensors"
    measure("demo", prepared, MeasureOptions())
    chosen = direction_file.read(prepared)
    assert chosen.candidates is not None
    each = mx.array(numpy_of(chosen.candidates.directions)[:, -1:, :])
    for name in ("Q8_0", "Q6_K", "Q4_K_M"):
        convert("demo", work / f"{name}.gguf", quantize=name)
    asked = abl_mlx.load_prompts(model=abl_mlx.load("demo")).harmful.test
    lines = []
    for made in EDITS:
        direction = DirectionFile(each if made.own else chosen.selected)
        wanted: float | None = None
        if made.norm != "rows":  # a GGUF cannot keep these
            with tempfile.TemporaryDirectory() as temporary:
                true = Path(temporary) / "true.gguf"
                apply(direction, str(work / "Q6_K.gguf"), [true], made.options)
                wanted = refused(true, asked)
        for way, make in makers(work).items():
            if wanted is None and way in ("Q8_0", "Q4_K_M"):
                continue
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                edited = make(made, direction, folder)
                out = folder / "edit.safetensors"
                record = learn("demo", str(edited), out)
                cos = cosine(
                    numpy_of(direction_file.read(out).selected), numpy_of(direction.selected)
                )
                points = None
                if way.endswith("Q4_K_M") and wanted is not None:
                    other = folder / "other.gguf"
                    apply(out, str(work / "Q6_K.gguf"), [other], ApplyOptions.of(max_leak=9.0))
                    points = 100 * (refused(other, asked) - wanted)
            lines.append(row(made, way, record, cos, points))
            print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    """Print the table, or put it into docs/learn.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into docs/learn.md")
    given = parser.parse_args()
    started = time.time()
    with tempfile.TemporaryDirectory() as work:
        lines = rows(Path(work))
    head = [
        "| edit | made in | \\|cos\\| | strength | norms | kind right | refusals, points |",
        "|---|---|---|---|---|---|---|",
    ]
    text = "\n".join([*head, *lines])
    print(f"{time.time() - started:.0f} s", file=sys.stderr)
    if given.write:
        marked.write(ROOT / "docs" / "learn.md", "benchmark", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
