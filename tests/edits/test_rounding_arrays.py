"""Rounding in MLX arrays chooses the codes that the kernels choose."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.choices import ApplyOptions
from abl_mlx.commands import measure_apply
from abl_mlx.edits import projection, rounding, rounding_arrays
from abl_mlx.edits.level_arrays import Levels
from convert.base import grids
from convert.base.grids import Grid
from convert.mlx.grids import MlxCodec, Quantization
from convert.mlx.safetensors_files import TensorFiles
from tests.outputs.test_mlx_quantized import quantize
from tests.support import tiny

AFFINE = [Quantization(bits, group) for bits, group in
          ((2, 32), (3, 64), (4, 128), (4, 64), (5, 32), (6, 64), (8, 32))]  # fmt: skip
OTHERS = [Quantization(4, 32, "mxfp4"), Quantization(8, 32, "mxfp8"), Quantization(4, 16, "nvfp4")]


@pytest.fixture
def short_pieces(monkeypatch):
    """Eight lines compensate each other's errors, in place of 512: less to compute."""
    monkeypatch.setattr(rounding, "_LINES", 8)
    monkeypatch.setattr(rounding, "_SPAN", 8)
    for module in (grids, rounding):
        monkeypatch.setattr(module, "CHUNK", 1 << 10)


def codec_of(mode):
    return MlxCodec(mode, "BF16" if mode.mode == "affine" else "U8")


def case(mode, shape, axis, k=1, strength=1.0):
    """A quantized matrix, and the edit that removes k directions from it."""
    rng = np.random.default_rng(shape[0] + k)
    own = codec_of(mode).fresh((0.02 * rng.standard_normal(shape)).astype(np.float32))
    basis = projection.orthonormal(rng.standard_normal((k, shape[axis])).astype(np.float32))
    along = projection.along(basis, own, axis - 2) * np.float32(strength)
    taken = np.ascontiguousarray(along if axis else along.T)
    length = float(np.sqrt(np.mean(np.sum(taken**2, axis=1))))
    return own, rounding.Edited(own, basis, axis, length, taken)


def same(grid, edited):
    wanted, found = rounding.preserve(grid, edited), rounding_arrays.chosen(grid, edited)
    np.testing.assert_array_equal(found.codes, wanted.codes)
    assert np.count_nonzero(found.codes != grid.nearest(edited.target)) > 0
    return found


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("mode", [*AFFINE, *OTHERS], ids=str)
def test_columns_of_every_type(mode):
    own, edited = case(mode, (96, 128), 0)
    assert rounding.Problem.of(own, edited).piece == 8
    found = same(own, edited)
    for old, new in zip(own.frame[1:], codec_of(mode).encode(found)[1:], strict=True):
        assert old is new


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("mode", [AFFINE[3], *OTHERS], ids=str)
def test_rows_of_which_the_last_piece_has_fewer(mode):
    same(*case(mode, (20, 128), 1, strength=0.5))


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("mode", [AFFINE[0], OTHERS[1]], ids=str)
def test_several_directions(mode, axis):
    same(*case(mode, (96, 32) if axis == 0 else (8, 96), axis, k=2, strength=1.3))


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_that_no_grid_holds_and_scales_of_zero(axis):
    """With weights of the errors, and lines of a length that no partial sums divide."""
    rng = np.random.default_rng(1)
    own, edited = case(OTHERS[2], (40, 48), axis)
    scales = own.scales.copy()
    scales[::7] = 0
    target = edited.target + 0.001 * rng.standard_normal(own.shape).astype(np.float32)
    importance = np.exp(rng.standard_normal(48)).astype(np.float32)
    same(replace(own, scales=scales), replace(edited, exact=target, importance=importance))


@pytest.mark.usefixtures("short_pieces")
def test_more_bits_than_the_source_has():
    _, edited = case(AFFINE[0], (64, 64), 0)
    same(codec_of(AFFINE[-1]).fresh(edited.target), edited)


def test_other_types_are_not_mlxs():
    levels = np.array([-7, -3, -1, 0, 2, 5, 9], np.float32)
    zeros = np.zeros((32, 32), np.uint8)
    with pytest.raises(ValueError, match="7 levels"):
        Levels.of(Grid(zeros, levels, np.ones((32, 1), np.float32), None, 32))


