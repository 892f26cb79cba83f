"""The names that `abl_mlx` exports, their examples, and what mistakes in a program raise."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import abl_mlx
from tests.support.places import ROOT

EXPORTED = [
    "DirectionFile", "Edit", "UserError", "ablation", "apply", "audit", "choose", "evaluate",
    "load", "load_prompts", "measure",
]  # fmt: skip


def test_what_is_exported_is_there() -> None:
    assert abl_mlx.__all__ == EXPORTED
    for name in EXPORTED:
        assert getattr(abl_mlx, name).__name__ == name
    assert set(EXPORTED) <= set(dir(abl_mlx))
    with pytest.raises(AttributeError, match="no attribute 'loads'"):
        abl_mlx.loads  # noqa: B018


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, abl_mlx; heavy = {'mlx', 'numpy', 'numba', 'transformers', 'click', 'convert'}"
        "; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_examples_in_docstrings_are_true() -> None:
    from abl_mlx import api

    failed, tried = doctest.testmod(api)
    assert tried >= 8
    assert failed == 0


def test_packages_say_that_they_are_typed() -> None:
    assert all((ROOT / package / "py.typed").is_file() for package in ("abl_mlx", "convert"))


def test_a_mistake_in_a_program_is_no_user_error() -> None:
    assert not issubclass(abl_mlx.UserError, TypeError | ValueError)
    with pytest.raises(TypeError, match="has no colour"):
        abl_mlx.evaluate("demo", colour="red")
    with pytest.raises(TypeError, match="at least one output"):
        abl_mlx.apply("direction.safetensors", "demo")
    model = abl_mlx.load("demo")
    with pytest.raises(ValueError, match="no method 'means'"):
        abl_mlx.measure(model, abl_mlx.load_prompts(model=model), method="means")
    with pytest.raises(abl_mlx.UserError, match="there-is-not"):
        abl_mlx.load("./there-is-not")


def example(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments], capture_output=True, text=True,
        cwd=ROOT, env=None,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_steering_by_degrees_takes_refusals_away_and_adds_them() -> None:
    told = example("steering.py")
    by_strength = told.split("\n\n")
    refused = [part.count("sorry") + part.count("can't help") for part in by_strength]
    none, _, whole, added = refused[-4:]
    assert none >= 4
    assert whole == 0
    assert added >= 4


def test_the_sets_lie_far_apart_in_the_middle_of_the_demo(tmp_path: Path) -> None:
    picture = tmp_path / "layers.svg"
    told = example("plot_directions.py", "demo", str(picture)).splitlines()
    last = [float(line.split()[-1]) for line in told[1:5]]
    assert max(last) == max(last[1:])
    assert max(last) > 3 * last[0]
    assert told[-1] == f"drawn: {picture}"
    assert picture.read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_an_edited_copy_is_told_from_its_model() -> None:
    told = example("audit_models.py").splitlines()
    assert told[-2:] == ["demo: not edited", "edited: edited"]
