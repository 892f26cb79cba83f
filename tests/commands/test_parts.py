"""`convert`, `run` and `apply` with --split-max-size and --join."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from abl_mlx.choices import ApplyOptions
from abl_mlx.cli.main import cli
from abl_mlx.commands import conversion, measure_apply
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.ollama.store import find
from tests.support.ollama_tools import Store

SIZE = 700_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "demo.gguf"
    conversion.convert("demo", path, quantize="Q8_0")
    return path


@pytest.fixture(scope="module")
def parts(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    conversion.convert(str(whole), folder / "demo.gguf", split_max_size=SIZE)
    return sorted(folder.iterdir())


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def same_tensors(one: Path, other: Path) -> None:
    with GgufSource(one) as first, GgufSource(other) as second:
        assert first.tensors.keys() == second.tensors.keys()
        for name in first.tensors:
            np.testing.assert_array_equal(first.raw(name), second.raw(name), name)


def test_convert_splits_and_joins(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    assert len(parts) > 2
    assert all(part.stat().st_size <= SIZE for part in parts)
    same_tensors(whole, parts[0])
    result = run("convert", parts[0], tmp_path / "joined.gguf", "--join")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "joined.gguf").read_bytes() == whole.read_bytes()
    result = run("convert", parts[0], tmp_path / "again.gguf", "--split-max-size", "1500K")
    assert result.exit_code == 0, result.stderr
    again = sorted(tmp_path.glob("again-*.gguf"))
    assert 1 < len(again) < len(parts)
    same_tensors(whole, again[0])
    assert str(again[0]) in result.stdout


def test_a_folder_becomes_parts(whole: Path, tmp_path: Path) -> None:
    record = conversion.convert("demo", tmp_path / "x.gguf", quantize="Q8_0", split_max_size=SIZE)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 2
    assert record.output == str(files[0])
    same_tensors(whole, files[0])


@pytest.mark.parametrize("source", ["demo", "whole", "parts"])
def test_apply_writes_parts_of_any_source(
    source: str, whole: Path, parts: list[Path], direction: Path, tmp_path: Path
) -> None:
    text = {"demo": "demo", "whole": str(whole), "parts": str(parts[0])}[source]
    flags = {"quantize": "Q8_0"} if source == "demo" else {}
    for name, more in (("one", {"join": True}), ("many", {"split_max_size": 1_000_000})):
        options = ApplyOptions.of(**flags, **more)
        record = measure_apply.apply(direction, text, [tmp_path / f"{name}.gguf"], options)
        assert record["leak"]["total"] < 1e-3
    many = sorted(tmp_path.glob("many-*.gguf"))
    assert len(many) > 1
    assert not (tmp_path / "many.gguf").exists()
    assert record["written"][0]["output"] == str(many[0])
    assert record["written"][0]["files"] == [file.name for file in many]
    same_tensors(tmp_path / "one.gguf", many[0])
    assert (tmp_path / "one.Modelfile").exists()
    assert not (tmp_path / "many.Modelfile").exists()


def test_run_asks_llama_cpp_with_the_parts(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    out = tmp_path / "edited.gguf"
    result = run("run", whole, "-o", out, "--split-max-size", "1M", "--quick")
    assert result.exit_code == 0, result.stderr
    assert len(list(tmp_path.glob("edited-*.gguf"))) > 1
    assert "asked in llama.cpp" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--split-max-size", "1M", "--join"], "contradict each other"),
        (["--split-max-size", "2X"], "no size such as 2G"),
        (["--split-max-size", "0"], "no size such as 2G"),
    ],
)
def test_mistakes(whole: Path, tmp_path: Path, arguments: list[str], named: str) -> None:
    result = run("convert", whole, tmp_path / "o.gguf", *arguments)
    assert result.exit_code != 0
    assert named in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_folders_have_no_parts(whole: Path, tmp_path: Path) -> None:
    result = run("convert", whole, tmp_path / "folder", "--join")
    assert result.exit_code == 1
    assert "--split-max-size and --join are for GGUFs" in result.stderr


def test_parts_in_the_way_are_named_before_any_work(
    whole: Path, direction: Path, tmp_path: Path
) -> None:
    (tmp_path / "o-00001-of-00009.gguf").write_bytes(b"")
    options = ApplyOptions.of(split_max_size=SIZE)
    for source in ("demo", str(whole)):
        with pytest.raises(UserError, match=r"o-00001-of-00009\.gguf already exists"):
            measure_apply.apply(direction, source, [tmp_path / "o.gguf"], options)


def test_ollama_gets_one_file_of_a_source_in_parts(
    parts: list[Path], direction: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ``--ollama-create``, which calls the program, and by ``-o ollama:``, which does not."""
    Store(tmp_path / "store")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ollama").write_text(f'#!/bin/sh\necho "$@" > {tmp_path / "called"}\n')
    (tmp_path / "bin" / "ollama").chmod(0o755)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    one = tmp_path / "one.gguf"
    options = ApplyOptions.of(ollama_create="edited")
    measure_apply.apply(direction, str(parts[0]), [one], options)
    assert (tmp_path / "called").read_text().split()[:2] == ["create", "edited"]
    measure_apply.apply(direction, str(parts[0]), [Path("ollama:edited")], ApplyOptions())
    same_tensors(one, find("edited").gguf)
    options = ApplyOptions.of(ollama_create="other", split_max_size=SIZE)
    with pytest.raises(UserError, match="Ollama takes one file"):
        measure_apply.apply(direction, str(parts[0]), [tmp_path / "two.gguf"], options)
    with pytest.raises(UserError, match="contradict each other"):
        measure_apply.apply(
            direction,
            str(parts[0]),
            [Path("ollama:other")],
            ApplyOptions.of(split_max_size=SIZE),
        )
