"""Models that mlx-lm has, and this cannot measure or load: one sentence, and no traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.cli.main import cli
from tests.outputs.test_mtp import write
from tests.support import tiny, zoo


def said(*arguments: object) -> str:
    """The one line that a command which fails ends with."""
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)  # told by click, not raised through it
    return str(result.stderr.splitlines()[-1])


def test_several_streams_are_edited_and_not_measured(tmp_path: Path) -> None:
    stacked = (("switch_mlp", "switch_mlp"),)
    folder = write(tmp_path / "model", "deepseek_v41", lambda _: {}, names=stacked)
    out = tmp_path / "r.safetensors"
    message = said("measure", folder, "-o", out, "--limit", "2", "--no-memory-check")
    assert "runs 4 residual streams side by side (layer 0" in message
    assert "`abl-mlx apply DIRECTION MODEL`" in message
    assert not out.exists()
    direction = tmp_path / "r.npy"
    np.save(direction, np.random.default_rng(0).normal(size=32).astype(np.float32))
    done = CliRunner().invoke(
        cli, ["apply", str(direction), str(folder), "-o", str(tmp_path / "edited")]
    )
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("command", ["inspect", "apply"])
def test_olmo_without_its_package(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "olmo"
    folder.mkdir()
    tiny.write_tokenizer(folder, "bpe")
    (folder / "config.json").write_text(json.dumps(zoo.config("olmo")))
    mx.save_safetensors(str(folder / "model.safetensors"), {"x": mx.zeros((1,))})
    monkeypatch.setitem(sys.modules, "hf_olmo", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "mlx_lm.models.olmo", raising=False)
    direction = tmp_path / "r.npy"
    np.save(direction, np.ones(32, np.float32))
    given = [direction, folder, "-o", tmp_path / "out"] if command == "apply" else [folder]
    assert "ends without the package ai2-olmo" in said(command, *given)
    assert not (tmp_path / "out").exists()
