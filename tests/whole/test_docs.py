"""What README.md and the pages show is true: programs run, commands and links exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest

from abl_mlx.cli.main import cli
from abl_mlx.directions.methods import METHODS
from convert.architectures.table import IN_MLX
from tests.support.places import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
#: Programs of the pages that are run by a test of their own.
RUN_ELSEWHERE = {ROOT / "README.md"}


@cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)


def calls(page: Path) -> list[list[str]]:
    """Arguments of every `abl-mlx` command in the page's shell blocks."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.partition("#")[0].split("&&")]
    commands = [part.partition(" > ")[0] for part in parts if part.startswith("abl-mlx ")]
    return [shlex.split(command)[1:] for command in commands]


def anchors(page: Path) -> set[str]:
    """Names of the page's headings in links."""
    headings = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def with_calls() -> list[Path]:
    return [page for page in PAGES if calls(page)]


@pytest.mark.parametrize("page", with_calls(), ids=lambda page: page.name)
def test_commands_and_their_flags_exist(page: Path) -> None:
    for name, *arguments in calls(page):
        if arguments == ["..."]:
            continue
        command = cli.commands[name]
        parent = click.Context(cli, **cli.context_settings)
        context = command.make_context(name, arguments, parent)
        assert {
            "model",
            "first",
            "source",
            "repository",
            "edited",
            "record",
        } & context.params.keys()


def options() -> set[str]:
    return {
        option
        for command in cli.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--version", "--help"}


#: Flags of other programs: llama.cpp, the benchmarks, tools.regenerate.
FOREIGN = {"--check", "--control-vector", "--history", "--mmproj", "--only", "--table", "--write"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_the_text_exist(page: Path) -> None:
    named = set(re.findall(r"`(--[a-z-]+)(?: [^`]*)?`", text(page)))
    assert named - FOREIGN <= options()


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if blocks(p, "python") and p not in RUN_ELSEWHERE],
    ids=lambda page: page.name,
)
def test_programs_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), target
        assert page.parent != DOCS or place.is_relative_to(DOCS), f"{target} is not on the site"
        assert not anchor or anchor in anchors(place), target


def test_design_is_cited_from_the_repository() -> None:
    """Docstrings cite headings of docs/architecture.md, and these are there."""
    headings = set(re.findall(r"^#+ (.*)$", text(DOCS / "architecture.md"), re.MULTILINE))
    cited = set()
    for room in ("abl_mlx", "convert"):
        for module in (ROOT / room).rglob("*.py"):
            code = module.read_text(encoding="utf-8")
            assert "DESIGN section" not in code, module
            cited |= set(re.findall(r'docs/architecture\.md, "([^"]+)"', code))
    assert len(cited) >= 5
    assert cited <= headings


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if page.name not in navigation] == []


def test_architectures_that_run_from_a_gguf_are_listed() -> None:
    page = text(DOCS / "gguf.md")
    (named,) = re.findall(r"Architectures that run this way: (.*?)\. On tiny", page, re.DOTALL)
    named = re.sub(r"\(.*?\)", "", named.replace("\n", " "))
    assert sorted(name.strip() for name in named.split(",")) == sorted(IN_MLX)
    assert f"{len(IN_MLX)} of them run from the GGUF alone" in text(ROOT / "README.md")


def test_every_method_has_a_paragraph_that_says_when_to_use_it() -> None:
    page = text(DOCS / "methods.md")
    for one in METHODS:
        assert re.search(rf"^(?:.*\s)?\*\*`{re.escape(one)}`\*\*", page, re.MULTILINE), one


def test_files_of_the_fast_tier_exist() -> None:
    names = (ROOT / "tests" / "fast.txt").read_text(encoding="utf-8").split()
    assert names == sorted(set(names))
    assert [name for name in names if not (ROOT / "tests" / name).exists()] == []
