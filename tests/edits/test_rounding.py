"""Edit-preserving rounding: the component stays where the edit put it, at every type."""

from functools import cache

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from abl_mlx.edits import projection, rounding, rounding_kernels
from abl_mlx.edits.level_kernels import nearest_code
from abl_mlx.outputs import gguf_plan
from convert.base import cores
from convert.base.grids import Grid, in_chunks
from convert.gguf import ggml_types

# Relative error of ordinary quantization on Gaussian weights: docs/architecture.md, and ggml.
ORDINARY = {
    Q.Q8_0: 0.0055, Q.Q6_K: 0.018, Q.Q5_K: 0.037, Q.Q4_K: 0.072, Q.Q4_0: 0.087, Q.Q3_K: 0.151,
    Q.Q2_K: 0.297, Q.Q4_1: 0.079, Q.Q5_0: 0.043, Q.Q5_1: 0.038, Q.IQ4_NL: 0.077, Q.IQ4_XS: 0.077,
    Q.MXFP4: 0.116, Q.NVFP4: 0.096, Q.TQ1_0: 0.82, Q.TQ2_0: 0.82,
}  # fmt: skip
TWO_BITS = {Q.Q2_K, Q.TQ1_0, Q.TQ2_0}


def case(kind, d, n, k, axis, directions=1, seed=0):
    """A quantized tensor in which the directions are k times as strong as a random one, and its
    exact float edit. Everything is float64 but the weights."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(d, directions)))[0].T
    weights = rng.normal(size=(d, n))
    weights += u.T @ ((k - 1) * rng.normal(size=(directions, n)))
    if axis == 1:
        weights = weights.T
    own = ggml_types.fresh(np.ascontiguousarray(weights, dtype=np.float32), kind)
    values = own.values()
    removed = u.T @ (u @ values) if axis == 0 else (values @ u.T) @ u
    return own, values, (values - removed).astype(np.float32), u


def along(u, values, axis):
    return u @ values if axis == 0 else values @ u.T


def leak(grid, source, target, u, axis):
    written = grid.values().astype(np.float64)
    missing = np.linalg.norm(along(u, written - target, axis))
    return missing / np.linalg.norm(along(u, source.astype(np.float64) - target, axis))


def error(grid, target):
    return np.linalg.norm(grid.values() - target.astype(np.float64)) / np.linalg.norm(target)


def rounded(kind, own, source, target, u, axis, how=None):
    removed = np.sqrt(np.mean(np.sum(along(u, source, axis) ** 2, axis=axis)))
    edited = rounding.Edited(target, u, axis, removed)
    encoders = gguf_plan.encoders(kind)
    how = how or rounding.better_source(own, edited, encoders)
    return rounding.round_onto(own, edited, encoders, how)


@pytest.mark.parametrize(("d", "axis"), [(256, 0), (256, 1), (4096, 0)])
@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("kind", sorted(ORDINARY), ids=lambda kind: kind.name)
def test_the_edit_survives_every_type(kind, d, k, axis):
    own, source, target, u = case(kind, d, 256, k, axis)
    grid = rounded(kind, own, source, target, u, axis)
    limit = 0.002 if kind in TWO_BITS and d == 256 else 0.001
    assert leak(grid, source, target, u, axis) <= limit
    assert error(grid, target) <= ORDINARY[kind]


@pytest.mark.parametrize("directions", [2, 4])
@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("d", [256, 1024])
@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_K, Q.Q2_K, Q.IQ4_XS, Q.MXFP4], ids=lambda q: q.name)
def test_several_directions_survive(kind, d, k, directions):
    own, source, target, u = case(kind, d, 256, k, 0, directions)
    grid = rounded(kind, own, source, target, u, 0)
    assert leak(grid, source, target, u, 0) <= 0.01


@pytest.mark.parametrize("kind", [Q.Q4_K, Q.Q3_K, Q.Q2_K], ids=lambda kind: kind.name)
def test_plain_rounding_loses_what_ours_keeps(kind):
    """The tests above can fail: the nearest code of every weight undoes most of the edit."""
    own, source, target, u = case(kind, 2048, 256, 1, 0)
    plain = own.with_codes(own.nearest(target))
    assert leak(plain, source, target, u, 0) > 0.85
    ours = rounded(kind, own, source, target, u, 0, "own")
    assert leak(ours, source, target, u, 0) < 0.001
    # And at what price: less error than the quantization itself has cost already.
    assert error(plain, target) < error(ours, target) < 0.6 * ORDINARY[kind]


def test_the_own_grid_keeps_scales_and_most_codes():
    own, source, target, u = case(Q.Q4_K, 2048, 256, 1, 0)
    grid = rounded(Q.Q4_K, own, source, target, u, 0, "own")
    assert np.mean(grid.scales == own.scales) > 0.99
    assert np.mean(grid.codes != own.codes) < 0.05
    assert np.abs(grid.codes.astype(int) - own.codes).max() <= 3


def test_the_better_grid_is_chosen():
    """Near edits keep their grid, far ones get a fresh one: by the error of the whole rounding."""
    for k in (1, 10):
        own, source, target, u = case(Q.Q4_K, 2048, 256, k, 0)
        edited = rounding.Edited(target, u, 0, float(np.sqrt(np.mean((u @ source) ** 2))))
        encoders = gguf_plan.encoders(Q.Q4_K)
        errors = {
            how: error(rounding.round_onto(own, edited, encoders, how), target)
            for how in ("own", "fresh")
        }
        chosen = rounding.better_source(own, edited, encoders)
        assert errors[chosen] <= min(errors.values()) + 0.003
        assert errors["own"] <= 1.2 * errors["fresh"]
    # Weights that have shrunk tenfold are held by a fresh grid alone.
    small = rounding.Edited(target * 0.1, u, 0, 0.1)
    assert rounding.better_source(own, small, encoders) == "fresh"


def test_added_error_is_near_the_least_that_is_possible():
    """Moving a line's component by e along a unit vector costs at least e² of squared error; on a
    fine grid the multiplier's solution comes close to that bound."""
    rng = np.random.default_rng(0)
    d, n = 2048, 64
    u = rng.normal(size=(1, d))
    u /= np.linalg.norm(u)
    weights = rng.normal(size=(d, n)).astype(np.float32)
    own = ggml_types.fresh(weights, Q.Q8_0)
    source = own.values()
    target = (source - u.T @ (u @ source)).astype(np.float32)
    plain = own.with_codes(own.nearest(target))
    e = (u @ (plain.values() - target))[0]
    ours = rounding.preserve(own, rounding.Edited(target, u, 0, 1.0))
    added = ((ours.values() - target) ** 2).sum(0) - ((plain.values() - target) ** 2).sum(0)
    assert added.sum() < 3 * (e**2).sum() + 1e-3 * ((plain.values() - target) ** 2).sum()


