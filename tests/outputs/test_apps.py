"""Outputs land where Ollama and LM Studio look, and the commands that open them are said."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from abl_mlx.cli.main import cli
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import direction_file
from convert.base.errors import UserError
from convert.gguf.file import metadata
from convert.lmstudio import models_folder, parse
from convert.ollama.store import find
from tests.models.test_writers import random_direction
from tests.outputs.test_further_files import TOOLS, WIDTH, model, projector
from tests.support.command import fails
from tests.support.ollama_tools import Store, shown_in_store

LIBRARY = "registry.ollama.ai/library"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, with a home of its own and a store of Ollama's."""
    Store(tmp_path / "store")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".lmstudio").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def saved(place: Path, width: int) -> Path:
    path = place / f"direction-{width}.safetensors"
    if not path.exists():
        direction_file.save(path, direction_file.DirectionFile(random_direction(width, 1)))
    return path


def apply(*arguments: object) -> tuple[Any, list[str]]:
    """The record, and the lines on how the outputs are opened."""
    result = CliRunner().invoke(cli, ["apply", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("open it: ")]
    return json.loads(result.stdout), [line.removeprefix("open it: ") for line in said]


def test_a_gguf_is_filed_in_ollama(place: Path) -> None:
    source = model(place / "m.gguf")
    projector(place / "mmproj-m.gguf")
    _, said = apply(saved(place, WIDTH), source, "-o", "ollama:mine:v2")
    assert said == ["ollama run mine:v2"]
    found = find("mine:v2")
    assert "abl-mlx" in str(metadata(found.gguf)["general.tags"])
    assert found.template is not None
    assert shown_in_store(place / "store", f"{LIBRARY}/mine/v2") == (
        "completion", "thinking", "tools", "vision",
    )  # fmt: skip
    # Here remain the record and the card.
    assert sorted(path.name for path in (place / "work").iterdir()) == [
        "mine-v2.README.md", "mine-v2.abl.json",
    ]  # fmt: skip
    said_of = fails(
        "apply", place / f"direction-{WIDTH}.safetensors", source, "-o", "ollama:mine:v2"
    )
    assert "Ollama has a model mine:v2 already" in said_of


def test_a_model_in_ollama_is_replaced_on_demand_only(place: Path) -> None:
    source, direction = model(place / "m.gguf"), saved(place, WIDTH)
    store = Store.__new__(Store)
    store.path = place / "store"
    store.add(f"{LIBRARY}/mine/latest", model=source.read_bytes())
    first = find("mine").gguf
    assert "replace it with --overwrite" in fails("apply", direction, "ollama:mine", "-o",
                                                  "ollama:mine")  # fmt: skip
    # The source itself is replaced, by what was made of it.
    result = CliRunner().invoke(
        cli, ["apply", str(direction), "ollama:mine", "-o", "ollama:mine", "--overwrite"]
    )
    assert result.exit_code == 0, result.stderr
    assert "mine:latest was replaced in Ollama" in result.stderr
    assert find("mine").gguf != first
    assert first.is_file()
    said = fails("apply", direction, source, "-o", "x.gguf", "--overwrite")
    assert "it needs -o ollama:NAME" in said
    assert not Path("x.gguf").exists()


def test_what_ollama_had_is_kept(place: Path) -> None:
    store = Store.__new__(Store)
    store.path = place / "store"
    store.add(
        f"{LIBRARY}/sees/latest",
        model=model(place / "m.gguf").read_bytes(),
        projector=projector(place / "p.gguf").read_bytes(),
        template="{{ .Tools }}{{ range .Messages }}{{ .Content }}{{ end }}",
        params={"temperature": 0.5},
        license="Do as you like.",
        config={"capabilities": ["insert"]},
    )
    apply(saved(place, WIDTH), "ollama:sees", "-o", "ollama:sees-edited")
    was, now = find("sees"), find("sees-edited")
    assert replace(now, gguf=was.gguf, name=was.name) == was
    assert shown_in_store(store.path, f"{LIBRARY}/sees-edited/latest") == shown_in_store(
        store.path, f"{LIBRARY}/sees/latest"
    )


def test_lm_studio_gets_a_gguf_of_a_gguf_and_a_folder_of_a_folder(place: Path) -> None:
    source = model(place / "m.gguf")
    projector(place / "mmproj-m.gguf")
    _, said = apply(saved(place, WIDTH), source, "-o", "lmstudio:me/tiny-edited")
    models = place / "home" / ".lmstudio" / "models"
    assert (models / "me" / "tiny-edited" / "tiny-edited.gguf").is_file()
    assert (models / "me" / "tiny-edited" / "mmproj-tiny-edited.gguf").is_file()
    assert said == ["LM Studio: My Models, me/tiny-edited"]
    apply(saved(place, 256), "demo", "-o", "lmstudio:me/demo-edited")
    assert (models / "me" / "demo-edited" / "config.json").is_file()
    assert "me/demo-edited" in fails(
        "apply", place / "direction-256.safetensors", MODEL_PATH, "-o", "lmstudio:me/demo-edited"
    )


def test_lm_studio_is_found_by_its_pointer_and_settings(place: Path) -> None:
    home = place / "home"
    assert models_folder() == home / ".lmstudio" / "models"
    (home / ".cache" / "lm-studio").mkdir(parents=True)
    assert models_folder() == home / ".cache" / "lm-studio" / "models"
    elsewhere = place / "elsewhere"
    (home / ".lmstudio-home-pointer").write_text(f"{elsewhere}\n")
    assert models_folder() == home / ".cache" / "lm-studio" / "models"  # it is not there
    elsewhere.mkdir()
    assert models_folder() == elsewhere / "models"
    for text in ("{", "[]", '{"downloadsFolder": 3}', '{"downloadsFolder": "relative"}'):
        (elsewhere / "settings.json").write_text(text)
        assert models_folder() == elsewhere / "models"
    (elsewhere / "settings.json").write_text(json.dumps({"downloadsFolder": "~/big"}))
    assert models_folder() == home / "big"


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_settings_of_older_versions(
    place: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    home = place / "home"
    older = home / {"linux": ".config", "darwin": "Library/Application Support"}[system]
    (older / "LM Studio").mkdir(parents=True)
    (older / "LM Studio" / "settings.json").write_text(json.dumps({"downloadsFolder": "/old"}))
    assert models_folder() == Path("/old")
    (home / ".lmstudio" / "settings.json").write_text(json.dumps({"downloadsFolder": "/new"}))
    assert models_folder() == Path("/new")


LMS = """#!{python}
import os, shutil, sys
from pathlib import Path

with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
command, yes, flag, named, how, path = sys.argv[1:]
assert (command, yes, flag) == ("import", "-y", "--user-repo")
target = Path({models!r}, named, Path(path).name)
target.parent.mkdir(parents=True, exist_ok=True)
if how == "--hard-link" and {links}:
    os.link(path, target)
elif how == "--copy" and {copies}:
    shutil.copyfile(path, target)
else:
    sys.exit("Target is on another disk.")
"""


def stand_in(place: Path, monkeypatch: pytest.MonkeyPatch, **does: bool) -> Path:
    """A program `lms` on the PATH that takes the arguments of the real one; its log."""
    log, models = place / "log", place / "home" / ".lmstudio" / "models"
    text = LMS.format(python=sys.executable, log=str(log), models=str(models), **does)
    (place / "bin").mkdir()
    (place / "bin" / "lms").write_text(text)
    (place / "bin" / "lms").chmod(0o755)
    monkeypatch.setenv("PATH", str(place / "bin"), prepend=os.pathsep)
    return log


@pytest.mark.parametrize("links", [True, False], ids=["one disk", "two disks"])
def test_with_lms_here_it_imports_the_files(
    place: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    log = stand_in(place, monkeypatch, links=links, copies=True)
    source = model(place / "m.gguf")
    projector(place / "mmproj-m.gguf")
    _, said = apply(saved(place, WIDTH), source, "-o", "lmstudio:me/tiny-edited")
    assert said == ["LM Studio: My Models, me/tiny-edited"]
    there = place / "home" / ".lmstudio" / "models" / "me" / "tiny-edited"
    assert sorted(one.name for one in there.iterdir()) == [
        "mmproj-tiny-edited.gguf", "tiny-edited.gguf",
    ]  # fmt: skip
    assert "abl-mlx" in str(metadata(there / "tiny-edited.gguf")["general.tags"])
    assert sorted(one.name for one in (place / "work").iterdir()) == [
        "tiny-edited.README.md", "tiny-edited.abl.json",
    ]  # fmt: skip
    ways = [line.split()[4] for line in log.read_text().splitlines()]
    assert ways == (["--hard-link"] * 2 if links else ["--hard-link", "--copy"] * 2)
    assert "tiny-edited.gguf already exists" in fails(
        "apply", place / f"direction-{WIDTH}.safetensors", source, "-o", "lmstudio:me/tiny-edited"
    )


def test_where_lms_fails_the_file_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(place, monkeypatch, links=False, copies=False)
    said = fails("apply", saved(place, WIDTH), model(place / "m.gguf"), "-o", "lmstudio:me/x")
    assert "`lms import` failed (Target is on another disk)" in said
    assert "`lms import --user-repo me/x x.gguf`" in said
    assert (place / "work" / "x.gguf").is_file()


@pytest.mark.parametrize("text", ["", "me", "me/", "/x", "a/b/c", "../x", "me/..", "me/a b"])
def test_names_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="PUBLISHER/NAME"):
        parse(text)


def test_apps_that_are_not_here_are_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "home" / ".lmstudio").rmdir()
    source, direction = model(place / "m.gguf"), saved(place, WIDTH)
    assert "LM Studio is not here" in fails("apply", direction, source, "-o", "lmstudio:me/x")
    monkeypatch.setenv("OLLAMA_MODELS", str(place / "none"))
    assert "no models of Ollama" in fails("apply", direction, source, "-o", "ollama:x")
    assert "only `run` and `apply`" in fails("convert", source, "ollama:x")


def test_every_output_is_opened_by_a_command(place: Path) -> None:
    source = model(place / "m.gguf", TOOLS)
    projector(place / "mmproj-m.gguf")
    _, said = apply(saved(place, WIDTH), source, "-o", "My Edit.gguf", "-o", "x.lora.gguf")
    assert said == [
        "llama-server -m 'My Edit.gguf' --mmproj 'mmproj-My Edit.gguf'",
        "ollama create my-edit -f 'My Edit.Modelfile' && ollama run my-edit",
        f"llama-server -m {source} --lora x.lora.gguf",
    ]
    _, said = apply(saved(place, 256), "demo", "-o", "folder", "-o", "d.adapter")
    assert said == [
        "mlx_lm.chat --model folder",
        f"mlx_lm.chat --model {MODEL_PATH} --adapter-path d.adapter",
    ]


def test_a_flag_that_is_gone_says_so(place: Path) -> None:
    given = ["apply", str(saved(place, WIDTH)), "m.gguf", "-o", "x.gguf", "--strict-types"]
    result = CliRunner().invoke(cli, given)
    assert result.exit_code == 2
    assert "--strict-types is gone: every tensor of a GGUF keeps its own type" in result.stderr
