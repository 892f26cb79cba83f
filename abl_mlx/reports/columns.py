"""Rows of cells as lines of text."""

from __future__ import annotations

from collections.abc import Container, Sequence


def lines(rows: Sequence[tuple[str, ...]], right: Container[int]) -> list[str]:
    """Indented lines with columns of equal widths.

    Args:
        rows: the cells, as many in each row.
        right: the columns that are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            f"{cell:>{width}}" if number in right else f"{cell:<{width}}"
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
