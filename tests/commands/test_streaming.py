"""`--stream`: a record with the same figures, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType

from abl_mlx.choices import MeasureOptions, RunOptions
from abl_mlx.cli.main import cli
from abl_mlx.commands import conversion, measure_apply
from abl_mlx.commands import run as running
from abl_mlx.models import memory
from abl_mlx.models.memory import Memory
from tests.support import tiny_gguf
from tests.support.gguf_recipes import RECIPES
from tests.support.real_models import QWEN, real_model


def different(one: Any, other: Any, place: str = "") -> list[str]:
    """Places of a record where two differ by more than float32 rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted(one.keys() | other.keys())
        return [p for n in names for p in different(one.get(n), other.get(n), f"{place}.{n}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [p for n, (a, b) in pairs for p in different(a, b, f"{place}[{n}]")]
    if isinstance(one, float) and isinstance(other, float):
        return [] if math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5) else [place]
    return [] if one == other else [place]


def record(source: str, out: Path, **options: Any) -> dict[str, Any]:
    """The record of a measurement, without what may differ."""
    made = measure_apply.measure(source, out, MeasureOptions.of(**options)).json
    return {k: v for k, v in made.items() if k not in ("seconds", "outputs", "first_look")}


def unlike_streamed(source: str, folder: Path, **options: Any) -> list[str]:
    """Places where the records of a model in memory and of one that is streamed differ."""
    whole = record(source, folder / "a.safetensors", **options)
    streamed = record(source, folder / "b.safetensors", stream=True, **options)
    if "uniform_kl" in whole["direction"]:
        whole, streamed = without_steps(whole), without_steps(streamed)
    return different(whole, streamed)


@pytest.mark.parametrize("source", ["demo", "gguf"])
def test_the_record_has_the_same_figures(source: str, tmp_path: Path, request) -> None:
    text = "demo" if source == "demo" else str(request.getfixturevalue("floats"))
    assert unlike_streamed(text, tmp_path, limit=6) == []


def test_a_condition_is_the_same(tmp_path: Path) -> None:
    assert unlike_streamed("demo", tmp_path, limit=24, condition="category:metal") == []


@pytest.mark.parametrize("kind", ["qwen3_moe", "lfm2"])
def test_experts_and_hybrids_have_the_same_figures(kind: str, tmp_path: Path, tiny_folder) -> None:
    """A random model refuses nothing, so a layer is named; separation is told of every layer."""
    if kind == "lfm2":
        source = tiny_gguf.write(tmp_path / "a.gguf", RECIPES[kind], GGMLQuantizationType.Q8_0)
    else:
        source = tiny_folder(kind)
    options = {"limit": 6, "layer": 1, "position": -1, "template": "chatml"}
    assert unlike_streamed(str(source), tmp_path, **options) == []


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_a_real_model_has_the_same_figures(form: str, tmp_path: Path) -> None:
    source: Path = real_model(QWEN)
    if form == "folder":
        conversion.convert(str(source), tmp_path / "mlx")
        source = tmp_path / "mlx"
    assert unlike_streamed(str(source), tmp_path, limit=16) == []


# Facts of a direction that steps by gradients change, which a streamed model does not make.
BY_STEPS = {"backward_tokens", "forward_tokens", "chosen_by", "recipe", "refused", "refusal_score"}


def without_steps(made: dict[str, Any]) -> dict[str, Any]:
    """A record as it would be without strengths of each layer."""
    kept = {name: value for name, value in made["direction"].items() if name not in BY_STEPS}
    kept["validation_kl"] = kept.pop("uniform_kl", kept["validation_kl"])
    return {**made, "direction": kept}


def test_a_choice_costs_a_few_sweeps(tmp_path: Path, capsys) -> None:
    """Fourteen candidates race; without their passes side by side it would be 200 sweeps."""
    record("demo", tmp_path / "d.safetensors", stream=True, limit=6)
    read = capsys.readouterr().err.partition("streamed: ")[2].split()
    assert read[1] == "MB"
    assert float(read[0]) < 24 * 10.1  # the demo is computed in float32


def test_a_run_has_the_same_figures(tmp_path: Path) -> None:
    found = []
    for stream in (False, True):
        options = RunOptions.of(limit=4, max_tokens=8, stream=stream)
        (tmp_path / str(stream)).mkdir()
        outputs = [tmp_path / str(stream) / name for name in ("a.gguf", "b.adapter")]
        made = running.run("demo", outputs, options).json
        kept = ("before", "after", "kl", "component", "leak", "direction", "scores", "trials")
        found.append({name: made[name] for name in kept if name in made})
        for one in made["evaluations"]:
            found[-1][one["format"]] = {
                name: one[name] for name in ("kl", "component", "leak", "after", "types")
            }
    assert different(*found) == []
    assert found[0]["before"]


def test_a_model_that_does_not_fit_is_streamed_unasked(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(memory, "machine", lambda: Memory(1_000_000, None))
    measure_apply.measure("demo", tmp_path / "d.safetensors", MeasureOptions.of(limit=4, layer=2))
    said = capsys.readouterr().err
    assert "demo is streamed: 5.1 MB are read in each sweep" in said
    assert "GB/s, waited for" in said


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--thinking", "on"], "--thinking on"),
        (["--search", "3"], "--search"),
        (["--method", "rdo"], "--method rdo"),
        (["--rank-parts"], "--rank-parts"),
    ],
)
def test_flags_that_need_the_whole_model_are_refused(words, flag, tmp_path: Path) -> None:
    out = tmp_path / "d.safetensors"
    result = CliRunner().invoke(cli, ["measure", "demo", "-o", str(out), "--stream", *words])
    assert result.exit_code == 1
    assert f"{flag} needs the whole model in memory" in result.output
    assert not out.exists()


def test_inducing_needs_the_whole_model(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    result = CliRunner().invoke(cli, ["run", "demo", "-o", out, "--stream", "--induce"])
    assert result.exit_code == 1
    assert "--induce needs the whole model in memory" in result.output


def test_json_is_one_object(tmp_path: Path) -> None:
    out = str(tmp_path / "d.safetensors")
    words = ["measure", "demo", "-o", out, "--stream", "--json", "--limit", "4", "--layer", "2"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["outputs"] == [out]
