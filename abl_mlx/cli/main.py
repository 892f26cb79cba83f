"""The entry point of the command line: no logic, and no heavy import at the top."""

from __future__ import annotations

import io
import os
import sys
import traceback
from pathlib import Path

import click

import abl_mlx
import convert
from abl_mlx import __version__
from abl_mlx.cli import (  # noqa: F401  (they register themselves)
    edit_commands,
    look_commands,
    serve_command,
)
from abl_mlx.cli.group import cli
from abl_mlx.support import interrupts
from convert.base import escape

__all__ = ["TRACEBACK", "cli", "main"]


def main() -> None:
    """Entry point of the console script."""
    # Otherwise transformers warns that PyTorch is missing, which this program does not need.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        # Characters that the locale's encoding lacks are escaped instead of raising an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    interrupts.listen()
    try:
        cli()
    except Exception as error:  # a bug of this program
        if os.environ.get(TRACEBACK):
            raise
        click.echo(escape.line(_internal_error(error)), err=True)
        sys.exit(1)


#: If this environment variable is set, a bug of this program ends in Python's traceback.
TRACEBACK = "ABL_MLX_TRACEBACK"


def _internal_error(error: Exception) -> str:
    """One sentence that says where the bug is, and asks the user to report it."""
    ours = tuple(str(Path(package.__file__ or "").parent) for package in (abl_mlx, convert))
    frames = traceback.extract_tb(error.__traceback__)
    inside = [one for one in frames if one.filename.startswith(ours)] or list(frames)
    last = inside[-1]
    return (
        f"Error: internal error: {type(error).__name__} at {last.filename}:{last.lineno} "
        f"({escape.shortened(str(error), 200)}). This is a fault of abl-mlx {__version__}: please "
        f"report it with the command, and with what it prints when {TRACEBACK}=1 is set."
    )


if __name__ == "__main__":
    main()
