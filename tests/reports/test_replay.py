"""The line under "To reproduce" on every page is run, and does again what the page tells of."""

from __future__ import annotations

import html
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abl_mlx.choices import RunOptions
from abl_mlx.reports.replay import command_line
from convert.mlx_to_gguf import write_gguf
from tests.support.command import abl_mlx

FEW = ("--limit", 8, "--max-tokens", 4, "--layer", 2)


def again(page: Path, *more: object) -> Any:
    """Run the line of a page; its record."""
    text = page.read_text(encoding="utf-8")
    section = text[text.index("To reproduce") :]
    line = html.unescape(re.search(r"abl-mlx [^<]*", section[section.index("<pre") :])[0])  # type: ignore[index]
    words = shlex.split(line)
    assert words[0] == "abl-mlx"
    return abl_mlx(*words[1:], *more)


def same(first: dict[str, Any], second: dict[str, Any], *but: str) -> None:
    """Two records agree in all but times and the keys named."""
    left_out = {"seconds", "report", *but}
    for name in first.keys() | second.keys():
        if name not in left_out:
            assert first.get(name) == second.get(name), name


def files(folder: Path) -> dict[str, bytes]:
    """What is in the written model."""
    kept = (".safetensors", ".json", ".gguf")
    paths = [folder] if folder.is_file() else sorted(folder.iterdir())
    return {one.name: one.read_bytes() for one in paths
            if one.suffix in kept and one.name != "abl.json"}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, where the commands run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rerun(here: Path, first: dict[str, Any], *outputs: str) -> None:
    """Run the line of the first output's page with the outputs out of the way, and compare."""
    (here / "kept").mkdir()
    for path in [one for one in here.iterdir() if one.name.startswith("out")]:
        shutil.move(path, here / "kept")
    kept = here / "kept" / outputs[0]
    page = kept / "report.html" if kept.is_dir() else kept.with_name(f"{kept.stem}.report.html")
    same(first, again(page))
    for name in outputs:
        assert files(here / name) == files(here / "kept" / name), name


def test_an_induced_model(here: Path) -> None:
    outputs = ("out", "out.cvec.gguf")
    asked = ("--induce", *FEW, "--strength", 1.1234567, "--anyway")
    first = abl_mlx("run", "demo", *(word for one in outputs for word in ("-o", one)), *asked)
    assert first["induced"]
    rerun(here, first, *outputs)


def test_a_run(here: Path) -> None:
    asked = (*FEW, "--strength", 0.7654321, "--layers", "1-3", "--no-embedding", "--max-leak", 9)
    first = abl_mlx("run", "demo", "-o", "out", "-o", "out.gguf", *asked)
    rerun(here, first, "out", "out.gguf")


def test_a_run_that_edits_a_gguf_of_the_model(here: Path, tiny_folder: Callable[..., Path]) -> None:
    base = write_gguf(tiny_folder("llama"), here / "base.gguf").path
    for name, word in (("harmful", "break"), ("harmless", "plant")):
        lines = "".join(f"How do I {word} {n} things?\n" for n in range(20))
        (here / f"{name}.txt").write_text(lines)
    sets = ("--harmful", "harmful.txt", "--harmless", "harmless.txt")
    first = abl_mlx(
        "run", tiny_folder("llama"), "--gguf", base.name, "-o", "out.gguf", *sets, *FEW,
        "--max-leak", 1,
    )  # fmt: skip
    assert first["measured_on"] == str(tiny_folder("llama"))
    rerun(here, first, "out.gguf")


def test_an_evaluation(here: Path) -> None:
    asked = ("--limit", 6, "--max-tokens", 5, "--baseline", "demo", "--max-kl", 0.0123456)
    asked += ("--min-refusal", 0.1)
    first = abl_mlx("eval", "demo", *asked, "--report", "eval.html")
    assert first["gate"]["passed"]
    same(first, again(here / "eval.html"))


def test_an_audit(here: Path) -> None:
    first = abl_mlx("audit", "demo", "--base", "demo", "--report", "audit.html")
    same(first, again(here / "audit.html"))


def test_what_is_shown(here: Path) -> None:
    asked = ("--limit", 8, "--layer", 2, "--reply", 2, "--strength", -0.5)
    first = abl_mlx("show", "demo", 'it\'s "quoted", $HOME', *asked, "-o", "show.html")
    same(first, again(here / "show.html"), "output")


@pytest.mark.parametrize("value", [0.1, 2.0, -3.0, 1 / 3, 1e-9])
def test_a_figure_keeps_every_digit(value: float) -> None:
    defaults = RunOptions().record()
    line = command_line(["run", "demo"], {**defaults, "strength": value}, defaults)
    word = shlex.split(line)[-1]
    assert float(word.removeprefix("--strength=")) == value
