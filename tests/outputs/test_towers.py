"""Models that see: their towers stay as they are in folders, and become projectors beside GGUFs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.cli.main import cli
from abl_mlx.directions import direction_file
from convert.gguf.file import GgufSource, metadata
from convert.mlx.safetensors_files import TensorFiles
from convert.projectors import folder as towers
from tests.models.test_writers import random_direction
from tests.support import seeing
from tests.support.command import abl_mlx, fails
from tests.support.llama_pictures import ask, png
from tests.support.ollama_tools import Store, read_modelfile, shown, shown_in_store
from tests.support.record_projectors import told

#: One form of each family.
FAMILIES = [name for name in seeing.FAMILIES if "," not in name]


def direction_for(folder: Path, place: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    width = config.get("text_config", config)["hidden_size"]
    path = place / "direction.safetensors"
    direction_file.save(path, direction_file.DirectionFile(random_direction(width, 1)))
    return path


def expected(folder: Path, place: Path, kind: str = "F16") -> dict[str, Any]:
    """What the projector of an unedited folder holds."""
    found = towers.find(folder)
    assert found is not None
    found.write(place / "expected.gguf", kind)
    return told(place / "expected.gguf")


@pytest.mark.parametrize("mlx", [False, True], ids=["published", "mlx-vlm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_edited_folder_keeps_its_tower_and_the_settings_of_pictures(
    name: str, mlx: bool, tmp_path: Path
) -> None:
    source = seeing.write(tmp_path / "source", name, mlx=mlx, dtype="bfloat16")
    (source / "processor_config.json").write_text('{"processor_class": "Some"}')
    (source / "video_preprocessor_config.json").write_text("{}")
    abl_mlx("apply", direction_for(source, tmp_path), source, "-o", tmp_path / "out")
    for file in source.glob("*processor_config.json"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["vision_config"] == before["vision_config"]
    tower = towers.find(source)
    assert tower is not None
    with TensorFiles(source) as old, TensorFiles(tmp_path / "out") as new:
        for one in tower.sources:
            assert bytes(old.bytes(one)) == bytes(new.bytes(one))
        assert any(bytes(old.bytes(one)) != bytes(new.bytes(one)) for one in old.names)
    assert towers.find(tmp_path / "out").sources == tower.sources  # type: ignore[union-attr]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_edited_gguf_has_the_tower_unedited_beside_it(name: str, tmp_path: Path) -> None:
    source = seeing.write(tmp_path / "source", name)
    out = tmp_path / "out" / "edited.gguf"
    record = abl_mlx("apply", direction_for(source, tmp_path), source, "-o", out)
    written = out.parent / "mmproj-edited.gguf"
    assert told(written) == expected(source, tmp_path)
    count = len(towers.find(source).sources)  # type: ignore[union-attr]
    note = f"the vision tower ({count} tensors) is in mmproj-edited.gguf, unedited"
    assert note in record["written"][0]["note"]
    assert note in (out.parent / "edited.README.md").read_text()
    lines = read_modelfile((out.parent / "edited.Modelfile").read_text())
    froms = [line for word, line in lines if word == "FROM"]
    assert froms == ["./edited.gguf", "./mmproj-edited.gguf"]
    assert "vision" in shown(out.parent / "edited.Modelfile")
    assert metadata(written)["general.name"] == metadata(out)["general.name"]


@pytest.mark.parametrize(("chosen", "kind"), [("F32", "F32"), ("BF16", "BF16"), ("Q8_0", "F16")])
def test_the_towers_type_goes_by_the_models(chosen: str, kind: str, tmp_path: Path) -> None:
    source = seeing.write(tmp_path / "source", "gemma3")
    record = abl_mlx("convert", source, tmp_path / "m.gguf", "--quantize", chosen)
    assert "mmproj-m.gguf" in record["note"]
    assert told(tmp_path / "mmproj-m.gguf") == expected(source, tmp_path, kind)
    # What llama.cpp's users then do with the pair.
    moved = abl_mlx("apply", direction_for(source, tmp_path), tmp_path / "m.gguf", "-o",
                    tmp_path / "e.gguf")  # fmt: skip
    assert moved["written"]
    assert (tmp_path / "mmproj-e.gguf").read_bytes() == (tmp_path / "mmproj-m.gguf").read_bytes()


def test_a_projector_in_the_way_is_told_before_anything(tmp_path: Path) -> None:
    source = seeing.write(tmp_path / "source", "gemma3")
    (tmp_path / "mmproj-e.gguf").write_bytes(b"mine")
    given = ["apply", direction_for(source, tmp_path)]
    for command in (["convert"], given):
        arguments = [source, tmp_path / "e.gguf"]
        if command is given:
            arguments.insert(1, "-o")
        assert "mmproj-e.gguf already exists" in fails(*command, *arguments)
        assert not (tmp_path / "e.gguf").exists()


def test_a_tower_that_is_not_known_is_left_out_with_the_reason(tmp_path: Path) -> None:
    source = seeing.write(tmp_path / "source", "gemma3")
    path = source / "model.safetensors"
    weights = dict(mx.load(str(path)))
    weights["vision_tower.other.weight"] = mx.zeros((4, 4))
    mx.save_safetensors(str(path), weights, metadata={"format": "pt"})
    out = tmp_path / "out" / "e.gguf"
    record = abl_mlx("apply", direction_for(source, tmp_path), source, "-o", out)
    note = record["written"][0]["note"]
    assert note.startswith("left out: 72 tensors of the vision tower (such as ")
    assert "vision_tower.other.weight has no place in a projector of the type gemma3" in note
    assert not list(out.parent.glob("mmproj*"))
    lines = read_modelfile((out.parent / "e.Modelfile").read_text())
    assert [line for word, line in lines if word == "FROM"] == ["./e.gguf"]


def test_the_clip_tower_of_llava_is_refused_by_name(tmp_path: Path) -> None:
    source = seeing.write(tmp_path / "source", "pixtral")
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["model_type"] = "clip_vision_model"
    (source / "config.json").write_text(json.dumps(config))
    record = abl_mlx("convert", source, tmp_path / "m.gguf")
    said = "its tower is CLIP, of which llama.cpp's convert_hf_to_gguf.py writes no projector"
    assert said in record["note"]
    assert not list(tmp_path.glob("mmproj*"))


def test_in_ollamas_store_the_tower_is_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    monkeypatch.setenv("OLLAMA_MODELS", str(store.path))
    monkeypatch.chdir(tmp_path)
    source = seeing.write(tmp_path / "source", "gemma3")
    abl_mlx("apply", direction_for(source, tmp_path), source, "-o", "ollama:sees")
    assert "vision" in shown_in_store(store.path, "registry.ollama.ai/library/sees/latest")
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_answers_about_pictures(name: str, tmp_path: Path) -> None:
    source = seeing.write(tmp_path / "source", name)
    abl_mlx("convert", source, tmp_path / "m.gguf")
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3))
    pictures = [png(np.full((64, 64, 3), 255)), png(noise), png(noise)]
    plain, noisy, again = ask(tmp_path / "m.gguf", tmp_path / "mmproj-m.gguf", pictures)
    assert noisy == again
    both = noisy.first.keys() & plain.first.keys()
    assert both
    assert max(abs(noisy.first[one] - plain.first[one]) for one in both) > 1e-3


def test_the_command_that_opens_the_output_names_the_tower(tmp_path: Path) -> None:
    source = seeing.write(tmp_path / "source", "gemma3")
    out = tmp_path / "e.gguf"
    given = ["apply", direction_for(source, tmp_path), source, "-o", out]
    result = CliRunner().invoke(cli, list(map(str, given)))
    assert result.exit_code == 0
    command = f"llama-server -m {out} --mmproj {tmp_path / 'mmproj-e.gguf'}"
    assert command in result.output.replace("\n", " ")


def test_the_tower_s_tensors_are_whole(tmp_path: Path) -> None:
    source = seeing.write(tmp_path / "source", "gemma3")
    abl_mlx("convert", source, tmp_path / "m.gguf", "--quantize", "F32")
    with GgufSource(tmp_path / "mmproj-m.gguf") as written, TensorFiles(source) as files:
        name = "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"
        raw = bytes(written.raw("v.blk.2.ffn_up.weight"))
        assert raw == bytes(files.bytes(name))