def test_an_arbitrary_target_component_is_held():
    """Half strength and pinning: the component is kept at whatever the target has."""
    own, source, target, u = case(Q.Q4_K, 1024, 256, 4, 0)
    wanted = (target + 0.7 * u.T @ np.ones((1, 256))).astype(np.float32)
    grid = rounded(Q.Q4_K, own, source, wanted, u, 0)
    np.testing.assert_allclose((u @ grid.values())[0], 0.7, atol=0.01)


def test_zero_and_negative_scales_and_odd_widths():
    rng = np.random.default_rng(1)
    d, n, group = 64, 48, 16
    scales = rng.normal(size=(d, n // group)).astype(np.float32) * 0.1
    scales[::7] = 0
    levels = np.array([-8, -3, -1, 0, 2, 5, 9], np.float32)
    codes = rng.integers(0, len(levels), (d, n)).astype(np.uint8)
    own = Grid(codes, levels, scales, None, group)
    u = rng.normal(size=(1, d))
    u /= np.linalg.norm(u)
    source = own.values()
    target = (source - u.T @ (u @ source)).astype(np.float32)
    removed = float(np.sqrt(np.mean((u @ source) ** 2)))
    grid = rounding.preserve(own, rounding.Edited(target, u, 0, removed))
    assert grid.codes.max() < len(levels)
    assert leak(grid, source, target, u, 0) < 0.01


def test_tensors_without_a_component_are_left_nearly_alone():
    own, _, target, u = case(Q.Q4_K, 512, 256, 1, 0)
    exact = rounding.preserve(own, rounding.Edited(target, u, 0, 1.0)).values()
    again = ggml_types.fresh(exact, Q.Q4_K)
    left = rounding.Edited(again.values(), u, 0, 0.0)
    assert np.isfinite(rounding.preserve(again, left).values()).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_lines_in_any_number_are_rounded_and_no_others(axis):
    """More lines than one piece of work has, and no multiple of it."""
    d, lines = 64, 5 * 512 + 32
    own, source, target, u = case(Q.Q4_0, d, lines, 4, axis)
    seen = []
    in_chunks(seen.append, lines, rounding.CHUNK // 512)
    assert max(part.stop for part in seen) == lines
    grid = rounded(Q.Q4_0, own, source, target, u, axis, "own")
    assert leak(grid, source, target, u, axis) <= 0.01


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q2_K], ids=lambda kind: kind.name)
def test_the_component_is_removed_and_not_turned(kind, axis):
    """What the edit takes away must not be readable along another vector: the errors of all lines,
    weighed with what was taken from each, cancel out."""
    own, source, target, u = case(kind, 256, 1024, 1, axis)
    taken = along(u, source, axis)
    taken = (taken.T if axis == 0 else taken).astype(np.float32)
    removed = float(np.sqrt(np.mean(taken**2)))

    def turned(edited):
        written = edited.on(own).values().astype(np.float64) - target
        errors = written if axis == 0 else written.T
        assert np.linalg.norm(along(u, written, axis)) < 0.01 * np.linalg.norm(taken)
        return np.linalg.norm(errors @ taken) / np.sum(taken**2)

    assert turned(rounding.Edited(target, u, axis, removed)) > 0.5
    assert turned(rounding.Edited(target, u, axis, removed, taken)) < 0.1


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [Q.Q4_K, Q.Q6_K, Q.IQ4_XS, Q.MXFP4], ids=lambda kind: kind.name)
def test_a_grid_less_its_components_is_rounded_as_the_weights_are(kind, axis):
    """Edited weights may be told as a grid and the removed components; no code depends on it."""
    own, source, _, u = case(kind, 256, 512, 2, axis, directions=2)
    basis = u.astype(np.float32)
    taken = projection.along(basis, source, axis - 2)
    np.testing.assert_array_equal(projection.along(basis, own, axis - 2), taken)
    target = projection.without(basis, taken, source, axis - 2)
    lines = np.ascontiguousarray(taken.T if axis == 0 else taken)
    told = [rounding.Edited(one, basis, axis, 1.0, lines) for one in (own, target)]
    np.testing.assert_array_equal(told[0].target, target)
    np.testing.assert_array_equal(*(one.on(own).codes for one in told))


