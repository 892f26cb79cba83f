"""Edit-preserving rounding with an importance matrix: the same leak at less weighted error."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from abl_mlx.edits import rounding
from abl_mlx.outputs import gguf_plan
from convert.gguf import ggml_types

D, N = 512, 512
KINDS = [Q.Q4_K, Q.Q2_K, Q.Q3_K, Q.IQ4_XS, Q.Q8_0]


def case(axis: int, seed: int = 0) -> tuple[rounding.Edited, np.ndarray, np.ndarray]:
    """An edit of random weights, the source, and an uneven importance of the columns."""
    random = np.random.default_rng(seed)
    source = random.standard_normal((D, N)).astype(np.float32)
    u = random.standard_normal((1, D if axis == 0 else N)).astype(np.float32)
    u /= np.linalg.norm(u)
    source += (2 * u.T @ random.standard_normal((1, N)) if axis == 0 else
               2 * random.standard_normal((D, 1)) @ u).astype(np.float32)  # fmt: skip
    taken = (u @ source).T if axis == 0 else source @ u.T
    target = source - (u.T @ taken.T if axis == 0 else taken @ u)
    importance = np.exp(1.5 * random.standard_normal(N)).astype(np.float32)
    removed = float(np.sqrt(np.mean(taken**2)))
    edited = rounding.Edited(target, u, axis, removed, np.ascontiguousarray(taken), importance)
    return edited, source, importance


def leak(edited: rounding.Edited, values: np.ndarray, source: np.ndarray) -> float:
    def along(x: np.ndarray) -> np.ndarray:
        return edited.basis @ x if edited.axis == 0 else x @ edited.basis.T

    return float(
        np.linalg.norm(along(values - edited.target))
        / np.linalg.norm(along(source - edited.target))
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("axis", [0, 1])
def test_less_weighted_error_at_the_same_leak(kind: Q, axis: int) -> None:
    edited, source, importance = case(axis)
    errors = []
    for weights in (None, importance):
        one = rounding.Edited(
            edited.target, edited.basis, axis, edited.removed, edited.taken, weights
        )
        values = one.on(ggml_types.fresh(edited.target, kind, weights)).values()
        assert leak(edited, values, source) < 1e-3
        errors.append(float(np.sum(np.square(values - edited.target) * importance)))
    # Q8_0 has no choice of scales.
    assert errors[1] < (1.1 if kind == Q.Q8_0 else 0.95) * errors[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_the_removed_component_stays_unreadable(axis: int) -> None:
    edited, _, importance = case(axis)
    grid = ggml_types.fresh(edited.target, Q.Q2_K, importance)
    taken = edited.taken
    assert taken is not None

    def turned(taken_or_not: np.ndarray | None) -> float:
        one = rounding.Edited(
            edited.target, edited.basis, axis, edited.removed, taken_or_not, importance
        )
        errors = one.on(grid).values() - edited.target
        weights = np.sqrt(importance) if axis == 0 else np.ones(D)
        lines = errors if axis == 0 else errors.T
        return float(np.linalg.norm((lines * weights) @ taken) / np.sum(taken.T**2 * weights))

    assert turned(taken) < 0.3 * turned(None)


def test_equal_importance_changes_nothing() -> None:
    for axis in (0, 1):
        edited, _, _ = case(axis)
        grid = ggml_types.fresh(edited.target, Q.Q4_K)
        plain = rounding.Edited(
            edited.target, edited.basis, axis, edited.removed, edited.taken, None
        )
        equal = rounding.Edited(
            edited.target, edited.basis, axis, edited.removed, edited.taken, np.full(N, 3.0)
        )
        np.testing.assert_array_equal(plain.on(grid).codes, equal.on(grid).codes)


@pytest.mark.parametrize("kind", [Q.Q4_K, Q.Q4_0, Q.Q6_K], ids=lambda kind: kind.name)
def test_blocks_that_values_leave_are_refitted_by_importance(kind: Q) -> None:
    edited, _, importance = case(0)
    grid = ggml_types.fresh(edited.target, kind)
    values = edited.target.copy()
    values[3, 256:] *= 3
    values[7, :32] *= 5
    errors = []
    for weights in (None, importance):
        found = ggml_types.refit(grid, values, kind, weights)
        found = found.with_codes(found.nearest(values))
        errors.append(found.squared_error(values, importance)[[3, 7]].sum())
    assert errors[1] <= errors[0]


def test_the_better_grid_is_the_one_with_less_weighted_error() -> None:
    """Weights on a grid that serves unimportant columns only: a fresh grid is better by weight."""
    random = np.random.default_rng(1)
    target = random.standard_normal((256, 256)).astype(np.float32)
    importance = np.where(np.arange(256) % 32 < 4, 100.0, 0.01).astype(np.float32)
    own = ggml_types.fresh(target, Q.Q2_K, 1 / importance)
    u = np.eye(256, dtype=np.float32)[:1]
    choices = []
    for weights in (importance, 1 / importance):
        edited = rounding.Edited(target, u, 0, 0.0, None, weights)
        encoders = gguf_plan.encoders(Q.Q2_K, weights)
        choices.append(rounding.better_source(own, edited, encoders))
    assert choices == ["fresh", "own"]
