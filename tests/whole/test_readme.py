"""The README's example runs, and its commands exist."""

import contextlib
import io
import re
import shlex

import click

from abl_mlx.cli.main import cli
from convert.architectures.families import FAMILIES
from tests.support.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_library_example_runs_and_shows_what_it_says():
    (code,) = blocks("python")
    assert len(code.strip().splitlines()) <= 22
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    before, after = printed.getvalue().strip().splitlines()
    assert before.count("I'm sorry") == 3
    assert "I'm sorry" not in after


def test_every_command_and_flag_in_the_readme_exists():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    calls = [part for part in parts if part.startswith("abl-mlx")]
    assert len(calls) >= 7
    for call in calls:
        name, *arguments = shlex.split(call, comments=True)[1:]
        command = cli.commands[name]
        context = command.make_context(name, arguments, resilient_parsing=False)
        assert {"model", "first", "source"} & context.params.keys()
    for flag in set(re.findall(r"`(--[a-z-]+)`", README)):
        options = [
            option
            for command in cli.commands.values()
            for parameter in command.params
            if isinstance(parameter, click.Option)
            for option in parameter.opts
        ]
        assert flag in options


def test_architectures_that_run_from_a_gguf_are_listed():
    (named,) = re.findall(r"Architectures that run this way: (.*?)\. On tiny", README, re.DOTALL)
    named = re.sub(r"\(.*?\)", "", named.replace("\n", " "))
    assert sorted(name.strip() for name in named.split(",")) == sorted(FAMILIES)
