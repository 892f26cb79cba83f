"""Verdicts of `abl-mlx audit` on edited models and on others: the table in docs/audit.md.

    python benchmarks/audit_table.py            # prints it
    python benchmarks/audit_table.py --write    # puts it into docs/audit.md

Every model is written to a folder as users have it, and audited without a base. Labels that abl-mlx
leaves in its outputs do not count. About six minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from abl_mlx.audit_weights import verdict  # noqa: E402
from abl_mlx.choices import ApplyOptions, MeasureOptions  # noqa: E402
from abl_mlx.commands import audit, conversion, measure_apply  # noqa: E402
from abl_mlx.demo import MODEL_PATH  # noqa: E402
from abl_mlx.directions import direction_file  # noqa: E402
from abl_mlx.inputs import prompts  # noqa: E402
from abl_mlx.models import chat_model  # noqa: E402
from tests.support import tiny  # noqa: E402
from tools import marked  # noqa: E402

MODELS = {
    "demo": MODEL_PATH,
    **{name: ROOT / "tests/support/models" / name for name in ("easy", "hard")},
}
WRITER = re.compile(r"(embed_tokens|o_proj|down_proj)\.weight$")
PROMPTS = {"harmful": "locked", "harmless": "allowed"}
WHOLE = ApplyOptions()
PLAIN = ApplyOptions.of(plain_rounding=True, max_leak=1e9)
SEEN, BEYOND, CONTROL = "edited", "beyond what must be seen", "not edited"


@dataclass(frozen=True)
class Case:
    """A model to audit.

    Attributes:
        model: the name of the original model.
        name: what was done to it.
        expected: SEEN, BEYOND or CONTROL.
        path: its folder.
        direction: (k, d), the directions that were removed; None for controls.
    """

    model: str
    name: str
    expected: str
    path: Path
    direction: Path | None = None


# --- making models -----------------------------------------------------------------------------


def quantized(folder: Path, out: Path, bits: int) -> Path:
    """As `mlx_lm.convert` does it."""
    from mlx_lm import convert

    if not out.exists():
        convert(str(folder), str(out), quantize=True, q_bits=bits, q_group_size=64)
    return out


def gguf(folder: Path, out: Path, kind: str) -> Path:
    """As `abl-mlx convert --quantize` does it."""
    if not out.exists():
        conversion.convert(str(folder), out, quantize=kind)
    return out


def edited(direction: Path, folder: Path, out: Path, options: ApplyOptions = WHOLE) -> Path:
    """As `abl-mlx apply` does it."""
    measure_apply.apply(direction, str(folder), [out], options)
    return out


def changed(
    folder: Path, out: Path, change: Callable[[str, np.ndarray], np.ndarray], only: str = ""
) -> Path:
    """A copy of a float folder whose writers `change` has changed; it takes and gives float32."""
    shutil.copytree(folder, out)
    for file in out.glob("model*.safetensors"):
        tensors = dict(mx.load(str(file)))
        for name, value in tensors.items():
            if WRITER.search(name) and re.search(only, name):
                new = change(name, np.array(value.astype(mx.float32)))
                tensors[name] = mx.array(new.astype(np.float32)).astype(value.dtype)
        mx.eval(tensors)
        mx.save_safetensors(str(file), tensors, {"format": "mlx"})
    return out


def fine_tuned(
    folder: Path,
    out: Path,
    steps: int = 8,
    rate: float = 3e-4,
    batch: tuple[int, int] = (4, 64),
) -> Path:
    """Some steps of Adam on the demo's prompts, all weights; ``batch`` is (texts, tokens)."""
    from mlx_lm import load

    # Not loaded by abl_mlx, which on a CPU keeps weights in a form that cannot be trained.
    model, tokenizer = load(str(folder))[:2]
    model.set_dtype(mx.float32)
    texts = prompts.load_demo().harmless.train.texts
    ids = [id for text in texts for id in tokenizer.encode(text, add_special_tokens=False)]
    batches = mx.array(np.resize(ids, (steps, *batch)))

    def loss(model: nn.Module, tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    optimizer = optim.Adam(learning_rate=rate)
    step = nn.value_and_grad(model, loss)
    for tokens in batches:
        _, gradients = step(model, tokens)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    new = {
        name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(model.parameters())
    }

    def trained(name: str, old: np.ndarray) -> np.ndarray:
        assert not np.allclose(new[name], old, rtol=1e-3), name
        return new[name]

    return changed(folder, out, trained)


def random_like(name: str, seed: int) -> np.random.Generator:
    """A random generator whose seed depends on the tensor's name."""
    return np.random.default_rng([seed, *name.encode()])


def lora(name: str, w: np.ndarray) -> np.ndarray:
    """A rank-4 addition a tenth as large as the weight."""
    random = random_like(name, 0)
    low = random.standard_normal((w.shape[0], 4)) @ random.standard_normal((4, w.shape[1]))
    return w + 0.1 * low * np.linalg.norm(w) / np.linalg.norm(low)


def stream_lora(name: str, w: np.ndarray) -> np.ndarray:
    """The same with an output direction that all writers share, as when steering is merged."""
    d = 256
    r = np.random.default_rng(7).standard_normal(d)
    r /= np.linalg.norm(r)
    n = w.shape[0] if "embed" in name else w.shape[1]
    row = 0.2 * random_like(name, 1).standard_normal(n) * np.linalg.norm(w) / np.sqrt(n)
    return w + (np.outer(row, r) if "embed" in name else np.outer(r, row))


def pruned(name: str, w: np.ndarray) -> np.ndarray:
    """The smaller half of the weights set to zero."""
    return np.where(np.abs(w) < np.median(np.abs(w)), 0, w)


def without_dimensions(name: str, w: np.ndarray) -> np.ndarray:
    """Rows set to zero, so that nothing is written to four dimensions of the stream."""
    w = w.copy()
    if "embed" in name:
        w[:, [3, 70, 71, 200]] = 0
    else:
        w[[3, 70, 71, 200]] = 0
    return w


def centred(name: str, w: np.ndarray) -> np.ndarray:
    """Weights centred as for LayerNorm, so that nothing writes the mean over dimensions."""
    return w - w.mean(axis=1 if "embed" in name else 0, keepdims=True)


def tiny_singular_value(name: str, w: np.ndarray) -> np.ndarray:
    """The smallest singular value divided by 1,000, along a direction of each writer's own."""
    u, s, v = np.linalg.svd(w, full_matrices=False)
    s[-1] *= 1e-3
    return (u * s) @ v


def decayed(name: str, w: np.ndarray) -> np.ndarray:
    """The lower half of the spectrum squared, so that much of the stream is nearly unused."""
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return (u * (s * np.minimum(1, s / np.median(s)))) @ v


def subspace(direction: Path, out: Path, k: int) -> Path:
    """The direction, and the directions of k − 1 other layers."""
    found = direction_file.read(direction)
    assert found.candidates is not None
    rows = np.array(found.candidates.directions[:, -1].astype(mx.float32))
    kept = [np.array(found.selected[0].astype(mx.float32))]
    for row in rows[::-1]:
        rest = row - sum(np.dot(row, one) * one for one in kept)
        if np.linalg.norm(rest) > 0.3 and len(kept) < k:
            kept.append(rest / np.linalg.norm(rest))
    direction_file.save(
        out, direction_file.DirectionFile(mx.array(np.stack(kept).astype(np.float32)))
    )
    return out


# --- the cases ---------------------------------------------------------------------------------


def edits(name: str, work: Path) -> Iterator[Case]:
    """Edited variants of one of `MODELS`; long because it lists them."""
    folder = MODELS[name]
    r = work / f"{name}.safetensors"
    layers = chat_model.load_lazily(folder).layers
    chosen = MeasureOptions()
    if name != "demo":
        texts = {key: str(folder / f"{file}.txt") for key, file in PROMPTS.items()}
        chosen = MeasureOptions.of(**texts, layer=len(layers) - 2, position=-1)
    measure_apply.measure(str(folder), r, chosen)
    half = frozenset(range(len(layers) // 2, len(layers)))
    eight, four = (quantized(folder, work / f"{name}-{bits}", bits) for bits in (8, 4))
    partial = ApplyOptions.of(strength=0.7, max_leak=1)
    kinds: list[tuple[str, Path, ApplyOptions, str]] = [
        ("float", folder, ApplyOptions(), SEEN),
        ("float, strength 0.7", folder, partial, SEEN),
        ("float, half of the layers", folder, ApplyOptions.of(layers=half), SEEN),
        ("float, no embedding", folder, ApplyOptions.of(embedding=False), SEEN),
        ("8 bits", eight, ApplyOptions(), SEEN),
        ("8 bits, strength 0.7", eight, partial, SEEN),
        ("8 bits, half of the layers", eight, ApplyOptions.of(layers=half), SEEN),
        ("8 bits, naive rounding", eight, PLAIN, SEEN),
        ("8 bits, naive rounding, strength 0.7", eight, PLAIN.but(strength=0.7), SEEN),
        ("8 bits, naive rounding, half", eight, PLAIN.but(layers=half), SEEN),
        ("4 bits", four, ApplyOptions(), SEEN),
        ("4 bits, strength 0.7", four, partial, SEEN),
        ("4 bits, half of the layers", four, ApplyOptions.of(layers=half), SEEN),
        ("float, strength 0.7, half of the layers", folder, partial.but(layers=half), BEYOND),
        (
            "float, one layer",
            folder,
            ApplyOptions.of(layers=frozenset([1]), embedding=False),
            BEYOND,
        ),
        ("float, strength 0.5", folder, partial.but(strength=0.5), BEYOND),
        ("4 bits, naive rounding", four, PLAIN, BEYOND),
        (
            "float, rows keep their norms",
            folder,
            ApplyOptions.of(norm="rows", max_leak=1e9),
            BEYOND,
        ),
    ]
    for what, source, options, expected in kinds:
        out = work / f"{name}-edit"
        yield Case(name, what, expected, edited(r, source, out, options), r)
        shutil.rmtree(out)
    whole = edited(r, folder, work / f"{name}-whole")
    for bits in (8, 4):
        out = quantized(whole, work / f"{name}-after", bits)
        yield Case(name, f"float, then quantized to {bits} bits", SEEN, out, r)
        shutil.rmtree(out)
    for k in (2, 3):
        several = subspace(r, work / f"{name}-{k}.safetensors", k)
        for source, title in ((folder, "float"), (four, "4 bits")):
            out = edited(several, source, work / f"{name}-several")
            yield Case(name, f"{title}, {k} directions", SEEN, out, several)
            shutil.rmtree(out)
    if name in ("demo", "easy"):
        for kind in ("Q8_0", "Q4_K"):
            base = gguf(folder, work / f"{name}-{kind}.gguf", kind)
            out = edited(r, base, work / f"{name}-edit.gguf")
            yield Case(name, f"GGUF {kind}", SEEN, out, r)
            for file in work.glob(f"{name}-edit*"):
                file.unlink()
            out = gguf(whole, work / f"{name}-float-{kind}.gguf", kind)
            yield Case(name, f"float, then GGUF {kind}", SEEN, out, r)
            out.unlink()
    if name == "demo":
        for title, steps, rate in (("fine-tuned", 8, 3e-4), ("fine-tuned hard", 24, 2e-3)):
            out = fine_tuned(whole, work / f"{title} after", steps, rate)
            yield Case(name, f"float, then {title}", BEYOND, out, r)


def controls(work: Path) -> Iterator[Case]:
    """Models from which no direction was removed."""
    for name, folder in MODELS.items():
        yield Case(name, "as it is", CONTROL, folder)
        for bits in (8, 4, 2):
            out = quantized(folder, work / f"{name}-{bits}", bits)
            yield Case(name, f"quantized to {bits} bits", CONTROL, out)
    for kind in ("Q8_0", "Q4_K", "Q2_K"):
        yield Case("demo", f"GGUF {kind}", CONTROL, gguf(MODEL_PATH, work / f"c-{kind}.gguf", kind))
    for name, steps, rate in (("fine-tuned", 8, 3e-4), ("fine-tuned hard", 24, 2e-3)):
        yield Case("demo", name, CONTROL, fine_tuned(MODEL_PATH, work / name, steps, rate))
    changes: dict[str, Callable[[str, np.ndarray], np.ndarray]] = {
        "a merged LoRA of rank 4": lora,
        "a direction added to every writer": stream_lora,
        "half of the weights pruned": pruned,
        "four dimensions pruned": without_dimensions,
        "centred for LayerNorm": centred,
        "a tiny singular value in every writer": tiny_singular_value,
        "half of the spectrum decayed": decayed,
    }
    for name, change in changes.items():
        yield Case("demo", name, CONTROL, changed(MODEL_PATH, work / name, change))
    for arch, width in RANDOM:
        out = work / f"random-{arch}-{width}"
        tiny.write_model(out, arch, seed=width, hidden_size=width, intermediate_size=2 * width)
        yield Case(arch, f"random weights, width {width}", CONTROL, out)


RANDOM = [
    ("llama", 64), ("llama", 256), ("qwen2", 128), ("qwen3", 64), ("gemma2", 128),
    ("gemma3_text", 64), ("phi3", 128), ("qwen3_moe", 64), ("olmo2", 128), ("granite", 256),
]  # fmt: skip


# --- the table ---------------------------------------------------------------------------------


def row(case: Case) -> tuple[str, bool]:
    """One line of the table, and whether the verdict is the expected one."""
    started = time.perf_counter()
    record = audit.audit(str(case.path), direction=case.direction)
    weights = record["weights"]
    cosine = record["direction_cosine"]
    shown = "" if cosine is None or weights["verdict"] == verdict.NOT_EDITED else f"{cosine:.3f}"
    tests = weights["tests"].values()
    gaps = ", ".join(f"{one['gap']:.2f} ({one['gap_over_spread']:.0f})" for one in tests)
    right = case.expected == BEYOND or weights["verdict"] == case.expected
    mark = "" if right else " ✗"
    strength = "" if weights["strength"] is None else f"{weights['strength']:.2f}"
    seconds = time.perf_counter() - started
    print(f"{case.model}, {case.name}: {weights['verdict']}{mark} {seconds:.1f} s", file=sys.stderr)
    return (
        f"| {case.model} | {case.name} | {weights['verdict']}{mark} | {shown} | {strength} | "
        f"{gaps} |",
        right,
    )


HEAD = [
    "| model | what was done | verdict | cos | strength | gaps (over spread) |",
    "|---|---|---|---|---|---|",
]


TITLES = {
    SEEN: "### Edited, and seen",
    BEYOND: "### At and beyond the limits",
    CONTROL: "### Not edited",
}


def tables(cases: Iterable[Case]) -> tuple[str, int]:
    """Audit all cases; returns the tables' text and the number of unexpected verdicts."""
    wrong = 0
    parts: dict[str, list[str]] = {key: [] for key in TITLES}
    for case in cases:
        line, right = row(case)
        parts[case.expected].append(line)
        wrong += not right
    text = "\n".join(
        line
        for key, lines in parts.items()
        if lines
        for line in ["", TITLES[key], "", *HEAD, *lines]
    ).strip()
    total = sum(map(len, parts.values()))
    return f"{text}\n\n{wrong} of {total} verdicts are not what they must be.", wrong


def merged(text: str, earlier: str) -> str:
    """The tables with the rows that an earlier text has of other models.

    Args:
        text, earlier: as `tables` returns them.
    """
    new, old = rows_of(text), rows_of(earlier)
    models = {model(line) for lines in new.values() for line in lines}
    parts = {
        title: [line for line in old.get(title, []) if model(line) not in models]
        + new.get(title, [])
        for title in TITLES.values()
    }
    lines = [
        line
        for title, some in parts.items()
        if some
        for line in ["", title, "", *HEAD, *sorted(some, key=model)]
    ]
    every = [line for some in parts.values() for line in some]
    wrong = sum("✗" in line for line in every)
    total = f"{wrong} of {len(every)} verdicts are not what they must be."
    return "\n".join([*lines, "", total]).strip()


def rows_of(text: str) -> dict[str, list[str]]:
    """Title -> the rows of its table."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("### "):
            title = line
            found[title] = []
        elif line.startswith("|") and line not in HEAD and title:
            found[title].append(line)
    return found


def model(line: str) -> str:
    """The model of a row."""
    return line.split("|")[1].strip()


def write_rows(name: str, text: str) -> None:
    """Put tables between two comments in docs/audit.md; rows of other models there stay."""
    page = ROOT / "docs" / "audit.md"
    earlier = marked.between(page.read_text(encoding="utf-8"), name)
    marked.write(page, name, merged(text, earlier))


def main() -> None:
    """Print the table, or put it into docs/audit.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into docs/audit.md")
    parser.add_argument("--only", default="", help="a regular expression for the names of models")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="audit-") as name:
        work = Path(name)
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            cases: list[Iterator[Case]] = [
                edits(one, work) for one in MODELS if re.search(given.only, one)
            ]
            if not given.only or given.only == "controls":
                cases.append(controls(work))
            text, wrong = tables(chain.from_iterable(cases))
    if given.write:
        write_rows("table", text)
    else:
        print(text)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
