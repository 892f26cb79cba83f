"""docs/methods.md: its table of methods, from `abl_mlx.directions.methods`."""

from __future__ import annotations

from pathlib import Path

from abl_mlx.directions.methods import TABLE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"

BEGIN, END = "<!-- methods: begin -->\n", "<!-- methods: end -->\n"


def table() -> str:
    """The methods as a Markdown table."""
    head = "| `--method` | direction | found again when planted | source |\n|---|---|---|---|\n"
    return head + "".join(
        f"| `{one.name}` | {one.direction} | {one.planted} | {one.source} |\n" for one in TABLE
    )


def replaced(page: str, begin: str, end: str, text: str) -> str:
    """A page with new text between two marks, which are separate lines."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def document() -> str:
    """The whole of docs/methods.md."""
    return replaced(PAGE.read_text(encoding="utf-8"), BEGIN, END, table())
