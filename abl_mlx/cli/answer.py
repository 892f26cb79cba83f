"""What a command prints: the record of what it did, as a table or as one JSON object."""

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
    """What was typed as text: under a locale without UTF-8 Python hands its bytes on in pieces.

    Raises:
        UserError: when it is no UTF-8.
    """
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 at byte {error.start}: type it anew.") from None


@contextmanager
def _stdout_kept_for_results() -> Iterator[None]:
    """Send everything that libraries print to stderr, native code included."""
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
    """Do the work, print its record, and return that."""
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
