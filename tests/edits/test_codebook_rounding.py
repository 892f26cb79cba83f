"""Edit-preserving rounding of types whose codes are entries of a codebook: IQ1, IQ2 and IQ3."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from abl_mlx.edits import codebook_rounding, rounding
from abl_mlx.outputs import gguf_plan
from convert.base.codebooks import EVEN, CodebookGrid
from convert.gguf import ggml, ggml_types

# Relative error of ggml's own quantizer on Gaussian weights, with an even importance matrix.
ORDINARY = {
    Q.IQ1_S: 0.486, Q.IQ1_M: 0.455, Q.IQ2_XXS: 0.344, Q.IQ2_XS: 0.300, Q.IQ2_S: 0.249,
    Q.IQ3_XXS: 0.182, Q.IQ3_S: 0.137,
}  # fmt: skip
# What the edit adds to it at most at d = 2048: at k = 1 and at k = 4.
ADDED = {
    Q.IQ1_S: (0.14, 0.23), Q.IQ1_M: (0.13, 0.22), Q.IQ2_XXS: (0.11, 0.18), Q.IQ2_XS: (0.10, 0.18),
    Q.IQ2_S: (0.10, 0.17), Q.IQ3_XXS: (0.08, 0.13), Q.IQ3_S: (0.08, 0.12),
}  # fmt: skip

every_type = pytest.mark.parametrize("kind", sorted(ORDINARY), ids=lambda kind: kind.name)


class Case:
    """A quantized tensor in which the directions are k times as strong as a random one."""

    def __init__(
        self, kind: Q, d: int, lines: int, k: int = 1, axis: int = 0, directions: int = 1
    ) -> None:
        rng = np.random.default_rng(0)
        self.kind, self.axis = kind, axis
        self.u = np.linalg.qr(rng.normal(size=(d, directions)))[0].T
        weights = rng.normal(size=(d, lines))
        weights += self.u.T @ ((k - 1) * rng.normal(size=(directions, lines)))
        weights = np.ascontiguousarray(weights if axis == 0 else weights.T, dtype=np.float32)
        self.own: CodebookGrid = ggml_types.fresh(weights, kind)
        source = self.own.values().astype(np.float64)
        self.taken = self.along(source)
        removed = self.u.T @ self.taken if axis == 0 else self.taken @ self.u
        self.target = (source - removed).astype(np.float32)

    def along(self, values: np.ndarray) -> np.ndarray:
        return self.u @ values if self.axis == 0 else values @ self.u.T

    def edited(self, importance: np.ndarray | None = None) -> rounding.Edited:
        removed = float(np.sqrt(np.mean(np.sum(self.taken**2, axis=self.axis))))
        taken = self.taken.T if self.axis == 0 else self.taken
        return rounding.Edited(
            self.target, self.u.astype(np.float32), self.axis, removed,
            np.ascontiguousarray(taken, dtype=np.float32), importance,
        )  # fmt: skip

    def missing(self, grid: CodebookGrid) -> np.ndarray:
        return grid.values().astype(np.float64) - self.target

    def leak(self, grid: CodebookGrid) -> float:
        missing = np.linalg.norm(self.along(self.missing(grid)))
        return float(missing / np.linalg.norm(self.taken))

    def error(self, grid: CodebookGrid) -> float:
        return float(np.linalg.norm(self.missing(grid)) / np.linalg.norm(self.target))


@every_type
@pytest.mark.parametrize(
    ("k", "axis"),
    [(1, 0), (4, 1), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((4, 0), (1, 1)))],
)
def test_the_edit_survives_in_the_type(kind: Q, k: int, axis: int) -> None:
    case = Case(kind, 2048, 256, k, axis)
    grid = case.edited().on(case.own)
    assert case.leak(grid) <= 0.001
    assert case.error(grid) <= ADDED[kind][k > 1] < ORDINARY[kind]
    # What was written is what gguf-py and ggml read, and every scale is the old one.
    codec = ggml_types.quantized_codec(kind)
    raw = codec.encode(grid)
    np.testing.assert_array_equal(gguf.quants.dequantize(raw, kind), grid.values())
    np.testing.assert_array_equal(ggml.dequantize(raw, kind), grid.values())
    again = codec.decode(raw, grid.shape[1])
    np.testing.assert_array_equal(again.scales, case.own.scales)


@every_type
@pytest.mark.parametrize("axis", [0, 1])
def test_narrow_models_and_new_scales(kind: Q, axis: int) -> None:
    case = Case(kind, 256, 256, 4, axis)
    for source in ("own", "fresh"):
        grid = rounding.round_onto(case.own, case.edited(), gguf_plan.encoders(kind), source)
        assert case.leak(grid) <= 0.002
        assert case.error(grid) <= 1.1 * ORDINARY[kind]


def test_plain_rounding_loses_what_ours_keeps() -> None:
    """The tests above can fail: ggml's encoding of the edited weights undoes most of the edit."""
    for kind in (Q.IQ2_XXS, Q.IQ3_S):
        case = Case(kind, 2048, 256, 1)
        assert case.leak(ggml_types.fresh(case.target, kind)) > 0.5
        assert case.leak(case.own) > 0.99


