"""Several directions from a self-organizing map of harmful states.

Piras et al. 2025, "SOM Directions Are Better than One: Multi-Directional Refusal Suppression in
Language Models" (arXiv 2511.08379): a map of neurons is trained on the states of harmful prompts,
and each neuron minus the mean of harmless states is a direction. A map of one neuron is the mean of
the states, so this generalizes the difference of means. The paper searches by Bayesian optimization
which of these directions to remove together, after the layer whose difference of means works best;
here they are added one by one, each time the one whose removal has the best effect (`selected`).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from abl_mlx.directions import choice, race
from abl_mlx.directions.effects import Measured, Refined
from abl_mlx.directions.estimators import Array, orthonormal, spectrum, unit
from abl_mlx.directions.measuring import float32
from abl_mlx.directions.race import Runner
from abl_mlx.directions.trial import Effect
from abl_mlx.models import capture


def neurons(states: Array, side: int, rounds: int, narrowest: float = 0.3) -> Array:
    """The neurons of a square map of ``side`` × ``side``, (side², d), from states (N, d).

    The batch map (Kohonen 2013, "Essentials of the self-organizing map"): in each round every
    neuron becomes the mean of all states, weighted by exp(−δ² / 2σ²), δ being its distance on the
    map from the neuron that is nearest to the state. σ falls from half the map's side to
    ``narrowest``. The map begins on the plane of the states' first two principal components, so the
    result depends on the states alone.
    """
    states = np.asarray(states, np.float64)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1)
    grid = grid.reshape(-1, 2).astype(np.float64)
    between = ((grid[:, None] - grid[None]) ** 2).sum(axis=-1)
    found = _plane(states, grid)
    for sigma in np.geomspace(max(side / 2, narrowest), narrowest, rounds):
        weights = np.exp(-between[winners(states, found)] / (2 * sigma**2))
        total = weights.sum(axis=0)
        moved = weights.T @ states / np.maximum(total, 1e-300)[:, None]
        found = np.where(total[:, None] > 1e-12, moved, found)
    return found


def winners(states: Array, found: Array) -> Array:
    """For each state (N, d), the number of the nearest of the neurons (m, d)."""
    distances = (found**2).sum(axis=1) - 2 * states @ found.T
    nearest: Array = distances.argmin(axis=1)
    return nearest


def _plane(states: Array, grid: Array) -> Array:
    """Neurons (m, d) on the plane of the first two principal components, at places (m, 2)."""
    center = states.mean(axis=0)
    axes = spectrum(states - center)
    count = min(2, len(axes.vectors))
    spread = axes.values[:count] / np.sqrt(len(states))
    places = (grid - grid.mean(axis=0)) / max(float(grid.std()), 1e-12)
    on_plane: Array = center + (places[:, :count] * spread) @ axes.vectors[:count]
    return on_plane


def directions(harmful: Array, harmless: Array, side: int, rounds: int) -> tuple[Array, Array]:
    """Unit directions of the neurons to which states are nearest, (m, d), and their counts (m,)."""
    harmful = np.asarray(harmful, np.float64)
    found = neurons(harmful, side, rounds)
    counts = np.bincount(winners(harmful, found), minlength=len(found))
    apart = found[counts > 0] - harmless.mean(axis=0, dtype=np.float64)
    return unit(apart), counts[counts > 0]


def selected(measured: Measured, layer: int, position: int, *, side: int, rounds: int) -> Refined:
    """The directions of a map whose removal together has the best effect, added one by one.

    Args:
        measured: the model and its candidates.
        layer, position: where the map is trained.
        side, rounds: of the map.
    """
    trial = measured.trial()
    states = [_states(measured, name, layer, position) for name in ("harmful", "harmless")]
    trial.tokens += sum(
        len(one) for name in ("harmful", "harmless") for one in measured.train[name]
    )
    found, _ = directions(states[0], states[1], side, rounds)
    taken: list[int] = []
    effects: list[Effect] = []
    while len(taken) < min(measured.rank, len(found)):
        others = [n for n in range(len(found)) if n not in taken]
        runners = [Runner(n, measured.edit_for(_rows(found, [*taken, n]))) for n in others]
        best = race.run(
            trial,
            runners,
            lambda effect: choice.gentle(
                effect, measured.max_kl, trial.left, trial.is_whole(effect)
            ),
            lambda effect: effect.kl <= measured.max_kl,
            lambda effect: effect.refused <= trial.left,
            lambda runner: runner.effect.refused <= trial.left,
            "directions of the map",
        )[0]
        if effects and best.effect.refusal >= effects[-1].refusal:
            break  # one more direction frees nothing more
        taken.append(best.of)
        effects.append(best.effect)
        if best.effect.refused <= trial.left:
            break
    return Refined(
        _rows(found, taken),
        f"{len(taken)} of {len(found)} directions of a self-organizing map, added one by one",
        {f"refused_with_{n}": one.refused for n, one in enumerate(effects, 1)},
    )


def _states(measured: Measured, name: str, layer: int, position: int) -> Array:
    prompts = measured.train[name]
    label = f"{name} prompts"
    return capture.after_layer(measured.chat, prompts, layer, [position], label=label)[:, 0]


def _rows(found: Array, taken: Sequence[int]) -> mx.array:
    """Orthonormal rows that span the directions that were taken."""
    return float32(orthonormal(found[list(taken)])[0])
