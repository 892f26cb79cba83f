"""Conditions: thresholds against every possible one, vectors against float64, a planted vector."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.directions import conditioning, direction_file
from abl_mlx.directions.conditioning import Sides
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits.condition import Condition, cosines
from convert.base.errors import UserError


def f1_of(inside: np.ndarray, outside: np.ndarray, threshold: float, above: bool) -> float:
    hits = sum((one >= threshold) == above for one in inside)
    false = sum((one >= threshold) == above for one in outside)
    return float(2 * hits / (2 * hits + false + len(inside) - hits))


@pytest.mark.parametrize("seed", range(12))
def test_the_threshold_has_the_largest_f1_of_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    shift = random.normal() * 2
    inside = np.round(random.normal(shift, 1, 9), 1)
    outside = np.round(random.normal(0, 1, 30), 1)
    cut = conditioning.best_cut(Sides(inside, outside))
    every = np.unique(np.concatenate([inside, outside]))
    between = (every[1:] + every[:-1]) / 2
    possible = [f1_of(inside, outside, t, above) for t in between for above in (True, False)]
    assert cut.f1 == pytest.approx(max(possible))
    assert cut.f1 == pytest.approx(f1_of(inside, outside, cut.threshold, cut.above))
    hits = sum((one >= cut.threshold) == cut.above for one in inside)
    taken = hits + sum((one >= cut.threshold) == cut.above for one in outside)
    assert (cut.precision, cut.recall) == pytest.approx((hits / taken, hits / 9))


def test_of_equally_good_thresholds_the_one_in_the_widest_gap_is_taken() -> None:
    cut = conditioning.best_cut(Sides(np.array([5.0, 6.0]), np.array([0.0, 1.0, 2.0])))
    assert (cut.threshold, cut.above, cut.f1) == (3.5, True, 1.0)
    cut = conditioning.best_cut(Sides(np.array([0.0, 1.0]), np.array([3.0, 3.5])))
    assert (cut.threshold, cut.above, cut.f1) == (2.0, False, 1.0)
    with pytest.raises(UserError, match="no condition tells them apart"):
        conditioning.best_cut(Sides(np.ones(3), np.ones(4)))


def test_vectors_agree_with_numpy() -> None:
    random = np.random.default_rng(1)
    inside, outside = random.normal(0.5, 1, (12, 7)), random.normal(size=(30, 7))
    means = inside.mean(axis=0), outside.mean(axis=0)
    assert np.allclose(conditioning.difference(inside, outside), means[0] - means[1])
    rows = np.concatenate([inside, outside]) - (means[0] + means[1]) / 2
    wanted = np.linalg.svd(rows)[2][0]
    found = conditioning.principal(inside, outside)
    assert abs(found @ wanted) == pytest.approx(1.0)
    states = random.normal(size=(5, 7))
    scores = [h @ wanted / np.linalg.norm(h) / np.linalg.norm(wanted) for h in states]
    assert np.allclose(cosines(states, wanted * 3), scores)


def planted(random: np.random.Generator, n: int, shift: np.ndarray) -> np.ndarray:
    """States (n, 3 layers, 2 counts, 16), moved after layer 1 for the second count alone."""
    states = random.normal(size=(n, 3, 2, 16))
    states[:, :, :, 0] += 6.0
    states[:, 1, 1] += shift
    return states.astype(np.float32)


def test_a_planted_condition_is_found() -> None:
    random = np.random.default_rng(4)
    direction = np.zeros(16)
    direction[3] = 8.0
    train, validation = (
        Sides(planted(random, n, direction), planted(random, 4 * n, 0 * direction))
        for n in (15, 10)
    )
    condition, found = conditioning.find(train, validation, [1, 4], "made up")
    assert (found.layer, found.tokens, found.f1) == (1, 4, 1.0)
    assert found.validation == [10, 40]
    assert abs(float(condition.vector[3].item())) > 0.8
    later = Sides(planted(random, 50, direction), planted(random, 50, 0 * direction))
    for states, wanted in ((later.inside, True), (later.outside, False)):
        met = condition.met(cosines(states[:, 1, 1], np.array(condition.vector)))
        assert (met == wanted).mean() > 0.9


def test_a_condition_is_kept_in_the_direction_file(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    direction = np.eye(16)[3] * 5
    train = Sides(planted(random, 9, direction), planted(random, 9, 0 * direction))
    condition, found = conditioning.find(train, train, [1, 4], "made up")
    file = DirectionFile(mx.eye(16)[:1]).conditional(condition, found)
    direction_file.save(tmp_path / "d.safetensors", file)
    read = direction_file.read(tmp_path / "d.safetensors").when
    assert isinstance(read, Condition)
    assert mx.array_equal(read.vector, condition.vector)
    assert (read.layer, read.tokens, read.threshold, read.above) == (
        condition.layer, condition.tokens, condition.threshold, condition.above,
    )  # fmt: skip
    tensors, metadata = mx.load(str(tmp_path / "d.safetensors"), return_metadata=True)
    for vector, said in (
        (mx.ones(15), r"`condition` must be of the shape \(16,\)"),
        (mx.zeros(16), "holds a direction that is zero"),
    ):
        mx.save_safetensors(
            str(tmp_path / "x.safetensors"), {**tensors, "condition": vector}, metadata
        )
        with pytest.raises(UserError, match=said):
            direction_file.read(tmp_path / "x.safetensors")
    wrong = metadata["condition"].replace('"layer": 1', '"layer": "one"')
    mx.save_safetensors(str(tmp_path / "x.safetensors"), tensors, {**metadata, "condition": wrong})
    with pytest.raises(UserError, match=r"cannot be used: .*condition.*layer"):
        direction_file.read(tmp_path / "x.safetensors")
