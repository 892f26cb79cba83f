"""The gain of an importance matrix: KL of quantized GGUFs from floats, unedited and edited.

    python benchmarks/importance.py MODEL-F16.gguf                  # prints the table
    python benchmarks/importance.py MODEL-F16.gguf --write          # puts it into docs/gguf.md
    python benchmarks/importance.py MODEL-F16.gguf --work FOLDER    # keeps what was made

`measure --imatrix` makes the importance matrix and the direction from the bundled training prompts.
Each file type is written four times, with and without the matrix, unedited by `convert` and edited
by `apply`. Every file is loaded in MLX and compared with the float file on the replies to held-out
harmless prompts; edited files are compared with the edited float file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from abl_mlx.behaviour import exact_kl  # noqa: E402
from abl_mlx.choices import ApplyOptions, MeasureOptions  # noqa: E402
from abl_mlx.commands.conversion import convert  # noqa: E402
from abl_mlx.commands.measure_apply import apply, measure  # noqa: E402
from abl_mlx.inputs import prompts  # noqa: E402
from abl_mlx.models import from_gguf  # noqa: E402
from abl_mlx.models.chat_model import ChatModel  # noqa: E402
from abl_mlx.records.evaluations import Divergence  # noqa: E402
from convert.gguf.file import GgufSource  # noqa: E402
from tools import marked  # noqa: E402

TYPES = ("Q4_K_M", "Q3_K_M", "Q2_K")
TRAIN, TEST, TOKENS = 64, 24, 32


@contextmanager
def loaded(path: Path) -> Iterator[ChatModel]:
    with GgufSource(path) as source:
        yield from_gguf.load(source)[0]


def written(
    floats: Path, folder: Path, file_type: str | None, *, edited: bool, imatrix: bool
) -> Path:
    """A GGUF of a file type (None for that of the floats), made unless it exists."""
    weights = folder / "importance.gguf" if imatrix else None
    name = f"{file_type}{'-edited' if edited else ''}{'-imatrix' if imatrix else ''}.gguf"
    out = folder / name
    if out.exists():
        return out
    if edited:
        options = ApplyOptions.of(quantize=file_type, imatrix=weights)
        apply(folder / "direction.safetensors", str(floats), [out], options)
    else:
        convert(str(floats), out, quantize=file_type, imatrix=weights)
    return out


def divergences(floats: Path, folder: Path, edited: bool) -> dict[tuple[str, bool], Divergence]:
    """(file type, whether weighted) -> KL from the floats."""
    base_path = written(floats, folder, None, edited=True, imatrix=False) if edited else floats
    chosen = prompts.load_sets(None, None, 0).harmless.test.prompts[:TEST]
    found = {}
    with loaded(base_path) as chat, exact_kl.baseline(chat, chosen, tokens=TOKENS) as base:
        del chat
        for file_type in TYPES:
            for imatrix in (False, True):
                path = written(floats, folder, file_type, edited=edited, imatrix=imatrix)
                with loaded(path) as quantized:
                    found[file_type, imatrix] = exact_kl.kl(quantized, base)
                say(f"{path.name}: {found[file_type, imatrix]}")
    return found


def table(rows: Sequence[tuple[str, bool, Divergence, Divergence]]) -> str:
    """The table in Markdown."""
    lines = [
        "| type | | KL, plain | KL, weighted | change | first token |",
        "|---|---|---|---|---|---|",
    ]
    for file_type, edited, plain, weighted in rows:
        change = weighted.k32 / plain.k32 - 1
        lines.append(
            f"| {file_type} | {'edited' if edited else 'unedited'} | {plain.k32:.4f} | "
            f"{weighted.k32:.4f} | {change:+.0%} | {plain.k1:.4f}, {weighted.k1:.4f} |"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Print the table, or put it into docs/gguf.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("floats", type=Path, help="a GGUF in F16, BF16 or F32")
    parser.add_argument("--layer", type=int, default=14, help="the layer of the direction")
    parser.add_argument("--work", type=Path, help="keep what is made in this folder")
    parser.add_argument("--write", action="store_true", help="put it into docs/gguf.md")
    given = parser.parse_args()
    started, cpu = time.time(), os.times()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "importance.gguf").exists():
            options = MeasureOptions.of(limit=TRAIN, layer=given.layer, position=-1)
            measure(
                str(given.floats),
                folder / "direction.safetensors",
                options,
                importance=folder / "importance.gguf",
            )
        both = {edited: divergences(given.floats, folder, edited) for edited in (False, True)}
    rows = [
        (file_type, edited, both[edited][file_type, False], both[edited][file_type, True])
        for file_type in TYPES
        for edited in (False, True)
    ]
    text = table(rows)
    used = sum(os.times()[:2]) - sum(cpu[:2])
    say(f"{time.time() - started:.0f} s, {used:.0f} CPU seconds")
    if given.write:
        marked.write(ROOT / "docs" / "gguf.md", "importance", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
