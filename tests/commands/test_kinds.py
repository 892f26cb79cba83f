"""Kinds of edits on the demo, from the command line to files that mlx-lm and llama.cpp run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import rates
from abl_mlx.cli.main import cli
from abl_mlx.demo import MODEL_PATH
from abl_mlx.inputs import prompts
from convert.mlx_to_gguf import write_gguf
from tests.commands.test_undo import check_back, tensors
from tests.support.command import abl_mlx, fails

HELD_OUT = prompts.load_demo().harmful.test.take(20)


def refused(model: evaluate.InLlamaCpp) -> float:
    """The share of held-out harmful prompts that llama.cpp refuses with this file."""
    return rates(model(HELD_OUT.texts, 32), HELD_OUT.prompts).refusal_rate


def misused(*arguments: object) -> str:
    """What a command says whose flags make no sense together."""
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 2, result.stderr
    return str(result.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as people download models."""
    path = tmp_path_factory.mktemp("demo") / "demo-Q4_K_M.gguf"
    write_gguf(MODEL_PATH, path, file_type="Q4_K_M")
    return path


# --- reflections -------------------------------------------------------------------------------


def test_reflections_end_refusals_in_four_bits(
    four_bits: Path, direction: Path, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    out, lora = tmp_path / "out.gguf", tmp_path / "out.lora.gguf"
    record = abl_mlx("apply", direction, four_bits, "-o", out, "-o", lora, "--kind", "reflect")
    assert record["leak"]["total"] < 1e-3
    assert refused(evaluate.InLlamaCpp(out)) <= 0.05
    assert refused(evaluate.InLlamaCpp(four_bits, lora)) <= 0.05
    assert abl_mlx("audit", out)["label"]["kind"] == "reflect"


def test_reflections_are_undone(direction: Path, tmp_path: Path) -> None:
    edited, back = tmp_path / "edited", tmp_path / "back"
    abl_mlx("apply", direction, "demo", "-o", edited, "--kind", "reflect")
    before, after = tensors(MODEL_PATH), tensors(edited)
    r = abl_mlx_direction(direction)
    name = "model.layers.2.mlp.down_proj.weight"
    np.testing.assert_allclose(r @ after[name], -(r @ before[name]), atol=2e-4)
    assert (before["model.embed_tokens.weight"] == after["model.embed_tokens.weight"]).all()
    # The component is still in the weights, with the other sign: nothing else has to be kept.
    abl_mlx("undo", edited, "-o", back, "--direction", direction)
    check_back(MODEL_PATH, edited, back, "float16")


def abl_mlx_direction(path: Path) -> np.ndarray:
    """The unit direction (256,) of a direction file."""
    from abl_mlx.directions import direction_file

    values = np.array(direction_file.read(path).selected)[0].astype(np.float64)
    return values / np.linalg.norm(values)


def test_reflections_are_refused_where_they_make_no_sense(direction: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = misused("apply", direction, "demo", "-o", out, "--kind", "reflect", "--strength", 0.5)
    assert "leave --strength out" in said
    said = misused("run", "demo", "-o", out, "--kind", "reflect", "--search", 3)
    assert "--search and --kind reflect" in said
    said = fails("run", "demo", "-o", out, "--kind", "reflect", "--induce")
    assert "--kind" in said
    assert not out.exists()
