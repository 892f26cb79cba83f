"""Pages: their elements, and rendering a page as one HTML file.

A page is first plain data (`Page`, `Section`, `Table`, charts), made from the record alone, then
HTML through one template, which escapes everything. It has no script, loads nothing, and its policy
(CSP) forbids it to. What a record does not have gets no section.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from abl_mlx import __version__
from abl_mlx.reports import charts
from abl_mlx.reports.charts import Chart
from convert.base import escape
from convert.base.atomic import new_file

Cell = str | Markup


@dataclass(frozen=True)
class Tile:
    """A number at the top of a page; ``good`` chooses its colour, None leaves it plain."""

    name: str
    value: str
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Table:
    """A table, whose rows have their name in the first cell.

    Attributes:
        right: the columns with numbers, which are aligned to the right.
        folded: if given, the table is folded under this heading until the reader opens it.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    right: tuple[int, ...] = ()
    folded: str = ""


@dataclass(frozen=True)
class GridCell:
    """A value in a grid: the CSS class of its shade, and its tooltip."""

    shade: str
    text: str


@dataclass(frozen=True)
class GridRow:
    """A token and its cells, one for each layer."""

    name: str
    cells: tuple[GridCell, ...]


@dataclass(frozen=True)
class Grid:
    """Values by token (rows) and layer (columns)."""

    title: str
    layers: tuple[int, ...]
    rows: tuple[GridRow, ...]


@dataclass(frozen=True)
class Reply:
    """A prompt with its replies, each as (who, reply)."""

    set: str
    prompt: str
    replies: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """A heading with its content; a section without content is left out."""

    title: str
    texts: tuple[Cell, ...] = ()
    lines: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    grids: tuple[Grid, ...] = ()
    legend: tuple[GridCell, ...] = ()
    code: str = ""
    replies: tuple[Reply, ...] = ()

    @property
    def filled(self) -> bool:
        """Whether the section has more than introductory text."""
        tables = any(table.rows for table in self.tables)
        return bool(self.lines or self.charts or tables or self.grids or self.code or self.replies)


@dataclass(frozen=True)
class Page:
    """A page: the summary first, then sections."""

    kind: str
    title: str
    lead: tuple[str, ...]
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]


#: Shades of a grid on either side of zero.
SHADES = 10


_FOLDER = Path(__file__).parent / "templates"


def _shown(value: Any) -> Any:
    """A value for a page, with bidirectional controls and invisible characters escaped."""
    return escape.block(value) if type(value) is str else value


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    environment.filters["svg"] = lambda chart: Markup(charts.svg(chart))
    return environment


@cache
def style() -> str:
    """The style sheet of all pages."""
    shades = ["p0{background:var(--zero)}"]
    for side, color in (("p", "positive"), ("n", "negative")):
        for k in range(1, SHADES + 1):
            mixed = f"color-mix(in oklab,var(--{color}) {100 * k // SHADES}%,var(--zero))"
            shades.append(f"{side}{k}{{background:{mixed}}}")
    rules = "".join(f".{rule}" for rule in shades)
    return f"{charts.STYLE}\n{(_FOLDER / 'page.css').read_text(encoding='utf-8')}{rules}"


def html(page: Page) -> str:
    """The page as one HTML file."""
    sheet = style()
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    filled = tuple(section for section in page.sections if section.filled)
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            page=Page(page.kind, page.title, page.lead, page.tiles, filled),
            style=Markup(sheet),
            style_hash=Markup(f"sha256-{digest}"),
            version=__version__,
        )
    )


def write(path: Path, text: str) -> None:
    """Write a page; the file appears complete or not at all."""
    with new_file(path) as staged:
        staged.write_text(text, encoding="utf-8")
