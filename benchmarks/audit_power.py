"""How weak an edit an audit without a base sees, by width, depth and strength; and false alarms.

The models are random writers with rows of different sizes; a random direction is removed from them.

    python benchmarks/audit_power.py [SEEDS]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from abl_mlx.audit_weights import verdict
from abl_mlx.edits.slabs import Slab
from abl_mlx.outputs.stream_weights import StreamWeight, StreamWeights

#: Width and layers.
SIZES = [(64, 4), (64, 16), (256, 4)]

#: Strength, and whether of every layer or every other one.
EVERY = [(0.4, 1), (0.5, 1), (0.6, 1), (0.7, 1), (0.7, 2), (0.8, 2), (0.9, 2)]


def model(d: int, layers: int, seed: int, strength: float = 0, step: int = 1) -> StreamWeights:
    """Random writers, and a direction removed from the embedding and every ``step``-th layer."""
    random = np.random.default_rng(seed)
    rows = np.exp(0.4 * random.standard_normal(d)).astype(np.float32)
    direction = random.standard_normal(d).astype(np.float32)
    direction /= np.linalg.norm(direction)

    def writer(name: str, layer: int, n: int) -> StreamWeight:
        w = rows[:, None] * random.standard_normal((d, n), dtype=np.float32)
        if layer % step == 0 or (layer < 0 and step == 1):
            w -= strength * np.outer(direction, direction @ w)

        def read(slab: Slab) -> np.ndarray:
            return w[slab.rows, slab.columns] if layer >= 0 else w.T[slab.rows, slab.columns]

        shape, axis = ((d, n), -2) if layer >= 0 else ((n, d), -1)
        return StreamWeight(name, name, layer, shape, axis, None, "F32", read, lambda: None)

    writers = [writer("embed.weight", -1, 4 * d)]
    for layer in range(layers):
        writers.append(writer(f"layers.{layer}.attention.weight", layer, d))
        writers.append(writer(f"layers.{layer}.mlp.weight", layer, 3 * d))
    return StreamWeights("random", layers, d, writers, False)


def edited(*what: float) -> bool:
    return verdict.alone(model(*what))[0].verdict == verdict.EDITED  # type: ignore[arg-type]


def upper(alarms: int, n: int) -> float:
    """The upper end of Clopper and Pearson's one-sided 95% interval, by bisection."""
    from math import comb

    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        at_most = sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(alarms + 1))
        low, high = (p, high) if at_most > 0.05 else (low, p)
    return high


def main() -> None:
    seeds = int(sys.argv[1]) if sys.argv[1:] else 2
    names = [f"{a:g}{'' if step == 1 else ', every other layer'}" for a, step in EVERY]
    print(f"| width | layers | not seen below | {' | '.join(names)} | false alarms |")
    print("|---" * (4 + len(EVERY)) + "|", flush=True)
    alarms = count = 0
    for d, layers in SIZES:
        nulls = [verdict.alone(model(d, layers, 100 + seed))[0] for seed in range(10 * seeds)]
        wrong = sum(one.verdict != verdict.NOT_EDITED for one in nulls)
        alarms, count = alarms + wrong, count + len(nulls)
        below = next(one.not_seen_below for one in nulls if one.not_seen_below)
        cells = [
            f"{sum(edited(d, layers, seed, *how) for seed in range(seeds))}/{seeds}"
            for how in EVERY
        ]
        print(
            f"| {d} | {layers} | {below['all layers']:g}; every other "
            f"{below['every other layer']:g} | {' | '.join(cells)} | {wrong}/{len(nulls)} |",
            flush=True,
        )
    print(f"\n{alarms} false alarms in {count}: at most {upper(alarms, count):.1%} (95%).")


if __name__ == "__main__":
    main()
