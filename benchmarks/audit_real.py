"""Verdicts of `abl-mlx audit` on real models, edited or not: the second table in docs/audit.md.

    python benchmarks/audit_real.py FOLDER            # GGUFs of real models; prints the table
    python benchmarks/audit_real.py FOLDER --write    # puts it into docs/audit.md

Each model becomes a float16 folder, from which variants are written as users have them:
requantized, with noise, pruned, fine-tuned, merged; and edited by abl-mlx or by plain rounding. The
direction is the difference of means of a middle layer at the prompts' last token; a base model
without a chat template gets one that renders only the prompt. Labels that abl-mlx leaves in its
outputs are not counted. About an hour on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from audit_table import (  # noqa: E402
    BEYOND,
    CONTROL,
    PLAIN,
    SEEN,
    Case,
    changed,
    edited,
    fine_tuned,
    gguf,
    lora,
    pruned,
    quantized,
    random_like,
    tables,
    write_rows,
)

from abl_mlx.choices import ApplyOptions, MeasureOptions  # noqa: E402
from abl_mlx.commands import (  # noqa: E402
    conversion,
    measure_apply,
)
from abl_mlx.models import chat_model  # noqa: E402

#: Learning rate of the fine-tune, of a usual size for all weights of a small model.
RATE = 2e-5

ALIKE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def float_folder(file: Path, out: Path, work: Path, dtype: str = "float16") -> Path:
    """A GGUF as a folder of floats, for mlx-lm and transformers."""
    from mlx_lm import convert

    conversion.convert(str(file), work / "converted")
    template = work / "converted" / "chat_template.jinja"
    if not template.exists():
        template.write_text(ALIKE, encoding="utf-8")
    convert(str(work / "converted"), str(out), dequantize=True, dtype=dtype)
    shutil.rmtree(work / "converted")
    return out


def noise(name: str, w: np.ndarray) -> np.ndarray:
    """Gaussian noise of 2% of the weights' size."""
    return w + 0.02 * w.std() * random_like(name, 2).standard_normal(w.shape)


def merged(other: dict[str, mx.array], name: str, w: np.ndarray) -> np.ndarray:
    """The mean with another model of the same shape."""
    return (w + np.array(other[name].astype(mx.float32))) / 2


def tensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of a folder."""
    return {
        k: v for file in folder.glob("model*.safetensors") for k, v in mx.load(str(file)).items()
    }


def controls(name: str, file: Path, folder: Path, work: Path) -> Iterator[Case]:
    """A model from which no direction was removed."""
    yield Case(name, "as it is", CONTROL, file)
    for kind in ("Q8_0", "Q4_K_M"):
        yield Case(
            name, f"requantized to {kind}", CONTROL, gguf(folder, work / f"{kind}.gguf", kind)
        )
        (work / f"{kind}.gguf").unlink()
    yield Case(name, "requantized to MLX 4-bit", CONTROL, quantized(folder, work / "four", 4))
    tuned = fine_tuned(folder, work / "tuned", 4, RATE, (1, 48))
    yield Case(name, "fine-tuned", CONTROL, tuned)
    changes: dict[str, Callable[[str, np.ndarray], np.ndarray]] = {
        "noise of 2%": noise,
        "half of the weights pruned": pruned,
        "merged with the fine-tuned one": partial(merged, tensors(tuned)),
        "a merged LoRA of rank 4": lora,
    }
    for what, change in changes.items():
        out = changed(folder, work / "changed", change)
        yield Case(name, what, CONTROL, out)
        shutil.rmtree(out)


def edits(name: str, folder: Path, work: Path) -> Iterator[Case]:
    """The model with a direction removed."""
    layers = len(chat_model.load_lazily(folder).layers)
    r = work / "r.safetensors"
    measure_apply.measure(
        str(folder), r, MeasureOptions.of(layer=layers * 3 // 5, position=-1, limit=16)
    )
    half = frozenset(range(layers // 2, layers))
    eight = quantized(folder, work / "eight", 8)
    weak = ApplyOptions.of(strength=0.7, max_leak=1)
    kinds = [
        ("float", folder, ApplyOptions(), SEEN),
        ("float, strength 0.7", folder, weak, SEEN),
        ("float, half of the layers", folder, ApplyOptions.of(layers=half), SEEN),
        ("float, no embedding", folder, ApplyOptions.of(embedding=False), SEEN),
        ("8 bits", eight, ApplyOptions(), SEEN),
        ("8 bits, strength 0.7", eight, weak, SEEN),
        ("8 bits, half of the layers", eight, ApplyOptions.of(layers=half), SEEN),
        ("8 bits, naive rounding", eight, PLAIN, SEEN),
        ("8 bits, naive rounding, strength 0.7", eight, PLAIN.but(strength=0.7), SEEN),
        ("8 bits, naive rounding, half", eight, PLAIN.but(layers=half), SEEN),
        ("float, strength 0.7, half of the layers", folder, weak.but(layers=half), BEYOND),
        ("float, strength 0.5", folder, weak.but(strength=0.5), BEYOND),
    ]
    for what, source, options, expected in kinds:
        out = edited(r, source, work / "edit", options)
        yield Case(name, what, expected, out, r)
        shutil.rmtree(out)
    whole = edited(r, folder, work / "whole")
    out = gguf(whole, work / "whole.gguf", "Q4_K_M")
    yield Case(name, "float, then Q4_K_M", SEEN, out, r)


def main() -> None:
    """Print the table, or put it into docs/audit.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the GGUFs are")
    parser.add_argument("--write", action="store_true", help="put it into docs/audit.md")
    parser.add_argument("--only", default="", help="files to take, a regular expression")
    given = parser.parse_args()

    def cases() -> Iterator[Case]:
        for file in sorted(given.folder.glob("*.gguf")):
            if re.search(given.only, file.stem):
                with tempfile.TemporaryDirectory(prefix="audit-") as place:
                    work = Path(place)
                    folder = float_folder(file, work / "float", work)
                    yield from controls(file.stem, file, folder, work)
                    yield from edits(file.stem, folder, work)

    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        text, wrong = tables(cases())
    if given.write:
        write_rows("real table", text)
    else:
        print(text)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
