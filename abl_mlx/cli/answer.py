"""Printing a command's record, as a table or as one JSON object."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from convert.base import escape
from convert.base.errors import UserError


def typed(what: str, text: str) -> str:
    """An argument as text, decoded as UTF-8 even if the locale has another encoding.

    Args:
        what: describes the argument, for the message.
        text: the argument as Python gives it, in which undecodable bytes are lone surrogates.

    Raises:
        UserError: when the argument is not UTF-8.
    """
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 at byte {error.start}: type it anew.") from None


@contextmanager
def _stdout_kept_for_results() -> Iterator[None]:
    """Context manager that sends everything libraries print, native code included, to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def answer(
    as_json: bool, table: str | Callable[[Any], str], work: Callable[..., Any], *args: Any
) -> Any:
    """Call ``work`` with ``args``, print the record that it returns, and return it.

    Args:
        as_json: whether to print one JSON object instead of a table.
        table: the table, or a function that makes it from the record.
        work: the command.
        args: its arguments.
    """
    from abl_mlx.reports import tables
    from abl_mlx.support.strict_json import to_json

    with _stdout_kept_for_results():
        record = work(*args)
    if as_json:
        said = to_json(record)
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        click.echo(said if encoding.lower().startswith("utf") else escape.json_ascii(said))
    else:
        told = record.of(escape.record(record))
        click.echo(table(told) if callable(table) else getattr(tables, table)(told))
    return record