@pytest.mark.parametrize("kind", [Q.IQ1_S, Q.IQ2_XXS, Q.IQ3_S], ids=lambda kind: kind.name)
def test_several_directions_survive(kind: Q) -> None:
    case = Case(kind, 1024, 256, 4, 0, directions=2)
    assert case.leak(case.edited().on(case.own)) <= 0.01


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [Q.IQ2_XS, Q.IQ3_S], ids=lambda kind: kind.name)
def test_the_component_is_removed_and_not_turned(kind: Q, axis: int) -> None:
    case = Case(kind, 256, 1024, 1, axis)
    missing = case.missing(case.edited().on(case.own))
    errors, taken = (missing, case.taken.T) if axis == 0 else (missing.T, case.taken)
    assert np.linalg.norm(errors @ taken) / np.sum(taken**2) < 0.1


def test_most_groups_keep_their_bytes() -> None:
    case = Case(Q.IQ2_XS, 2048, 256, 1)
    grid = case.edited().on(case.own)
    assert 0 < grid.changed(case.own) < 0.2 * grid.values().size
    before, after = (ggml_types.quantized_codec(Q.IQ2_XS).encode(one) for one in (case.own, grid))
    same = (grid.codes == case.own.codes) & (grid.signs == case.own.signs)
    words = slice(2, 66)
    blocks = [raw.reshape(-1, 74)[:, words].copy().view("<u2") for raw in (before, after)]
    np.testing.assert_array_equal(same.reshape(blocks[0].shape), blocks[0] == blocks[1])
    rest = [np.delete(raw.reshape(-1, 74), np.r_[words], axis=1) for raw in (before, after)]
    np.testing.assert_array_equal(*rest)


@pytest.mark.parametrize("axis", [0, 1])
def test_important_columns_get_less_error(axis: int) -> None:
    case = Case(Q.IQ2_S, 512, 512, 1, axis)
    importance = np.exp(np.random.default_rng(1).standard_normal(512)).astype(np.float32)
    errors = []
    for weights in (None, importance):
        grid = case.edited(weights).on(case.own)
        assert case.leak(grid) <= 0.001
        errors.append(float((case.missing(grid) ** 2 * importance).sum()))
    assert errors[1] < (1.0 if axis == 0 else 0.95) * errors[0]


@every_type
def test_neighbours_are_the_nearest_with_signs_that_the_type_has(kind: Q) -> None:
    book = ggml_types.quantized_codec(kind).book
    near = codebook_rounding.neighbours(book)
    bits = np.arange(book.group)
    flipped = 1 - 2.0 * ((near.signs[..., None] >> bits) & 1)
    changes = flipped * book.entries[near.codes] - book.entries[:, None]
    np.testing.assert_array_equal(near.changes, changes.transpose(0, 2, 1))
    assert (near.norms[:, 0] == 0).all()
    assert (np.diff(near.norms, axis=1) >= 0).all()
    assert (near.norms[:, 1] > 0).all()
    if book.signs == EVEN:
        assert not (((near.signs[..., None] >> bits) & 1).sum(axis=-1) & 1).any()
    entry = len(book.entries) // 3
    plain = np.sort(np.square(book.entries - book.entries[entry]).sum(axis=1))
    assert (near.norms[entry] <= plain[: near.norms.shape[1]]).all()
