"""Notes: what a reader of an output's figures should know beside them.

A record keeps them under ``note``; every command's table and every card shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def joined(*notes: str | None) -> str | None:
    """Several notes as one; None where there is nothing to say."""
    return "; ".join(filter(None, notes)) or None


def noted(*notes: str | None) -> dict[str, str]:
    """What a record gains by these notes."""
    note = joined(*notes)
    return {} if note is None else {"note": note}


def lines(record: Mapping[str, Any], indent: str = "  ") -> list[str]:
    """The line of a table that shows a record's note, if it has one."""
    return [f"{indent}note: {record['note']}"] if record.get("note") else []
