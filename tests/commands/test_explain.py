"""`measure --explain`: what the demo's direction is made of, against NumPy on captured states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx import api
from abl_mlx.cli.main import cli
from abl_mlx.commands import explain
from abl_mlx.directions import direction_file
from abl_mlx.models import capture
from tests.support.command import abl_mlx, fails


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The demo's direction with what it is made of, and the record."""
    folder = tmp_path_factory.mktemp("explained")
    np.save(folder / "other.npy", np.eye(256, dtype=np.float32)[5])
    np.save(folder / "plane.npy", np.eye(256, dtype=np.float32)[5:8] * 3)
    flags = ["--explain"]
    for name in ("other.npy", "plane.npy"):
        flags += ["--explain-with", folder / name]
    path = folder / "d.safetensors"
    record = abl_mlx("measure", "demo", "-o", path, *flags, "--plot", folder / "plot.svg")
    assert "Cosine with the direction after layer" in (folder / "plot.svg").read_text()
    return path, record


def states(position: int, layer: int, part: str) -> tuple[np.ndarray, list[str]]:
    model = api.load("demo")
    asked = getattr(api.load_prompts(model=model), part).train.prompts
    found = capture.full(model.chat, [model.encode(one) for one in asked], [position])
    return np.array(found[:, layer, 0], np.float64), [one.category for one in asked]


def test_figures_are_those_of_the_states(measured: tuple[Path, dict]) -> None:
    path, record = measured
    found = record["explained"]
    layer, position = found["layer"], found["position"]
    assert (layer, position) == (record["direction"]["layer"], record["direction"]["position"])
    (bad, kinds), (good, topics) = (
        states(position, layer, part) for part in ("harmful", "harmless")
    )
    r = np.array(direction_file.read(path).selected[0], np.float64)
    cosines = {(one["kind"], one["name"]): one["cosine"] for one in found["cosines"]}
    median = np.median(bad, axis=0) - np.median(good, axis=0)
    wanted = r @ median / np.linalg.norm(median)
    assert cosines["method", "median-means"] == pytest.approx(wanted, abs=1e-4)
    assert cosines["method", "difference-of-means"] == pytest.approx(1, abs=1e-4)
    assert cosines["file", "other.npy"] == pytest.approx(r[5], abs=1e-6)
    assert cosines["file", "plane.npy"] == pytest.approx(np.linalg.norm(r[5:8]), abs=1e-6)
    assert "rome" not in {name for _, name in cosines}
    assert {name for kind, name in cosines if kind == "contrast"} == set(explain.pairs())
    assert found["chance"] == 1 / 16
    # By category, and the matched categories, which the demo's sets share.
    center = good.mean(axis=0)
    for one in found["cone"]["categories"]:
        mine = bad[np.array(kinds) == one["category"]]
        difference = mine.mean(axis=0) - center
        assert one["n"] == len(mine)
        assert one["length"] == pytest.approx(np.linalg.norm(difference), rel=1e-4)
        share = r @ difference / np.linalg.norm(difference)
        assert one["cosine"] == pytest.approx(share, abs=1e-4)
    assert len(found["cone"]["categories"]) == 5
    assert found["cone"]["smallest"] > 0.9
    assert found["cone"]["common"] > 0.95
    means = np.stack([good[np.array(topics) == name].mean(axis=0) for name in sorted(set(topics))])
    basis = np.linalg.svd(means - means.mean(axis=0))[2][:4]
    assert found["topics"]["share"] == pytest.approx(float(((basis @ r) ** 2).sum()), abs=1e-4)
    assert found["topics"]["dimensions"] == 4
    assert 0 < found["topics"]["chance"] < 1
    assert found["matched"]["categories"] == 5
    assert found["matched"]["cosine"] > 0.98
    # Across layers.
    leads = np.array(direction_file.read(path).candidates.leads, np.float64)[:, -1]
    assert np.allclose(np.array(found["layers"]), leads @ leads.T, atol=1e-5)


def test_it_is_a_table_and_stays_in_the_direction_file(
    measured: tuple[Path, dict], tmp_path: Path
) -> None:
    path, record = measured
    kept = direction_file.read(path).metadata["explained"]
    assert kept["cosines"] == record["explained"]["cosines"]
    asked = ["measure", "demo", "-o", str(tmp_path / "d.safetensors"), "--explain", "--limit", "16",
             "--layer", "2"]  # fmt: skip
    said = CliRunner().invoke(cli, asked).stdout
    for words in (
        "what it is made of, after layer",
        "+1.00  method difference-of-means",
        "contrast politeness",
        "by category, 5 directions",
        "of it lies among the topics of harmless prompts (4 dimensions",
        "cosine with the direction between prompts of the same 5 categories",
        "cosines of the directions after each layer",
    ):
        assert words in said


def test_neutral_pairs_differ_in_what_they_should() -> None:
    pairs = explain.pairs()
    assert {name: len(both) for name, both in pairs.items()} == {
        "length": 16, "language": 16, "politeness": 16,
    }  # fmt: skip
    assert all(len(high.split()) > 3 * len(low.split()) for high, low in pairs["length"])
    assert {low for _, low in pairs["language"]} == {low for _, low in pairs["politeness"]}
    polite = ("please", "thank", "grateful")
    for high, low in pairs["politeness"]:
        assert any(word in high.lower() for word in polite)
        assert not any(word in low.lower() for word in polite)


def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones(12, np.float32))
    out = ["measure", "demo", "-o", str(tmp_path / "d.safetensors")]
    for more, said in (
        (["--explain-with", str(tmp_path / "v.npy")], "add --explain"),
        (["--explain", "--thinking", "on"], "--explain and --thinking do not go together"),
    ):
        result = CliRunner().invoke(cli, [*out, *more])
        assert result.exit_code == 2
        assert said in result.stderr
    said = fails(*out, "--explain", "--explain-with", tmp_path / "v.npy")
    assert "holds directions of 12 dimensions, but the residual stream" in said
