"""The rule by which the default is chosen among methods, and the table that it is applied to."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from tests.support.places import ROOT
from tools import marked

sys.path.append(str(ROOT / "benchmarks"))

import methods as benchmark

from abl_mlx.directions.methods import METHODS


def rows(method: str, kl32: float, **others: float) -> list[benchmark.Row]:
    """Rows of a method that does the same on every small model."""
    fine = {"refused": 0.0, "broken": 0.02, "capable": 0.95, "kl": 0.001, "forward": 9000}
    return [
        benchmark.Row(model, method, **{**fine, "kl32": kl32, **others})  # type: ignore[arg-type]
        for model in benchmark.MODELS
    ]


def test_the_lowest_kl_of_the_methods_that_work_wins() -> None:
    table = [*rows(benchmark.DEFAULT, 0.002), *rows("som", 0.001), *rows("svd", 0.004)]
    found = benchmark.ruled(table, benchmark.BUDGET)
    assert [name for name, _ in found] == ["som", benchmark.DEFAULT, "svd"]
    assert found[0][1] == pytest.approx(0.001)


@pytest.mark.parametrize(
    "worse",
    [{"refused": 0.04}, {"capable": 0.89}, {"forward": 26_000}, {"backward": 9_000}],
    ids=lambda worse: next(iter(worse)),
)
def test_a_method_that_fails_on_one_model_is_not_taken(worse: dict[str, float]) -> None:
    first, *others = rows("som", 0.001)
    table = [*rows(benchmark.DEFAULT, 0.002), replace(first, **worse), *others]  # type: ignore[arg-type]
    assert [name for name, _ in benchmark.ruled(table, benchmark.BUDGET)] == [benchmark.DEFAULT]
    # Nor is one that was not run on every model.
    table = [*rows(benchmark.DEFAULT, 0.002), *others]
    assert [name for name, _ in benchmark.ruled(table, benchmark.BUDGET)] == [benchmark.DEFAULT]


def test_the_default_is_what_the_rule_takes_from_the_table_of_the_page() -> None:
    text = marked.between(benchmark.PAGE.read_text(encoding="utf-8"), "benchmark")
    cells = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith("| model ")
    ]
    measured = {(model, method) for model, method, *_ in cells}
    names = {method for _, method in measured}
    assert names <= {benchmark.DEFAULT, *METHODS}
    assert {(model, benchmark.DEFAULT) for model in benchmark.MODELS} <= measured
    *_, verdict = text.strip().splitlines()
    assert f"By the rule: {benchmark.DEFAULT} (" in verdict, "another method is to be the default"
