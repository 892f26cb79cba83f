"""`abl-mlx reproduce`: the same bytes from the record alone, and what differs if they are not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.choices import ApplyOptions
from abl_mlx.cli.main import cli
from abl_mlx.commands import conversion, measure_apply, reproduce
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import direction_file
from abl_mlx.directions.direction_file import DirectionFile
from convert.base.errors import UserError
from tests.support import hub_server
from tests.support.hub_environment import taken_for_the_hub
from tests.support.places import ROOT

D = 256


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, a Q4_K_M GGUF and one that was quantized anew, edited with flags of all kinds."""
    work = tmp_path_factory.mktemp("reproduce")
    directions = mx.array(np.random.default_rng(0).standard_normal((2, D)).astype(np.float32))
    direction = DirectionFile(directions)
    conversion.convert("demo", work / "base.gguf", quantize="Q4_K_M")
    base = str(work / "base.gguf")
    for name, source, options in (
        ("folder", "demo", ApplyOptions.of(norm="columns", layers=frozenset([1, 3]))),
        ("own.gguf", base, ApplyOptions.of(strength=0.7, embedding=False, max_leak=1)),
        ("anew.gguf", "demo", ApplyOptions.of(quantize="Q3_K_M")),
    ):
        measure_apply.apply(direction, source, [work / name], options)
    return work


@pytest.mark.parametrize("name", ["folder", "own.gguf", "anew.gguf"])
def test_the_record_alone_gives_the_same_bytes(edits: Path, tmp_path: Path, name: str) -> None:
    record = edits / "folder" / "abl.json"
    if name != "folder":
        record = edits / f"{Path(name).stem}.abl.json"
    alone = shutil.copy(record, tmp_path / record.name)
    out = tmp_path / "out" / name
    found = reproduce.reproduce(str(alone), out)
    assert (found["verdict"], found["differing"], found["reasons"]) == ("identical", [], [])
    files = ["model.safetensors"] if name == "folder" else [""]
    for file in files:
        assert (out / file).read_bytes() == (edits / name / file).read_bytes()


SAME = {
    "two threads": {"NUMBA_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
    "one thread of the plainest CPU": {
        **{"NUMBA_NUM_THREADS": "1", "NUMBA_CPU_NAME": "generic"},
        **{"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "1"},
    },
}


@pytest.mark.parametrize("name", SAME)
def test_threads_and_kinds_of_cpu_make_no_difference(
    edits: Path, tmp_path: Path, name: str
) -> None:
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)} | SAME[name]
    if "NUMBA_CPU_NAME" in SAME[name]:
        environment["NUMBA_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "abl_mlx", "reproduce", str(edits / "own.gguf"), "--json"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "identical"
    assert "open it" not in done.stderr  # it is gone


def test_a_changed_byte_of_the_base_is_named(edits: Path, tmp_path: Path) -> None:
    base = shutil.copytree(MODEL_PATH, tmp_path / "base")
    tensors = dict(mx.load(str(base / "model.safetensors")))
    name = "model.layers.2.self_attn.q_proj.weight"
    values = np.array(tensors[name].astype(mx.float32))
    values[3, 5] += 1
    tensors[name] = mx.array(values).astype(tensors[name].dtype)
    mx.eval(tensors)
    mx.save_safetensors(str(base / "model.safetensors"), tensors, {"format": "mlx"})
    words = ["reproduce", str(edits / "folder"), "--base", str(base)]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 3, result.output
    assert f"1 of 38 tensors differ: {name}" in result.stdout
    assert "no file of it has the SHA-256 of model.safetensors" in result.stdout


def test_the_direction_is_that_of_the_record(edits: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    mx.save_safetensors(str(other), {"selected": mx.ones((1, D))})
    with pytest.raises(UserError, match="these are other directions than the record's"):
        reproduce.reproduce(str(edits / "folder"), direction=other)


def changed(change: Callable[[dict], None]) -> Callable[[dict], dict]:
    def with_it(values: dict) -> dict:
        change(values)
        return values

    return with_it


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda one: one.pop("reproduction"), "does not hold what is needed"),
        (lambda one: one["reproduction"].update(directions=None), "not hold the directions, which"),
        (
            lambda one: [
                one["reproduction"].update(directions=None),
                one["direction"].update(update={"layers": [1]}),
            ],
            "not hold what `--method rome` adds to MLPs, .* name the direction file by --direction",
        ),
        (lambda one: one["reproduction"]["directions"].update(float32="?"), "are damaged"),
        (lambda one: one["reproduction"].update(outputs={}), "is of adapters"),
        (lambda one: one["reproduction"].update(outputs=3), "is damaged"),
        (lambda one: one.update(source="/nowhere"), "/nowhere"),
        (lambda one: one.update(induced=True), "--induce"),
    ],
)
def test_what_cannot_be_made_again_is_said(
    edits: Path, tmp_path: Path, change: Callable[[dict], None], says: str
) -> None:
    values = json.loads((edits / "folder" / "abl.json").read_text())
    change(values)
    (tmp_path / "abl.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=says) as refused:
        reproduce.reproduce(str(tmp_path / "abl.json"), tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_record_on_hugging_face_is_enough(
    edits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = (edits / "folder" / "abl.json").read_bytes()
    held = {"some/edited abl.json": record, "some/GGUFs own-Q4_K_M.abl.json": b"{}"}
    listed = {
        "some/edited": ["abl.json", "model.safetensors"],
        "some/GGUFs": ["own-Q4_K_M.gguf", "own-Q4_K_M.abl.json"],
        "some/other": ["model.safetensors"],
    }
    with hub_server.serve(hub_server.Hub(listed, held)) as hub:
        taken_for_the_hub(hub.url, tmp_path, monkeypatch)
        found = reproduce.reproduce("some/edited")
        assert found["verdict"] == "identical"
        assert hub.fetched == ["some/edited/abl.json"]
        with pytest.raises(UserError, match=r"holds no abl\.json, the record of an edit"):
            reproduce.reproduce("hf:some/other")
        with pytest.raises(UserError, match=r"own-Q4_K_M\.abl\.json does not hold what is needed"):
            reproduce.reproduce("some/GGUFs:Q4_K_M")


def test_a_direction_that_is_measured_again(direction: Path, tmp_path: Path) -> None:
    other = DirectionFile(mx.array(np.eye(D, dtype=np.float32)[:1]))
    measure_apply.apply(other, "demo", [tmp_path / "other"], ApplyOptions.of(max_leak=1))
    far = reproduce.reproduce(str(tmp_path / "other"), remeasure=True)
    assert far["verdict"] == "identical"
    found = direction_file.read(direction).selected
    assert far["cosine"] == pytest.approx(abs(float(found[0, 0])), abs=1e-4)
