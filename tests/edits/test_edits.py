"""Every formula of the edit against float64 NumPy."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from abl_mlx.edits.edit import (
    Edit,
    leak,
    leak_read,
    orthonormal,
    rounded,
    target,
    total_leak,
)
from abl_mlx.edits.slabs import Slab
from abl_mlx.models.writers import Writer
from abl_mlx.outputs import gguf_plan
from convert.base.errors import UserError
from convert.gguf import ggml_types

RNG = np.random.default_rng(0)
D, N, V, E = 48, 32, 100, 3


def unit(rows):
    """Orthonormal rows spanning those given, float64."""
    q, _ = np.linalg.qr(np.atleast_2d(rows).astype(np.float64).T)
    return q.T


def writer(kind, gain=None, bias=False):
    gain = None if gain is None else mx.array(gain.astype(np.float32))
    return Writer("w", kind, 0, gain, bias, nn.Module())


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("strength", [1.0, 0.3, -1.0])
@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize(
    ("kind", "parameter", "shape"),
    [
        ("linear", "weight", (D, N)),
        ("linear", "bias", (D,)),
        ("experts", "weight", (E, D, N)),
        ("experts", "bias", (E, D)),
        ("embedding", "weight", (V, D)),
    ],
)
def test_target_is_the_formula(kind, parameter, shape, with_gain, strength, k):
    values = RNG.normal(size=shape)
    directions = RNG.normal(size=(k, D))
    gain = np.exp(RNG.normal(size=D)) if with_gain else None
    u = unit(directions * gain if with_gain else directions)
    projector = strength * u.T @ u  # (d, d)
    if kind == "embedding" or parameter == "bias":
        expected = values - values @ projector
    else:
        expected = values - projector @ values
    edit = Edit(mx.array(directions.astype(np.float32)), strength)
    found = target(edit, writer(kind, gain), parameter, mx.array(values.astype(np.float32)))
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)


def test_half_precision_weights_are_edited_in_float32():
    values = mx.array(RNG.normal(size=(D, N)).astype(np.float32)).astype(mx.bfloat16)
    direction = RNG.normal(size=(1, D))
    found = target(Edit(mx.array(direction.astype(np.float32))), writer("linear"), "weight", values)
    left = np.abs(unit(direction) @ np.array(found).astype(np.float64)).max()
    assert left < 1e-6


def test_orthonormal_keeps_the_span_and_the_sign():
    rows = RNG.normal(size=(3, D))
    basis = np.array(orthonormal(mx.array(rows.astype(np.float32)))).astype(np.float64)
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-5)
    u = unit(rows)
    np.testing.assert_allclose(basis.T @ basis, u.T @ u, atol=1e-5)
    assert (np.diag(basis @ rows.T) > 0).all()


@pytest.mark.parametrize("rows", [np.zeros((1, D)), np.full((1, D), np.nan), np.ones((2, D))])
def test_directions_that_point_nowhere_are_refused(rows):
    with pytest.raises(UserError):
        orthonormal(mx.array(rows.astype(np.float32)))


@pytest.mark.parametrize("axis", [0, -2, -1])
def test_remove_works_along_any_axis(axis):
    u = unit(RNG.normal(size=(2, D)))
    values = RNG.normal(size=(D, D))
    kind = "embedding" if axis == -1 else "linear"
    edit = Edit(mx.array(u.astype(np.float32)))
    found = target(edit, writer(kind), "weight", mx.array(values.astype(np.float32)))
    moved = np.moveaxis(np.array(found).astype(np.float64), axis, -1)
    assert np.abs(moved @ u.T).max() < 1e-5


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_leak_is_the_share_of_the_component_that_is_left(share):
    """Written = target plus ``share`` of what the edit took away: the leak is that share."""
    source = RNG.normal(size=(D, N))
    u = unit(RNG.normal(size=(1, D)))
    wanted = source - u.T @ (u @ source)
    written = wanted + share * (source - wanted)
    noise = RNG.normal(size=(D, N))
    written += 0.1 * (noise - u.T @ (u @ noise))  # error elsewhere is no leak
    found = leak(
        Edit(mx.array(u.astype(np.float32))),
        writer("linear"),
        "weight",
        mx.array(source.astype(np.float32)),
        mx.array(written.astype(np.float32)),
    )
    assert found.value == pytest.approx(share, abs=1e-5)
    expected = np.linalg.norm(written - wanted) / np.linalg.norm(wanted)
    assert found.error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("kind", "shape"), [("linear", (2048, 64)), ("embedding", (64, 2048)),
                                             ("experts", (2, 2048, 32))])  # fmt: skip
def test_bfloat16_keeps_the_edit(kind, shape, k):
    """A plain cast of a wide bfloat16 tensor loses what small shifts of single weights were."""
    source = mx.array(RNG.normal(size=shape).astype(np.float32)).astype(mx.bfloat16)
    edit = Edit(mx.array(RNG.normal(size=(k, 2048)).astype(np.float32)))
    one = writer(kind)
    exact = target(edit, one, "weight", source)
    plain = leak(edit, one, "weight", source, exact.astype(mx.bfloat16))
    kept = rounded(edit, one, "weight", exact, mx.bfloat16)
    assert kept.dtype == mx.bfloat16
    ours = leak(edit, one, "weight", source, kept)
    assert plain.value > (0.003 if k == 1 else 0.001)
    assert ours.value < 0.001
    assert ours.error < 1.05 * plain.error


@pytest.mark.parametrize("kind", [Q.Q6_K, Q.Q4_K, Q.IQ4_XS, None], ids=str)
@pytest.mark.parametrize(("name", "norm"), [("linear", "none"), ("embedding", "none"),
                                            ("linear", "columns")])  # fmt: skip
def test_leak_of_a_matrix_that_is_read_in_pieces(name, norm, kind):
    """Pieces of a file's blocks, or of plain floats, and more of them than one."""
    shape = (600, 768)
    read = [RNG.normal(size=shape).astype(np.float32) for _ in range(2)]
    read[1] = read[0] + 0.03 * read[1]
    grids = read if kind is None else [ggml_types.fresh(one, kind) for one in read]
    before, after = (one if kind is None else one.values() for one in grids)
    before, after = before.astype(np.float64), after.astype(np.float64)
    axis = -2 if name == "linear" else -1
    directions = RNG.normal(size=(2, shape[axis])).astype(np.float32)
    u = unit(directions)
    edit, asked = Edit(mx.array(directions), 0.7, norm=norm), []

    def pair(rows, columns):
        asked.append((rows, columns))
        if kind is None:
            return [one[rows, columns] for one in read]
        raw = [one.frame for one in grids]
        return [gguf_plan.read(one, kind, Slab(rows, columns)) for one in raw]

    found = leak_read(edit, writer(name), "weight", pair, shape)
    projected = u.T @ (u @ before) if axis == -2 else (before @ u.T) @ u
    wanted = before - 0.7 * projected
    if norm == "columns":
        wanted *= np.linalg.norm(before, axis=0) / np.linalg.norm(wanted, axis=0)
    else:
        assert len(asked) > 1

    def along(weights):
        return np.linalg.norm(u @ weights if axis == -2 else weights @ u.T)

    assert found.value == pytest.approx(along(after - wanted) / along(before - wanted), rel=1e-4)
    error = np.linalg.norm(after - wanted) / np.linalg.norm(wanted)
    assert found.error == pytest.approx(error, rel=1e-4)


