"""Charts as plain data, and their SVG.

A `Chart` holds numbers and words. `svg` draws it with classes instead of colours, so that a page's
style sheet makes it light or dark; `sheet` is a file of its own. Everything that comes from outside
is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from convert.base import escape

#: Size of a chart in its own units: so narrow that on a phone the letters stay readable.
WIDTH, HEIGHT = 420.0, 250.0

_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 14.0, 38.0

#: Kinds of marks, in the order in which series take them; a shape each, so that colour is not all.
MARKS = ("circle", "square", "triangle", "diamond", "ring", "cross")


@dataclass(frozen=True)
class Series:
    """The points of one kind in a chart.

    Attributes:
        name: its name in the legend.
        points: (x, y), both finite.
        joined: whether a line connects them.
        faint: whether they are drawn faintly in the background.
        labels: the tooltip of each point; empty for its numbers.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    joined: bool = False
    faint: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A chart of several series.

    Attributes:
        title: its title.
        x, y: the names of the axes, with units.
        marker: a value of x that is marked, and its name.
        log: whether y is logarithmic; points with y of at most 0 are then drawn at the lower edge.
        whole: whether x has only whole numbers, such as layers.
        names: names for values of x, which replace their numbers.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    marker: tuple[float, str] | None = None
    log: bool = False
    whole: bool = False
    names: tuple[tuple[float, str], ...] = ()


def number(value: float) -> str:
    """A number as text, with about four digits."""
    if value == 0:
        return "0"
    size = abs(value)
    text = f"{value:.1e}" if size < 1e-3 or size >= 1e5 else f"{value:.4g}"
    text = text.replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    return text.replace("-", "−")


# --- axes --------------------------------------------------------------------------------------


def ticks(low: float, high: float, most: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most about ``most`` of them."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / most))
    step *= next(f for f in (1, 2, 5, 10, 20) if span / (step * f) <= most)
    if whole:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, first + 50) if k * step <= high + 1e-9 * span]


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Powers of ten from ``low`` to ``high``, themselves powers of ten."""
    first, last = round(math.log10(low)), round(math.log10(high))
    step = max(1, math.ceil((last - first) / most))
    return [10.0**k for k in range(first, last + 1, step)]


@dataclass(frozen=True)
class Scale:
    """The scale of an axis, which maps numbers to places.

    Attributes:
        low, high: the numbers at its ends.
        ticks: the numbers that are written at it.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """The place of a number: 0 at ``low``, 1 at ``high``."""
        if self.log:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def scale(values: Sequence[float], *, log: bool = False, whole: bool = False) -> Scale:
    """A scale that contains all values, with some margin."""
    if log:
        above = [value for value in values if value > 0] or [1.0]
        low = 10.0 ** math.floor(math.log10(min(above)) - 0.05)
        high = 10.0 ** math.ceil(math.log10(max(above)) + 0.05)
        return Scale(low, high, tuple(log_ticks(low, high)), True)
    low, high = min(values), max(values)
    if whole:
        return Scale(low - 0.5, high + 0.5, tuple(ticks(low, high, 8, whole=True)))
    size = max(abs(low), abs(high))
    # For numbers that are nearly equal, ticks with four digits would be equal as well.
    room = 0.06 * (high - low if high - low > 5e-3 * size else size or 1.0)
    low, high = (0.0 if 0 <= low < 0.5 * high else low - room), high + room
    return Scale(low, high, tuple(ticks(low, high)))


def scales(chart: Chart) -> tuple[Scale, Scale]:
    """The scales of a chart's x and y axes."""
    points = [point for one in chart.series for point in one.points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if chart.marker is not None:
        xs.append(chart.marker[0])
    across = scale(xs, whole=chart.whole)
    if chart.names:
        named = dict(chart.names)
        kept = [tick for tick in across.ticks if tick not in named and tick >= 0]
        across = Scale(across.low, across.high, (*sorted(named), *kept))
    return across, scale(ys, log=chart.log)


def tick_text(chart: Chart, value: float) -> str:
    """The text at a tick of the x axis."""
    return dict(chart.names).get(value, number(value))


# --- SVG ---------------------------------------------------------------------------------------


def svg(chart: Chart) -> str:
    """A chart as an SVG element for a page whose style sheet contains `STYLE`."""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-label="{escape.html(chart.title)}">{_inside(chart)}</svg>'
    )


