"""Text that a program writes between two comments of a Markdown page.

The comments are ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
"""

from __future__ import annotations

from pathlib import Path


def between(page: str, name: str) -> str:
    """The text that a page has between the comments."""
    return page.partition(_begin(name))[2].partition(_end(name))[0]


def replaced(page: str, name: str, text: str) -> str:
    """A page with other text between the comments."""
    before, _, rest = page.partition(_begin(name))
    after = rest.partition(_end(name))[2]
    return f"{before}{_begin(name)}\n\n{text}\n\n{_end(name)}{after}"


def write(path: Path, name: str, text: str) -> None:
    """Put text between the comments of a file."""
    page = path.read_text(encoding="utf-8")
    path.write_text(replaced(page, name, text), encoding="utf-8")


def _begin(name: str) -> str:
    return f"<!-- {name} -->"


def _end(name: str) -> str:
    return f"<!-- end of {name} -->"
