"""Projectors and draft models come along with a GGUF, and Ollama lists what it listed before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.cli.main import cli
from abl_mlx.directions import direction_file
from abl_mlx.inputs.sources import Source
from abl_mlx.outputs import further_files
from abl_mlx.outputs.further_files import FurtherFiles
from tests.models.test_writers import random_direction
from tests.support import tiny_gguf
from tests.support.command import abl_mlx, fails
from tests.support.gguf_recipes import RECIPES
from tests.support.ollama_tools import Store, read_modelfile, shown, shown_in_store

WIDTH = RECIPES["llama"].keys["embedding_length"]
TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}<|assistant|>"
TOOLS = "{% if tools %}<tools>{{ tools }}</tools>{% endif %}" + TURNS
TOOLS += "{% if enable_thinking is defined %}<think>\n</think>{% endif %}"


def model(path: Path, template: str = TOOLS) -> Path:
    recipe = RECIPES["llama"]
    return tiny_gguf.write(path, replace(recipe, more={"tokenizer.chat_template": template}))


def projector(path: Path, width: int = WIDTH, hears: bool = False) -> Path:
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_string("general.type", "mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_audio_encoder", hears)
    writer.add_uint32("clip.vision.projection_dim", width)
    writer.add_tensor("mm.0.weight", np.ones((width, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def direction(tmp_path: Path) -> Path:
    path = tmp_path / "direction.safetensors"
    direction_file.save(path, direction_file.DirectionFile(random_direction(WIDTH, 1)))
    return path


def apply(direction: Path, source: object, out: Path) -> Any:
    return abl_mlx("apply", direction, source, "-o", out)


def test_a_projector_beside_a_gguf_comes_along(tmp_path: Path, direction: Path) -> None:
    source = model(tmp_path / "m.gguf")
    seeing = projector(tmp_path / "mmproj-m-F16.gguf")
    projector(tmp_path / "mmproj-other.gguf", WIDTH + 32)  # another model's
    out = tmp_path / "out" / "edited.gguf"
    apply(direction, source, out)
    assert (out.parent / "mmproj-edited.gguf").read_bytes() == seeing.read_bytes()
    lines = read_modelfile((out.parent / "edited.Modelfile").read_text())
    froms = [name for word, name in lines if word == "FROM"]
    assert froms == ["./edited.gguf", "./mmproj-edited.gguf"]
    # The TEMPLATE has the turns alone, and Ollama prefers the GGUF's own, which has the rest.
    assert "TEMPLATE" in dict(lines)
    assert shown(out.parent / "edited.Modelfile") == ("completion", "thinking", "tools", "vision")


def test_undo_copies_the_projector_too(tmp_path: Path, direction: Path) -> None:
    source = model(tmp_path / "m.gguf")
    seeing = projector(tmp_path / "mmproj-m-F16.gguf")
    edited, back = tmp_path / "out" / "edited.gguf", tmp_path / "back" / "again.gguf"
    abl_mlx("apply", direction, source, "-o", edited, "--keep-undo")
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "mmproj-again.gguf").write_bytes(b"mine")
    assert "mmproj-again.gguf already exists" in fails("undo", edited, "-o", back)
    assert not back.exists()
    (tmp_path / "back" / "mmproj-again.gguf").unlink()
    abl_mlx("undo", edited, "-o", back)
    assert (tmp_path / "back" / "mmproj-again.gguf").read_bytes() == seeing.read_bytes()


def test_outputs_beside_the_source_each_get_its_projector(
    tmp_path: Path, direction: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is there already does not count: what lies beside a source is looked for once."""
    source = model(tmp_path / "m.gguf")
    seeing = projector(tmp_path / "mmproj-m.gguf").read_bytes()
    looked: list[Source] = []
    monkeypatch.setattr(further_files, "of_source", seen(looked, further_files.of_source))
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    arguments = ["apply", direction, source, "-o", first, "-o", second]
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    for out in (first, second):
        assert out.with_name(f"mmproj-{out.name}").read_bytes() == seeing
        assert (
            f"llama-server -m {out} --mmproj {out.with_name(f'mmproj-{out.name}')}" in result.stderr
        )
    assert len(looked) == 1