@pytest.mark.parametrize("mode", OTHERS[:2], ids=str)
def test_every_level_and_every_edge_between_two(mode):
    grid = codec_of(mode).fresh(np.zeros((1, 32), np.float32))
    levels, edges = grid.levels, (grid.levels[1:] + grid.levels[:-1]) / 2
    above = np.nextafter(edges, np.float32(np.inf))
    x = mx.array(np.concatenate([levels, edges, above, [-1e9, 1e9]]).astype(np.float32))
    code = np.arange(len(levels))
    wanted = np.concatenate([code, code[:-1], code[1:], [0, code[-1]]])
    found = Levels.of(grid)
    assert found.codes(x).tolist() == wanted.tolist()
    assert found.nearest(x).tolist() == levels[wanted].tolist()


# --- what decides ------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_pieces")
def test_a_gpu_is_used_after_a_trial_and_while_the_edit_survives(monkeypatch):
    own, edited = case(AFFINE[3], (96, 128), 0)
    wanted = rounding.preserve(own, edited).codes
    asked, calls = [], []

    def chosen(grid, edited):
        calls.append(1)
        return made(grid, edited)

    made = rounding_arrays.chosen
    monkeypatch.setattr(rounding_arrays, "chosen", chosen)
    monkeypatch.setattr(rounding_arrays, "_verdicts", {})
    monkeypatch.setattr(rounding_arrays, "pays", lambda *_: asked.append(1) or True)

    def codes():
        return rounding_arrays.on(own, edited).codes

    np.testing.assert_array_equal(codes(), wanted)
    assert (asked, calls) == ([], [])  # MLX computes on the CPU here
    monkeypatch.setattr(rounding_arrays, "on_gpu", lambda: True)
    np.testing.assert_array_equal(codes(), wanted)
    assert (asked, calls) == ([1], [])
    np.testing.assert_array_equal(codes(), wanted)
    assert (asked, calls) == ([1], [1])
    made = lambda grid, edited: grid  # noqa: E731 - nothing of the edit survives
    np.testing.assert_array_equal(codes(), wanted)
    assert (asked, calls) == ([1], [1, 1])


@pytest.mark.usefixtures("short_pieces")
def test_a_trial_needs_equal_codes_and_less_time(monkeypatch):
    own, edited = case(AFFINE[3], (96, 128), 0)
    found = rounding.preserve(own, edited)
    # Of the kernels, then of MLX without compiling and with it.
    for seconds, verdict in ([2, 7, 1], True), ([2, 7, 3], False), ([2, 9], False):
        times = iter(seconds)
        monkeypatch.setattr(rounding_arrays, "_seconds", lambda _, times=times: next(times))
        assert rounding_arrays.pays(own, edited, found) is verdict
        assert not list(times)
    other = found.codes.copy()
    other[0, 8] ^= 1  # the first line of the second piece
    monkeypatch.setattr(rounding_arrays, "_seconds", lambda _: 1.0)
    assert not rounding_arrays.pays(own, edited, found.with_codes(other))


def test_a_folder_has_the_same_bytes(tmp_path, monkeypatch):
    # Few columns, as each takes MLX's CPU some milliseconds.
    sizes = {"hidden_size": 256, "intermediate_size": 64, "head_dim": 16}
    source = tiny.write_model(tmp_path / "float", "llama", dtype="bfloat16", **sizes)
    source = quantize(source, tmp_path / "source", bits=4, group_size=64)
    direction = tmp_path / "direction.npy"
    np.save(direction, np.random.default_rng(3).normal(size=256).astype(np.float32))
    rounded = []

    def chosen(grid, edited):
        rounded.append(grid.shape)
        return made(grid, edited)

    made = rounding_arrays.chosen
    monkeypatch.setattr(rounding_arrays, "chosen", chosen)
    monkeypatch.setattr(rounding_arrays, "pays", lambda *_: True)
    monkeypatch.setattr(rounding_arrays, "_verdicts", {})
    options = ApplyOptions.of(layers=frozenset({0}))
    leaks = []
    for name in ("kernels", "arrays"):
        monkeypatch.setattr(rounding_arrays, "on_gpu", lambda name=name: name == "arrays")
        record = measure_apply.apply(direction, str(source), [tmp_path / name], options)
        leaks.append(record["leak"]["total"])
    assert rounded == [(256, 64)]  # the first columns, and rows, are rounded by the kernels
    assert leaks[0] == leaks[1] < 1e-3
    with TensorFiles(tmp_path / "kernels") as one, TensorFiles(tmp_path / "arrays") as other:
        for tensor in one.names:
            assert bytes(one.bytes(tensor)) == bytes(other.bytes(tensor))
