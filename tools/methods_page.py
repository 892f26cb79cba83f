"""docs/methods.md: its table of methods, from `abl_mlx.directions.methods`."""

from __future__ import annotations

from pathlib import Path

from abl_mlx.directions.methods import TABLE
from tools import marked

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"


def table() -> str:
    """The methods as a Markdown table."""
    head = ["| `--method` | direction | found again when planted | source |", "|---|---|---|---|"]
    rows = [f"| `{one.name}` | {one.direction} | {one.planted} | {one.source} |" for one in TABLE]
    return "\n".join([*head, *rows])


def document() -> str:
    """The whole of docs/methods.md."""
    return marked.replaced(PAGE.read_text(encoding="utf-8"), "methods", table())