def seen(told: list[Source], find: Callable[[Source], FurtherFiles]) -> Callable[..., FurtherFiles]:
    """The same function, which keeps what it is called with."""

    def found(source: Source) -> FurtherFiles:
        told.append(source)
        return find(source)

    return found


def test_of_two_that_fit_none_is_taken(
    tmp_path: Path, direction: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model(tmp_path / "m.gguf")
    for kind in ("F16", "Q8_0"):
        projector(tmp_path / f"mmproj-m-{kind}.gguf")
    out = tmp_path / "out" / "edited.gguf"
    apply(direction, source, out)
    assert not list(out.parent.glob("mmproj*"))
    assert shown(out.parent / "edited.Modelfile") == ("completion", "thinking", "tools")


def test_a_file_in_the_way_is_told_before_anything(tmp_path: Path, direction: Path) -> None:
    source = model(tmp_path / "m.gguf")
    projector(tmp_path / "mmproj-m.gguf")
    out = tmp_path / "out" / "edited.gguf"
    out.parent.mkdir()
    (out.parent / "mmproj-edited.gguf").write_bytes(b"mine")
    said = fails("apply", direction, source, "-o", out)
    assert "mmproj-edited.gguf" in said
    assert [path.name for path in out.parent.iterdir()] == ["mmproj-edited.gguf"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"template": "{{ range .Messages }}{{ .Content }}{{ end }}"},
        {"template": "{{ .Tools }}{{ range .Messages }}{{ .Content }}{{ end }}"},
        {"config": {"renderer": "qwen3-coder", "parser": "qwen3-coder"}},
        {"config": {"parser": "olmo3-think"}},
    ],
)
def test_ollama_lists_what_it_listed_before(
    settings: dict[str, Any], tmp_path: Path, direction: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    monkeypatch.setenv("OLLAMA_MODELS", str(store.path))
    name = "registry.ollama.ai/library/sees/latest"
    store.add(
        name,
        model=model(tmp_path / "m.gguf").read_bytes(),
        projector=projector(tmp_path / "p.gguf", hears=True).read_bytes(),
        draft=model(tmp_path / "d.gguf", TURNS).read_bytes(),
        **settings,
    )
    out = tmp_path / "out" / "edited.gguf"
    apply(direction, "ollama:sees", out)
    before = shown_in_store(store.path, name)
    assert {"vision", "audio"} < set(before)
    assert shown(out.parent / "edited.Modelfile") == before
    assert (out.parent / "draft-edited.gguf").read_bytes() == (tmp_path / "d.gguf").read_bytes()


@pytest.mark.parametrize("ollama", [False, True])
def test_a_projector_comes_along_into_other_types(
    ollama: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeing = projector(tmp_path / "mmproj-m.gguf")
    source: object = model(tmp_path / "m.gguf")
    if ollama:
        store = Store(tmp_path / "store")
        monkeypatch.setenv("OLLAMA_MODELS", str(store.path))
        weights, draft = (tmp_path / "m.gguf").read_bytes(), model(tmp_path / "d.gguf", TURNS)
        store.add(
            "registry.ollama.ai/library/sees/latest",
            model=weights, projector=seeing.read_bytes(), draft=draft.read_bytes(),
        )  # fmt: skip
        source = "ollama:sees"
    out = tmp_path / "out" / "small.gguf"
    record = abl_mlx("convert", source, out, "--quantize", "Q8_0")
    assert (out.parent / "mmproj-small.gguf").read_bytes() == seeing.read_bytes()
    named = "mmproj-small.gguf, draft-small.gguf" if ollama else "mmproj-small.gguf"
    assert f"with it come {named}, as they were" in record["note"]
    assert (out.parent / "draft-small.gguf").is_file() == ollama


def test_a_folder_made_of_a_gguf_says_that_it_does_not_see(tmp_path: Path, direction: Path) -> None:
    source = model(tmp_path / "m.gguf")
    projector(tmp_path / "mmproj-m.gguf")
    said = "pictures and sound are left out: an MLX folder has no place for mmproj-m.gguf"
    assert said in abl_mlx("convert", source, tmp_path / "folder")["note"]
    assert said in apply(direction, source, tmp_path / "edited")["written"][0]["note"]
