"""docs/cli.md: the output of `--help` of every command."""

from __future__ import annotations

import click

from abl_mlx.cli.main import cli

#: The width of the help texts in columns, whatever the terminal's width is.
WIDTH = 100


def document() -> str:
    """The whole of docs/cli.md."""
    lines = [
        "# CLI reference",
        "",
        "Generated from `--help`: `python -m tools.regenerate`.",
        "[commands.md](commands.md) has examples.",
        "",
        *_block(_help(cli, "abl-mlx", None)),
    ]
    parent = _context(cli, "abl-mlx", None)
    for name, command in sorted(cli.commands.items()):
        lines += [f"## abl-mlx {name}", "", *_block(_help(command, name, parent))]
    return "\n".join(lines).rstrip() + "\n"


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    return click.Context(command, info_name=name, parent=parent, **settings)


def _help(command: click.Command, name: str, parent: click.Context | None) -> str:
    return command.get_help(_context(command, name, parent))


def _block(text: str) -> list[str]:
    return ["```text", *(line.rstrip() for line in text.splitlines()), "```", ""]
