"""The root command, which turns errors into messages and exit codes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from abl_mlx import __version__
from abl_mlx.support import ranks
from abl_mlx.support.flags import said
from abl_mlx.support.signatures import BadSignature
from convert.base import atomic, escape, scratch
from convert.base.errors import UsageError, UserError

#: The commands whose work the processes of ``mlx.launch`` share out.
_SHARED = "run", "measure", "apply", "audit"


class _Misuse(click.ClickException):
    """A `UsageError` as click shows it."""

    exit_code = 2


class _Unsigned(click.ClickException):
    """Something that should be signed and is not: a limit that is not met."""

    exit_code = 3


class Group(click.Group):
    """Command group that prints a `UserError` as one sentence.

    The exit code is 2 if flags were used wrongly, else 1.
    """

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        found = super().resolve_command(ctx, args)
        if ranks.size() > 1 and found[0] not in _SHARED:
            raise click.UsageError(
                f"`abl-mlx {found[0]}` runs in one process: leave mlx.launch out. The commands "
                f"that several processes share out are {', '.join(_SHARED)}."
            )
        return found

    def invoke(self, ctx: click.Context) -> Any:
        with _shown(), ranks.together(), _shown(), atomic.claims():
            scratch.sweep()
            return super().invoke(ctx)


@contextmanager
def _shown() -> Iterator[None]:
    """Context manager that turns errors which users can mend into messages."""
    try:
        yield
    except UserError as error:
        kinds = {UsageError: _Misuse, BadSignature: _Unsigned}
        kind = next((k for e, k in kinds.items() if isinstance(error, e)), click.ClickException)
        raise kind(escape.line(said(error))) from None
    except OSError as error:
        if error.filename is None:
            raise
        told = f"{os.fsdecode(error.filename)}: {error.strerror}."
        raise click.ClickException(escape.line(told)) from None
    except (MemoryError, RuntimeError) as error:
        # MLX on a GPU raises a RuntimeError: "[metal::malloc] Attempting to allocate ...".
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise click.ClickException(
            "not enough memory: choose a smaller model, or a smaller --batch-size."
        ) from None


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="abl-mlx")
def cli() -> None:
    """Find, remove and measure the refusal direction of a local chat model.

    MODEL is `demo` (bundled, works offline), a folder in MLX or Hugging Face form, a .gguf file, a
    Hugging Face id such as mlx-community/SomeModel, a GGUF there (owner/repo:Q4_K_M or
    hf:owner/repo/file.gguf), or a model in Ollama's store (ollama:NAME).

    \b
    Try it:   abl-mlx run demo -o demo-edited
    """
