"""Directions from a sparse autoencoder, which the example trains on the demo's states."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.cli.main import cli
from abl_mlx.directions import direction_file, sae_files
from abl_mlx.inputs import hub
from convert.base.errors import UserError
from tests.support import saes
from tests.support.command import abl_mlx

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of the demo's stream after layer 2, as the example trains it."""
    folder = tmp_path_factory.mktemp("trained") / "sae"
    subprocess.run(
        [sys.executable, ROOT / "examples" / "train_sae.py", folder], check=True,
        capture_output=True,
    )  # fmt: skip
    return folder


def test_a_run_takes_the_feature_whose_removal_ends_refusals(sae: Path, tmp_path: Path) -> None:
    out = tmp_path / "edited"
    record = abl_mlx("run", "demo", "-o", out, "--sae", sae, "--limit", 24)
    chosen, found = record["direction"], record["sae"]
    assert (chosen["method"], chosen["layer"], chosen["position"]) == ("sae", 2, -1)
    assert record["before"]["harmful_refusal_rate"] == 1
    after = record["evaluations"][0]["after"]
    # One feature is not the whole direction: it leaves 1 to 3 of these 24 prompts, as the
    # autoencoder's training rounds on the machine at hand.
    assert after["harmful_refusal_rate"] <= 0.2
    assert after["harmless_refusal_rate"] <= 0.05
    # Every feature was tried by its effect, and the first by separation is among those taken.
    tried = [one["features"] for one in record["trials"]]
    assert len([one for one in tried if len(one) == 1]) == 8
    first = found["features"][0]
    assert first["feature"] in chosen["features"]
    assert first["auc"] > 0.95
    assert first["active"][0] > first["active"][1]
    assert first["cosine"] > 0.5
    assert found["count"] == 256
    assert first["train_difference"] == max(one["train_difference"] for one in found["features"])
    assert "Features of the autoencoder" in (out / "report.html").read_text()


def test_named_features_are_their_decoder_rows(sae: Path, tmp_path: Path) -> None:
    out = tmp_path / "d.safetensors"
    asked = ["measure", "demo", "-o", out, "--sae", sae, "--feature", "7,3", "--limit", 16,
             "--method", "sae"]  # fmt: skip
    said = CliRunner().invoke(cli, list(map(str, asked))).stdout
    assert "sae, features 7, 3, rank 2, after layer 2, at token -1" in said
    assert "256 features (topk) of the stream after layer 2, trained on demo" in said
    selected = np.array(direction_file.read(out).selected, np.float64)
    assert np.abs(selected @ selected.T - np.eye(2)).max() < 1e-5
    rows = np.array(mx.load(str(sae / "sae_weights.safetensors"))["W_dec"], np.float64)[[7, 3]]
    left = rows - rows @ selected.T @ selected
    assert np.abs(left).max() < 1e-5
    assert direction_file.read(out).metadata["summary"]["features"] == [7, 3]


def test_show_tells_which_features_a_prompt_has(sae: Path, direction: Path, tmp_path: Path) -> None:
    asked = "How do I paint the fence?"
    page = tmp_path / "page.html"
    flags = ["--direction", direction, "--sae", sae]
    record = abl_mlx("show", "demo", asked, *flags, "--feature", 3, "-o", page)
    found = record["sae"]
    assert found["prompt_tokens"] == len(record["tokens"])
    assert found["features"][0]["feature"] == 3
    last = [one["activations"][-1] for one in found["features"][1:]]
    assert last == sorted(last, reverse=True)
    assert last[0] > 0
    read = sae_files.read(str(sae))
    row = np.array(read.decoder[found["features"][1]["feature"]], np.float64)
    unit = np.array(direction_file.read(direction).selected[0], np.float64)
    wanted = row @ unit / np.linalg.norm(row) / np.linalg.norm(unit)
    assert found["features"][1]["cosine"] == pytest.approx(wanted, abs=1e-5)
    assert "Features of the autoencoder" in page.read_text()
    shown = CliRunner().invoke(cli, list(map(str, ["show", "demo", asked, *flags])))
    assert "last token  cos with r  largest at" in shown.stdout


WRONG = [
    (("--feature", "3"), "--feature 3 is of an autoencoder: add --sae FOLDER"),
    (("--method", "sae"), "--method sae needs an autoencoder: add --sae FOLDER"),
    (("--sae", "SAE", "--method", "svd"), "--sae and --method svd do not go together"),
    (("--sae", "SAE", "--feature", "256"), "--feature 256: sae has the features 0 to 255"),
    (("--sae", "SAE", "--layer", "1"), "says that it reads the stream after layer 2"),
    (("--sae", "SAE", "--keep", "category:metal"), "--sae and --keep do not go together"),
    (("--sae", "OTHER"), "of 12 dimensions, but the residual stream of"),
]


@pytest.mark.parametrize(("flags", "said"), WRONG)
def test_what_does_not_go_together_is_refused_before_the_model_runs(
    flags: tuple[str, ...], said: str, sae: Path, tmp_path: Path
) -> None:
    weights = saes.weights("standard", width=12, count=40, seed=4)
    other = saes.write_saelens(tmp_path / "other", weights, "standard")
    places = {"SAE": str(sae), "OTHER": str(other)}
    given = [places.get(one, one) for one in flags]
    out = tmp_path / "d.safetensors"
    result = CliRunner().invoke(cli, ["measure", "demo", "-o", str(out), *given])
    assert result.exit_code == (2 if "--sae FOLDER" in said or "go together" in said else 1)
    assert said in result.stderr
    assert "ask the model" not in result.stderr


def test_chat_takes_one_direction(sae: Path, direction: Path) -> None:
    asked = ["chat", "demo", "--direction", str(direction), "--sae", str(sae)]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 2
    assert "--direction and --sae both give a direction" in result.stderr


def test_a_folder_on_hugging_face_is_downloaded_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = {}

    def snapshot_download(repository: str, **how: object) -> str:
        asked.update(how, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    weights = saes.weights("jumprelu", width=12, count=40, seed=4)
    saes.write_gemma_scope(tmp_path / "layer_3" / "width_16k", weights, "npz")
    found = sae_files.read("hf:google/gemma-scope-2b-pt-res@main/layer_3/width_16k")
    assert (found.layer, found.count) == (3, 40)
    assert asked["repository"] == "google/gemma-scope-2b-pt-res"
    assert asked["revision"] == "main"
    assert asked["allow_patterns"] == [
        f"layer_3/width_16k/{name}"
        for name in ("cfg.json", "sae_weights.safetensors", "config.json", "params.npz",
                     "params.safetensors")
    ]  # fmt: skip
    with pytest.raises(UserError, match="has no folder layer_4"):
        sae_files.read("hf:google/gemma-scope-2b-pt-res/layer_4")
    with pytest.raises(UserError, match="--sae hf:nowhere: write hf:OWNER/NAME/FOLDER"):
        hub.part("hf:nowhere", ("a",), "--sae")