def test_total_leak_weighs_tensors_by_what_was_removed():
    edit = Edit(mx.array(np.eye(1, D, dtype=np.float32)))
    leaks, squares = [], []
    for scale, share in ((1.0, 0.5), (10.0, 0.1)):
        source = scale * RNG.normal(size=(D, N))
        written = source.copy()
        written[0] *= share
        leaks.append(
            leak(
                edit,
                writer("linear"),
                "weight",
                mx.array(source.astype(np.float32)),
                mx.array(written.astype(np.float32)),
            )
        )
        squares.append((share**2 * (source[0] ** 2).sum(), (source[0] ** 2).sum()))
    missing, wanted = np.sum(squares, axis=0)
    assert total_leak(leaks) == pytest.approx(np.sqrt(missing / wanted), rel=1e-4)


def test_an_edit_that_finds_nothing_is_an_error():
    clean = mx.array(RNG.normal(size=(D, N)).astype(np.float32))
    clean[0] = 0
    edit = Edit(mx.array(np.eye(1, D, dtype=np.float32)))
    with pytest.raises(UserError, match="changed nothing"):
        total_leak([leak(edit, writer("linear"), "weight", clean, clean)])


def test_choosing_nothing_is_an_error():
    writers = [writer("linear"), writer("embedding")]
    with pytest.raises(UserError, match="changes nothing"):
        Edit(mx.ones((1, D)), layers=frozenset(), embedding=False).chosen(writers)
    with pytest.raises(UserError, match="no weights to edit in layer 9: they are in layers 0 to 0"):
        Edit(mx.ones((1, D)), layers=frozenset({9})).chosen(writers)
    with pytest.raises(UserError, match="changes nothing"):
        Edit(mx.ones((1, D)), strength=0.0).chosen(writers)
    chosen = Edit(mx.ones((1, D)), layers=frozenset({0}), embedding=False).chosen(writers)
    assert [one.kind for one in chosen] == ["linear"]
