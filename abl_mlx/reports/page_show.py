"""The page of `abl-mlx show`: each token's component along the direction, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from abl_mlx.records.looks import ShownSae, ShowRecord
from abl_mlx.reports import part_tables, sae_tables
from abl_mlx.reports.page import (
    SHADES,
    Grid,
    GridCell,
    GridRow,
    Page,
    Section,
    Table,
    Tile,
    html,
)
from abl_mlx.reports.page_parts import reproduce
from abl_mlx.reports.tables import summary_line


def show_page(record: ShowRecord, command: str = "") -> str:
    """The page of `abl-mlx show`: a prompt's tokens by layer, before and after the edit.

    Args:
        record: the record of `show.show`: ``tokens`` (T), ``before`` and ``after`` (L, T).
        command: the command line that makes it again.
    """
    values = {"before": record.before, "after": record.after}
    most = max((abs(v) for rows in values.values() for row in rows for v in row), default=0.0)
    most = most or 1.0
    grids = tuple(_grid(name, rows, record.tokens, most) for name, rows in values.items())
    legend = tuple(
        GridCell(_shade(share), f"{share * most:+.2f}") for share in (-1, -0.5, 0, 0.5, 1)
    )
    text = (
        "How much of the direction the residual stream holds at each token (down) after each layer "
        "(across): r·h/|h|, the cosine of the two. Point at a cell, or tap it, for its number."
    )
    largest = {
        name: max((v for row in rows for v in row), key=abs, default=0.0)
        for name, rows in values.items()
    }
    tiles = tuple(Tile(f"largest {name}", f"{value:+.4f}") for name, value in largest.items())
    rows = tuple(
        (_token(token), *(f"{row[t]:+.5f}" for row in record.before))
        for t, token in enumerate(record.tokens)
    )
    head = ("token", *(f"layer {layer}" for layer in range(len(record.before))))
    numbers = Table(head, rows, tuple(range(1, len(head))), "The numbers before the edit")
    sections: tuple[Section, ...] = (
        Section("By layer and token", (text,), tables=(numbers,), grids=grids, legend=legend),
        Section(
            "The direction",
            code=f"{summary_line(record.direction)}\nSHA-256 {record.direction.sha256}",
        ),
    )
    if record.sae is not None:
        sections += (_features(record.sae, record.tokens),)
    if (ranked := part_tables.section(record.direction)) is not None:
        sections += (ranked,)
    if command:
        sections += (reproduce(command, record.abl_mlx, {}),)
    lead = (f"“{record.prompt}”",)
    return html(Page("Shown with abl-mlx", record.source, lead, tiles, sections))


def _features(found: ShownSae, tokens: Sequence[str]) -> Section:
    head = ("feature", "cos with r", *map(_token, tokens))
    rows = tuple(
        (str(one.feature), f"{one.cosine:+.2f}", *(f"{value:.2f}" for value in one.activations))
        for one in found.features
    )
    about = f"{sae_tables.title(found)}: activations by token."
    table = Table(head, rows, tuple(range(1, len(head))))
    return Section("Features of the autoencoder", (about,), tables=(table,))


def _grid(
    title: str, values: Sequence[Sequence[float]], tokens: Sequence[str], most: float
) -> Grid:
    rows = []
    for t, token in enumerate(tokens):
        cells = tuple(
            GridCell(_shade(row[t] / most), f"layer {layer}, {_token(token)}: {row[t]:+.4f}")
            for layer, row in enumerate(values)
        )
        rows.append(GridRow(_token(token), cells))
    return Grid(title, tuple(range(len(values))), tuple(rows))


def _shade(share: float) -> str:
    """The CSS class for a value, by its ratio to the largest value."""
    step = min(SHADES, round(abs(share) * SHADES))
    return "p0" if step == 0 else f"{'p' if share > 0 else 'n'}{step}"


def _token(token: str) -> str:
    """A token with visible signs for white space."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
