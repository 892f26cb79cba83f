"""How weak an edit an audit without a base sees, by width, depth and strength; and false alarms.

The models are random writers with rows of different sizes; a random direction is removed from them.

    python benchmarks/audit_power.py            # prints the table
    python benchmarks/audit_power.py --write    # puts it into docs/audit.md
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from abl_mlx.audit_weights import verdict  # noqa: E402
from abl_mlx.edits.slabs import Slab  # noqa: E402
from abl_mlx.outputs.stream_weights import StreamWeight, StreamWeights  # noqa: E402
from tools import marked  # noqa: E402

PAGE = ROOT / "docs" / "audit.md"

#: Width and layers.
SIZES = [(64, 4), (64, 16), (256, 4), (512, 4)]

#: Models of each size and edit, and models of each size that were not edited.
EDITED, NULLS = 2, 20

ALL, OTHER, ONE = "", ", every other layer", ", one layer"


@dataclass(frozen=True)
class How:
    """An edit.

    Attributes:
        strength: α; 0 for none.
        layers: `ALL` and the embedding, every `OTHER` one, or `ONE` in the middle.
        kept: the norms that are kept.
        times: how strong the direction was, in units of a usual one's strength.
    """

    strength: float = 0.0
    layers: str = ALL
    kept: str = "none"
    times: float = 1.0

    @property
    def name(self) -> str:
        """For the table."""
        kept = "" if self.kept == "none" else f", {self.kept} kept"
        strong = "" if self.times == 1 else f", {self.times:g} times as strong"
        return f"{self.strength:g}{self.layers}{kept}{strong}"

    def edits(self, layer: int, layers: int) -> bool:
        """Whether a layer is edited; -1 is the embedding."""
        if self.layers == ONE:
            return layer == layers // 2
        return self.layers == ALL or (layer >= 0 and layer % 2 == 0)


EDITS = [
    *(How(one) for one in (0.4, 0.5, 0.6, 0.7)),
    *(How(one, OTHER) for one in (0.7, 0.8, 0.9)),
    *(How(one, ONE) for one in (0.9, 1.0)),
    *(How(one, kept="rows") for one in (0.4, 0.5, 0.7, 1.0)),
    *(How(one, kept="columns") for one in (0.4, 0.5, 0.7, 1.0)),
    How(0.7, times=4),
    How(0.7, kept="rows", times=4),
    How(1.0, kept="rows", times=4),
]


def removed(w: np.ndarray, direction: np.ndarray, how: How) -> np.ndarray:
    """A writer (d, n) without a part of its component along a direction."""
    made = w - how.strength * np.outer(direction, direction @ w)
    if how.kept != "none":
        axis = 1 if how.kept == "rows" else 0
        before, after = (np.linalg.norm(one, axis=axis, keepdims=True) for one in (w, made))
        made *= before / after
    return made


def model(d: int, layers: int, seed: int, how: How) -> StreamWeights:
    """Random writers, edited."""
    random = np.random.default_rng(seed)
    rows = np.exp(0.4 * random.standard_normal(d)).astype(np.float32)
    direction = random.standard_normal(d).astype(np.float32)
    direction /= np.linalg.norm(direction)

    def writer(name: str, layer: int, n: int) -> StreamWeight:
        w = rows[:, None] * random.standard_normal((d, n), dtype=np.float32)
        w += (how.times - 1) * np.outer(direction, direction @ w)
        if how.edits(layer, layers):
            w = removed(w, direction, how)

        def read(slab: Slab) -> np.ndarray:
            return w[slab.rows, slab.columns] if layer >= 0 else w.T[slab.rows, slab.columns]

        shape, axis = ((d, n), -2) if layer >= 0 else ((n, d), -1)
        return StreamWeight(name, name, layer, shape, axis, None, "F32", read, lambda: None)

    writers = [writer("embed.weight", -1, 4 * d)]
    for layer in range(layers):
        writers.append(writer(f"layers.{layer}.attention.weight", layer, d))
        writers.append(writer(f"layers.{layer}.mlp.weight", layer, 3 * d))
    return StreamWeights("random", layers, d, writers, False)


def seen(d: int, layers: int, seed: int, how: How) -> bool:
    """Whether the edit of a model is seen."""
    return verdict.alone(model(d, layers, seed, how))[0].verdict == verdict.EDITED


def upper(alarms: int, n: int) -> float:
    """The upper end of Clopper and Pearson's one-sided 95% interval, by bisection."""
    from math import comb

    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        at_most = sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(alarms + 1))
        low, high = (p, high) if at_most > 0.05 else (low, p)
    return high


def controls(page: str) -> list[str]:
    """The rows of models that were not edited in the tables of docs/audit.md."""
    parts = page.split("### Not edited\n")[1:]
    rows = [line for part in parts for line in part.split("\n#")[0].splitlines()]
    return [line for line in rows if line.startswith("| ") and not line.startswith("| model |")]


def main() -> None:
    """Print the table, or put it into docs/audit.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into docs/audit.md")
    given = parser.parse_args()
    columns, alarms = {}, 0
    for d, layers in SIZES:
        nulls = [verdict.alone(model(d, layers, 100 + seed, How()))[0] for seed in range(NULLS)]
        wrong = sum(one.verdict != verdict.NOT_EDITED for one in nulls)
        alarms += wrong
        below = next(one.not_seen_below for one in nulls if one.not_seen_below)
        columns[f"{d}, {layers}"] = [
            *(
                f"{sum(seen(d, layers, seed, how) for seed in range(EDITED))}/{EDITED}"
                for how in EDITS
            ),
            *(f"{strength:g}" for strength in below.values()),
            f"{wrong}/{NULLS}",
        ]
        print(f"{d}, {layers}: {', '.join(columns[f'{d}, {layers}'])}", file=sys.stderr)
    names = [how.name for how in EDITS]
    names += [f"not seen below: {some}" for some in below]
    lines = [f"| width, layers | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [
        f"| {' | '.join(row)} |"
        for row in zip([*names, "false alarms"], *columns.values(), strict=True)
    ]
    count, others = NULLS * len(SIZES), controls(PAGE.read_text())
    wrong = sum("| not edited |" not in row for row in others)
    most = upper(alarms + wrong, count + len(others))
    lines += [
        "",
        f"**False alarms.** There are {alarms} among the {count} random models, and {wrong} among",
        f'the {len(others)} models, made and real, under "Not edited" in the tables below. So with',
        f"95% confidence at most {most:.1%} of models like these {count + len(others)} get one",
        "(Clopper and Pearson, one-sided). They are not a sample of what is on the hub.",
    ]
    if given.write:
        marked.write(PAGE, "power", "\n".join(lines))
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
