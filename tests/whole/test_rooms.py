"""How the packages hang together: no import circles, and `convert` knows no flags of a command."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import click
import pytest

from abl_mlx.cli.main import cli
from abl_mlx.support.flags import flag, said
from convert.base.errors import OPTION, UserError

ROOT = Path(__file__).parents[2]
PACKAGES = ("abl_mlx", "convert")


def modules(package: str) -> dict[str, Path]:
    """Every module of a package, sub-packages included, by its dotted name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The modules of ``known`` that a module imports, inside functions too; not for types only."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known or node.module in known:
                    yield inner if inner in known else node.module


def test_no_module_imports_itself_by_way_of_others():
    paths = {name: path for package in PACKAGES for name, path in modules(package).items()}
    graph = {
        name: set(imports(ast.parse(path.read_text()), set(paths))) for name, path in paths.items()
    }
    assert any("convert.gguf.file" in found for found in graph.values())
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


def test_imports_inside_functions_of_convert_say_that_they_are_lazy():
    for name, path in modules("convert").items():
        text = path.read_text()
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Import | ast.ImportFrom):
                        line = text.splitlines()[node.lineno - 1]
                        assert "# lazily: " in line, f"{name}: {line.strip()}"


def test_the_page_about_the_architecture_names_every_room():
    layers = re.findall(
        r"^layers = \[\n(.*?)^\]", text_of("pyproject.toml"), re.DOTALL | re.MULTILINE
    )
    rooms = {room for part in layers for room in re.findall(r"\w+", part)}
    assert {"cli", "outputs", "gguf", "base"} <= rooms
    page = text_of("docs/architecture.md")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {room for row in rows for room in re.findall(r"`(\w+)`", row)}
    assert rooms - named == {"eval_choices", "flag_values"}  # parts of `choices`


def test_the_page_of_the_library_draws_every_exception():
    found = {
        node.name
        for package in PACKAGES
        for path in modules(package).values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base) in ("UserError", "TemplateError") for base in node.bases)
        and not node.name.startswith("_")
    }
    drawn = set(re.findall(r"── (\w+)", text_of("docs/api.md")))
    assert drawn == found | {"UserError"}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Lines of a function that are code: no docstring, no blank ones, no comments."""
    documented = ast.get_docstring(function) is not None
    said = function.body[0] if documented else None
    skipped = range(said.lineno, (said.end_lineno or 0) + 1) if said else range(0)
    numbers = range(function.lineno, (function.end_lineno or 0) + 1)
    code = (lines[n - 1].strip() for n in numbers if n not in skipped)
    return sum(1 for line in code if line and not line.startswith("#"))


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_are_short_and_long_functions_say_why(package: str):
    for name, path in modules(package).items():
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        assert len(lines) <= 500, f"{name} has {len(lines)} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                explained = "long because" in (ast.get_docstring(node) or "")
                assert code_lines(node, lines) <= 60 or explained, f"{name}.{node.name}"


def flags_of(command: click.Command) -> set[str]:
    """Every long flag of a command and of those below it."""
    found = {one for option in command.params for one in option.opts + option.secondary_opts}
    for inner in getattr(command, "commands", {}).values():
        found |= flags_of(inner)
    return {one for one in found if one.startswith("--")}


def test_convert_names_no_flag_no_refusal_and_no_tag():
    flags = flags_of(cli)
    assert {"--tensors", "--mtp", "--ollama-create"} <= flags
    named = re.compile("|".join(rf"{re.escape(one)}(?![\w-])" for one in flags))
    other = re.compile(r"another -o|abliterat|refusal direction|refuses? to answer")
    looked_into = modules("convert")
    assert "convert.architectures.families.llama" in looked_into
    for name, path in looked_into.items():
        text = path.read_text()
        for pattern in (named, other):
            found = pattern.search(text)
            assert not found, f"{name} names {found[0]}: let the error carry an option"
        assert not re.search(r"^\s*(from|import) abl_mlx", text, re.MULTILINE), name


def test_an_error_of_convert_is_told_with_the_flag():
    error = UserError(f"{OPTION} x{{}} is no regular expression.", option="tensors")
    assert said(error) == "--tensors x{} is no regular expression."
    assert str(error) == "tensors x{} is no regular expression."
    assert flag("ollama_create") == "--ollama-create"
    assert flag("output") == "-o"
    assert said(UserError("plain")) == str(UserError("plain")) == "plain"


def test_options_that_errors_of_convert_carry_are_flags():
    known = flags_of(cli) | {"-o"}
    for name, path in modules("convert").items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "UserError":
                message = ast.unparse(node.args[0])
                given = [one.value for one in node.keywords if one.arg == "option"]
                options = [one.value for one in given if isinstance(one, ast.Constant)]
                assert all(flag(str(one)) in known for one in options), name
                assert "{OPTION}" not in message or options, f"{name}: {message}"