@pytest.mark.parametrize("axis", [0, 1])
def test_the_number_of_threads_changes_no_code(axis, monkeypatch):
    own, source, _, u = case(Q.Q4_K, 256, 2304 if axis == 0 else 2100, 1, axis)
    taken = along(u, source, axis).astype(np.float32)
    lines = np.ascontiguousarray(taken.T if axis == 0 else taken)
    edited = rounding.Edited(own, u.astype(np.float32), axis, 1.0, lines)
    codes = []
    for threads in (1, 2, 8):
        monkeypatch.setattr(cores, "_cores", lambda threads=threads: threads)
        monkeypatch.setattr(cores, "_pool", cache(cores._pool.__wrapped__))
        grid = rounding.round_onto(own, edited, gguf_plan.encoders(Q.Q4_K), "own")
        codes.append((grid.codes, grid.scales))
    for each in codes[1:]:
        np.testing.assert_array_equal(each[0], codes[0][0])
        np.testing.assert_array_equal(each[1], codes[0][1])


def test_columns_and_rows_of_many_types_share_machine_code():
    """A kernel takes seconds to compile, so one serves all levels that are whole numbers."""
    counts = []
    for kind in (Q.Q8_0, Q.Q4_1, Q.Q2_K):
        for axis in (0, 1):
            own, source, target, u = case(kind, 256, 256, 1, axis)
            rounded(kind, own, source, target, u, axis, "own")
            counts.append(len(rounding_kernels.lines.signatures))
    assert counts == counts[:1] * 6


@pytest.mark.parametrize("count", [17, 200, 253, 256])
def test_the_nearest_of_many_levels_is_that_of_a_sorted_search(count: int) -> None:
    random = np.random.default_rng(count)
    values = np.sort(random.standard_normal(count)).astype(np.float32)
    grid = Grid(np.zeros((1, 32), np.uint8), values, np.ones((1, 1), np.float32), None, 32)
    levels, mids, _ = rounding._levels(grid)
    assert mids is not None
    tried = np.concatenate([mids, values, random.uniform(-4, 4, 500), [-np.inf, np.inf]])
    between = mids[: count - 1]
    for x in tried.astype(np.float32):
        assert nearest_code.py_func(x, mids) == np.searchsorted(between, x)
    assert len(levels) == count