def sheet(charts: Sequence[Chart], title: str) -> str:
    """Several charts, two side by side, as an SVG file of its own, light or dark by the reader's
    choice. A chart whose title is that of the sheet has it once."""
    across, rows = min(2, len(charts)), -(-len(charts) // 2)
    width, height = across * (WIDTH + 20), rows * (HEIGHT + 34) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img" aria-label="{escape.html(title)}">',
        f"<style>{STYLE} text.head{{font-size:15px;font-weight:600}}</style>",
        f'<rect class="paper" width="{width:g}" height="{height:g}"/>',
        f'<text class="head" x="14" y="26">{escape.html(title)}</text>',
    ]
    for index, chart in enumerate(charts):
        x, y = 10 + (index % 2) * (WIDTH + 20), 60 + (index // 2) * (HEIGHT + 34)
        parts.append(f'<g transform="translate({x:g} {y:g})">')
        if chart.title != title:
            parts.append(f'<text class="name" x="6" y="0">{escape.html(chart.title)}</text>')
        parts.append(f"{_inside(chart)}</g>")
    return "".join([*parts, "</svg>\n"])


def _inside(chart: Chart) -> str:
    across, up = scales(chart)
    inner_width, inner_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    shown = [one for one in chart.series if one.name]
    top = _TOP + (15 if len(shown) > 1 else 0)
    inner_height -= top - _TOP

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + across.share(x) * inner_width, top + (1 - up.share(y)) * inner_height

    bottom = HEIGHT - _BOTTOM
    parts = []
    for tick in up.ticks:
        y = at(across.low, tick)[1]
        parts.append(f'<path class="grid" d="M{_LEFT:g} {y:.1f}H{WIDTH - _RIGHT:g}"/>')
        parts.append(_text(_LEFT - 5, y + 3.5, number(tick), "end"))
    for tick in across.ticks:
        x = at(tick, up.ticks[0])[0]
        parts.append(_text(x, bottom + 14, tick_text(chart, tick), "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT:g} {bottom:g}H{WIDTH - _RIGHT:g}"/>')
    parts.append(_text(_LEFT + inner_width / 2, HEIGHT - 6, chart.x, "middle"))
    middle = top + inner_height / 2
    parts.append(
        f'<text transform="translate(11 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape.html(chart.y)}</text>"
    )
    if chart.marker is not None:
        x = at(chart.marker[0], up.ticks[0])[0]
        side = "end" if x > WIDTH - 90 else "start"
        parts.append(f'<path class="marker" d="M{x:.1f} {top:g}V{bottom:g}"/>')
        parts.append(_text(x + (-4 if side == "end" else 4), top + 9, chart.marker[1], side))
    if len(shown) > 1:
        parts.append(_legend(chart.series))
    # Faint series are drawn first, behind the others.
    numbered = sorted(enumerate(chart.series), key=lambda pair: not pair[1].faint)
    parts += [_series(one, index, at) for index, one in numbered]
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape.html(text)}</text>'


def _legend(series: Sequence[Series]) -> str:
    parts, x = [], _LEFT
    for index, one in enumerate(series):
        if not one.name:
            continue
        kind = f"s{index % len(MARKS)}" + (" faint" if one.faint else "")
        parts.append(f'<g class="{kind}">{_mark(MARKS[index % len(MARKS)], x + 4, 9)}</g>')
        parts.append(_text(x + 12, 12.5, one.name, "start"))
        x += 20 + 7.4 * len(one.name)  # letters are larger on phones
    return "".join(parts)


def _series(one: Series, index: int, at: Callable[[float, float], tuple[float, float]]) -> str:
    places = [at(*point) for point in one.points]
    shape = MARKS[index % len(MARKS)]
    parts = [f'<g class="s{index % len(MARKS)}{" faint" if one.faint else ""}">']
    if one.joined and len(places) > 1:
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line" d="M{line}"/>')
    for number_, (place, point) in enumerate(zip(places, one.points, strict=True)):
        label = one.labels[number_] if one.labels else f"{number(point[0])}: {number(point[1])}"
        said = f"{one.name}, {label}" if one.name else label
        parts.append(_mark(shape, *place, said))
    return "".join([*parts, "</g>"])


def _mark(shape: str, x: float, y: float, said: str | None = None) -> str:
    inside = "" if said is None else f"<title>{escape.html(said)}</title>"
    if shape in ("circle", "ring"):
        kind = "hollow" if shape == "ring" else "mark"
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.4">{inside}</circle>'
    outline = {
        "square": "m-3-3h6v6h-6z",
        "triangle": "m0-4 4 7h-8z",
        "diamond": "m0-4.4 4.4 4.4-4.4 4.4-4.4-4.4z",
        "cross": "m-3-3 6 6m0-6-6 6",
    }[shape]
    kind = "hollow" if shape == "cross" else "mark"
    return f'<path class="{kind}" d="M{x:.1f} {y:.1f}{outline}">{inside}</path>'


_LIGHT = (
    "--paper:#fff;--ink:#1c1e21;--soft:#5b6068;--line:#dfe1e5;--marker:#8a6d00;"
    "--s0:#0b62b8;--s1:#b8430b;--s2:#0b7a55;--s3:#8a3fa0;--s4:#6b6b00;--s5:#5b6068;"
)
_DARK = (
    "--paper:#17191d;--ink:#eceef1;--soft:#a5abb5;--line:#33373e;--marker:#e3bd3a;"
    "--s0:#6db3f8;--s1:#ff9a62;--s2:#4fd0a2;--s3:#d79bea;--s4:#d4d46a;--s5:#a5abb5;"
)

#: The style sheet of charts: colours as variables, light and dark, and what is drawn with them.
STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    "svg text{font:11px system-ui,sans-serif;fill:var(--soft)}"
    "svg text.name,svg text.head{fill:var(--ink);font-size:12.5px}"
    ".paper{fill:var(--paper)}"
    ".grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}"
    ".marker{stroke:var(--marker);stroke-width:1.2;stroke-dasharray:4 3}"
    ".line{fill:none;stroke:currentColor;stroke-width:1.8}"
    ".mark{fill:currentColor;fill-opacity:.8}"
    ".hollow{fill:none;stroke:currentColor;stroke-width:1.6}"
    ".faint{opacity:.4}" + "".join(f".s{k}{{color:var(--s{k})}}" for k in range(len(MARKS)))
)
