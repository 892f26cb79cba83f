"""Pages to read in a browser: what `run`, `eval`, `audit` and `show` found, each in one file.

A page is first plain data (`Page`, `Section`, `Table`, charts), made from the record alone, then
HTML through one template, which escapes everything. It has no script, loads nothing, and its policy
(CSP) forbids it to. What a record does not have gets no section.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from abl_mlx import __version__
from abl_mlx.behaviour import reply_notes
from abl_mlx.reports import charts, figures
from abl_mlx.reports.charts import Chart
from abl_mlx.reports.replay import command_line
from abl_mlx.reports.tables import interval, paired_cells, summary_line
from abl_mlx.support.console import percent
from convert.base import escape
from convert.base.atomic import new_file

Record = Mapping[str, Any]
Cell = str | Markup


# --- what a page holds -------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A figure that is seen first; ``good`` colours it, None does not."""

    name: str
    value: str
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each its name.

    Attributes:
        right: columns with numbers.
        folded: where it is hidden until asked for, under these words.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    right: tuple[int, ...] = ()
    folded: str = ""


@dataclass(frozen=True)
class GridCell:
    """A value in a grid: its shade's class, and what is said of it when pointed at."""

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
    """What was said to a prompt: (who, reply) each."""

    set: str
    prompt: str
    replies: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; one with nothing under it is left out."""

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
        """Whether there is anything but words of introduction."""
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


# --- to HTML -----------------------------------------------------------------------------------

#: Shades of a grid on either side of zero.
SHADES = 10

_FOLDER = Path(__file__).parent / "templates"


def _shown(value: Any) -> Any:
    """A value for a page, without what turns letters around or cannot be seen."""
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
    """Write a page; it appears whole or not at all."""
    with new_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


def of_replies(lines: Sequence[Record]) -> Section:
    """Replies that were asked for, in the form of `--save-replies`."""
    replies = tuple(
        Reply(
            line["set"],
            line["prompt"],
            tuple((w, r) for w, r in line.items() if w not in ("set", "prompt") and r is not None),
        )
        for line in lines
    )
    return Section("Replies", replies=replies)


def _rate(count: int, total: int) -> Markup:
    """A share as numbers and a bar."""
    width = 100 * count / total if total else 0
    return Markup(
        '{}/{} <svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        '<rect width="{:.1f}" height="12"/></svg>'
    ).format(count, total, width)


def _code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)


_SETS = ("harmful", "harmless", "borderline")


def _behaviour_rows(before: Record | None, after: Record) -> list[tuple[Cell, ...]]:
    """Rates of two models beside each other: (name, before, after, note)."""

    def was(key: str) -> str:
        return "" if before is None or key not in before else percent(before[key])

    rows: list[tuple[Cell, ...]] = []
    for name in _SETS:
        key = f"{name}_refusal_rate"
        if key in after:
            label = f"refusals, {name} prompts"
            rows.append((label, was(key), percent(after[key]), interval(after, name)))
    if "broken_rate" in after:
        note = "empty or looping replies"
        rows.append(("broken", was("broken_rate"), percent(after["broken_rate"]), note))
    key = "expected_answer_rate"
    if key in after:
        rows.append(("known answers, harmful prompts", was(key), percent(after[key]), ""))
    return rows


def _categories(before: Record | None, after: Record, names: tuple[str, str]) -> Section:
    """Refusals by category, of one or of two models."""
    tables = []
    for name in _SETS:
        now = after.get("categories", {}).get(name, {})
        was = (before or {}).get("categories", {}).get(name, {})
        if not now or set(now) == {""}:
            continue
        rows = []
        for category, one in now.items():
            row: list[Cell] = [category or "no category"]
            if was:
                old = was.get(category)
                row.append("" if old is None else _rate(old["refused"], old["n"]))
            row.append(_rate(one["refused"], one["n"]))
            row.append(str(one["broken"]) if one["broken"] else "")
            rows.append(tuple(row))
        head = (
            (f"{name} prompts", *names, "broken")
            if was
            else (f"{name} prompts", names[1], "broken")
        )
        tables.append(Table(head, tuple(rows), tuple(range(1, len(head)))))
    return Section("Refusals by category", ("Refused of asked.",), tables=tuple(tables))


def _pairs(title: str, values: Record, head: tuple[str, str], folded: str = "") -> Table:
    rows = tuple((name, _code(str(value))) for name, value in values.items())
    return Table(head, rows, folded=folded or title)


def _hash_rows(hashes: Record) -> dict[str, str]:
    rows: dict[str, str] = {}
    for name, value in hashes.items():
        if isinstance(value, Mapping):
            rows |= {f"{name}: {file}": str(digest) for file, digest in value.items()}
        else:
            rows[name] = str(value)
    return rows


def _reproduce(command: str, record: Record, hashes: Record) -> Section:
    tables = [_pairs("SHA-256", hashes, ("of", "SHA-256"), "Hashes (SHA-256)")] if hashes else []
    if record.get("options"):
        shown = {k: v for k, v in record["options"].items() if v is not None}
        tables.append(_pairs("Options", shown, ("option", "value"), "All options"))
    if record.get("seconds"):
        rows = tuple((step, f"{seconds:.1f}") for step, seconds in record["seconds"].items())
        tables.append(Table(("step", "seconds"), rows, (1,), "Time taken"))
    return Section(
        "To reproduce",
        (f"With abl-mlx {record['abl_mlx']}:",),
        tables=tuple(tables),
        code=command,
    )


# --- run ---------------------------------------------------------------------------------------


def run_page(record: Record, replies: Sequence[Record] = ()) -> str:
    """The page of a run.

    Args:
        record: of `run.run`.
        replies: lines of `evaluate.reply_lines`, where they were asked for.
    """
    from abl_mlx.choices import Options

    before, evaluations = record["before"], record["evaluations"]
    first = evaluations[0]
    scores, cloud = figures.layer_charts(record), figures.cloud_chart(record)
    options = record["options"]
    induced = ("--induce",) if record.get("induced") else ()
    command = command_line(
        ("run", record["source"], *induced), options, Options().record(), record["outputs"]
    )
    summary = Section(
        "Before and after",
        tables=tuple(_output_table(record, one) for one in evaluations),
        lines=(
            *(f"{one['output']}: {one['note']}" for one in evaluations if one.get("note")),
            *reply_notes.sentences(record.get("before") or {}, "before"),
            *(
                f"{one['output']}: {note}"
                for one in evaluations
                for note in reply_notes.sentences(one["after"])
            ),
            *([record["note"]] if record.get("note") else []),
        ),
    )
    sections = [
        summary,
        Section("By layer", (_layers_text(record),), charts=tuple(scores)),
        Section(
            "The two clouds",
            (
                "Held-out prompts of both sets, as the model holds them. Across: how much of the "
                "direction; up: along which they differ most besides.",
            ),
            charts=() if cloud is None else (cloud,),
        ),
        *(
            _categories(before, one["after"], ("before", _named("after", one, evaluations)))
            for one in evaluations
        ),
        *(_leak_section(one, len(evaluations) > 1) for one in evaluations),
        _trials(record.get("trials", [])),
        of_replies(replies),
        _reproduce(command, record, _hash_rows(record.get("hashes", {}))),
    ]
    did = "Induced refusals in" if record.get("induced") else "Edited"
    return html(
        Page(
            f"{did} with abl-mlx",
            record["source"],
            (summary_line(record["direction"]),),
            tuple(_run_tiles(record, before, first)),
            tuple(sections),
        )
    )


def _named(word: str, one: Record, evaluations: Sequence[Record]) -> str:
    return word if len(evaluations) == 1 else f"{word}: {one['output']}"


def _run_tiles(record: Record, before: Record, first: Record) -> list[Tile]:
    after, tiles = first["after"], []
    for name in _SETS[:2]:
        key = f"{name}_refusal_rate"
        value = f"{percent(before[key])} → {percent(after[key])}"
        tiles.append(Tile(f"refusals, {name} prompts", value, interval(after, name)))
    if "kl" in first:
        note = "nats, first reply token, harmless prompts; 0 = same"
        tiles.append(Tile("KL", f"{first['kl']['k1']:.4f}", note))
    if "leak" in first:
        limit = record["options"].get("max_leak")
        total = first["leak"]["total"]
        note = "share of the edit lost in writing"
        good = None if limit is None else total <= limit
        tiles.append(Tile("leak", f"{total:.2g}", note, good))
    return tiles


def _output_table(record: Record, one: Record) -> Table:
    rows = _behaviour_rows(record["before"], one["after"])
    if "kl" in one:
        rows.append(
            ("KL on harmless prompts, 1st token", "", f"{one['kl']['k1']:.4f}", "nats; 0 = same")
        )
        rows.append(("KL over 32 tokens", "", f"{one['kl']['k32']:.4f}", "nats a token"))
    if "component" in one and "component" in record:
        rows.append(
            (
                "component |r·h|/|h|, largest",
                f"{record['component']['before']:.4f}",
                f"{one['component']:.2g}",
                "over layers and prompts",
            )
        )
    if "leak" in one:
        note = "share of the edit lost in writing"
        rows.append(("leak", "", f"{one['leak']['total']:.2g}", note))
    about = [one.get("format", ""), *one.get("types", []), f"asked in {one['runtime']}"]
    title = f"{one['output']} ({', '.join(filter(None, about))})"
    return Table((title, "before", "after", ""), tuple(rows), (1, 2))


def _layers_text(record: Record) -> str:
    direction = record["direction"]
    text = f"Chosen: {summary_line(direction)}"
    if "chosen_by" in direction:
        text += f" ({direction['chosen_by']})"
    scores = direction.get("refusal_score")
    if scores:
        text += (
            f". Refusal scores of the unedited model: harmful {scores['harmful']:+.2f}, harmless "
            f"{scores['harmless']:+.2f}; harmful with the direction removed "
            f"{scores['harmful_ablated']:+.2f}"
        )
    return f"{text}. Layers count from 0."


def _leak_section(one: Record, several: bool) -> Section:
    tensors = one.get("leak", {}).get("tensors", {})
    rows = []
    for name, each in tensors.items():
        changed = each.get("bytes_changed")
        rows.append(
            (
                name,
                each.get("type", ""),
                "" if changed is None else f"{changed:,}",
                f"{each['weight_error']:.4f}" if "weight_error" in each else "",
                f"{each['leak']:.5f}" if "leak" in each else "",
            )
        )
    head = ("tensor", "type", "bytes changed", "weight error", "leak")
    used = [k for k in range(len(head)) if k == 0 or any(row[k] for row in rows)]
    table = Table(
        tuple(head[k] for k in used),
        tuple(tuple(row[k] for k in used) for row in rows),
        tuple(place for place, k in enumerate(used) if k >= 2),
        f"All {len(rows)} tensors",
    )
    title = "Leak by tensor" + (f": {one['output']}" if several else "")
    total = one.get("leak", {}).get("total")
    text = "Read back from the written bytes. " + (
        ""
        if total is None
        else f"In all {total:.2g}, at most {one['leak']['max']:.2g} in a tensor."
    )
    return Section(
        title, (text,), charts=tuple(figures.leak_charts(tensors)), tables=(table,) if rows else ()
    )


def _trials(trials: Sequence[Record]) -> Section:
    rows = tuple(
        (
            summary_line({"method": "edit", **one}),
            f"{one['refusal']:+.2f}" if "refusal" in one else "",
            percent(one["refused"]) if "refused" in one else "",
            f"{one['kl']:.4f}" if "kl" in one else "",
            str(one.get("dropped", "")),
        )
        for one in trials
    )
    head = ("edit", "refusal score", "refused", "KL", "dropped because")
    return Section(
        "What else was tried",
        ("By the first reply tokens to validation prompts.",),
        tables=(Table(head, rows, (1, 2, 3), f"{len(rows)} edits"),),
    )


# --- eval --------------------------------------------------------------------------------------


def eval_page(record: Record, command: str, replies: Sequence[Record] = ()) -> str:
    """The page of an evaluation.

    Args:
        record: of `evaluate_model.evaluate_model`.
        command: that makes it again.
        replies: in the form of `--save-replies`, where they were asked for.
    """
    hashes = {f"{name} prompts": one["sha256"] for name, one in record.get("prompts", {}).items()}
    tiles = [
        Tile(f"refusals, {name} prompts", percent(record[f"{name}_refusal_rate"]),
             interval(record, name))
        for name in _SETS if f"{name}_refusal_rate" in record
    ]  # fmt: skip
    if "gate" in record:
        passed = record["gate"]["passed"]
        tiles.insert(0, Tile("limits", "met" if passed else "not met", good=passed))
    lead = [_asked(record)]
    if "baseline" in record:
        lead.append(f"Baseline: {record['baseline']['source']}, {_asked(record['baseline'])}")
    sections = (
        *eval_sections(record),
        of_replies(replies),
        _reproduce(command, record, hashes),
    )
    return html(Page("Evaluated with abl-mlx", _name(record), tuple(lead), tuple(tiles), sections))


def eval_sections(record: Record) -> tuple[Section, ...]:
    """What an evaluation says, also inside an audit."""
    baseline = record.get("baseline")
    rows = _behaviour_rows(baseline, record)
    if "kl" in record:
        kl = record["kl"]
        at_least = "" if kl.get("kind", "exact") == "exact" else f", at least: {kl['kind']} tokens"
        rows.append(("KL on harmless prompts, 1st token", "", f"{kl['k1']:.4f}", f"nats{at_least}"))
        rows.append(("KL over 32 tokens", "", f"{kl['k32']:.4f}", f"nats a token{at_least}"))
    if "perplexity" in record:
        one, was = record["perplexity"], (baseline or {}).get("perplexity")
        old = "" if was is None else f"{was['perplexity']:.2f}"
        note = f"{one['tokens']} tokens of Alice in Wonderland"
        rows.append(("perplexity", old, f"{one['perplexity']:.2f}", note))
    if "capability" in record:
        one, was = record["capability"], (baseline or {}).get("capability")
        old = "" if was is None else f"{was['right']}/{was['n']}"
        note = ", ".join(f"{k} {v['right']}/{v['n']}" for k, v in one["groups"].items())
        rows.append(("capability check", old, f"{one['right']}/{one['n']}", note))
    for task, found in record.get("lm_eval", {}).items():
        for key, value in found.items():
            if isinstance(value, float) and "stderr" not in key:
                rows.append((f"lm-eval {task}", "", f"{value:.3f}", key.removesuffix(",none")))
    if baseline is None:
        rows = [(row[0], *row[2:]) for row in rows]
    head = ("", "target", "") if baseline is None else ("", "baseline", "target", "")
    right = (1,) if baseline is None else (1, 2)
    return (
        Section("Summary", tables=(Table(head, tuple(rows), right),), lines=_notes(record)),
        Section("Limits", lines=_limits(record)),
        _paired(record.get("paired", {})),
        _categories(baseline, record, ("baseline", "target" if baseline else "refused")),
    )


def _name(record: Record) -> str:
    return f"{record['source']} {record['model']}" if record.get("model") else str(record["source"])


def _asked(record: Record) -> str:
    where = "over HTTP" if record["runtime"] == "server" else f"in {record['runtime']}"
    tokens = f", replies of at most {record['max_tokens']} tokens" if "max_tokens" in record else ""
    return f"asked {where}, judged by {record.get('judge', 'markers')}{tokens}"


def _notes(record: Record) -> tuple[str, ...]:
    lines = []
    for one, who in ((record, ""), (record.get("baseline") or {}, "of the baseline")):
        if one.get("note"):
            lines.append(one["note"])
        lines += reply_notes.sentences(one, who)
        if "judging" in one:
            judging = one["judging"]
            lines.append(
                f"{judging['unparsed']} of {judging['asked']} {f'verdicts {who}'.rstrip()} could "
                "not be read and are in no rate"
            )
    return tuple(lines)


def _limits(record: Record) -> tuple[str, ...]:
    return tuple(
        f"{'met' if one['passed'] else 'NOT MET'}: {one['name']}: {one['sentence']}"
        for one in record.get("gate", {}).get("checks", [])
    )


def _paired(paired: Record) -> Section:
    rows = []
    for name, one in paired.items():
        rows.append((*paired_cells(name, one), str(one["lost"]), str(one["gained"])))
    head = (
        "target − baseline", "points", "95% interval", "p", "baseline alone", "target alone",
    )  # fmt: skip
    return Section(
        "Against the baseline, prompt by prompt",
        ("McNemar's exact test on the same prompts.",),
        tables=(Table(head, tuple(rows), (1, 2, 3, 4, 5)),),
    )


# --- audit -------------------------------------------------------------------------------------


def audit_page(record: Record, command: str) -> str:
    """The page of an audit.

    Args:
        record: of `audit.audit`.
        command: that makes it again.
    """
    weights, behaviour = record["weights"], record.get("behaviour") or {}
    verdict = record["verdict"]
    good = {"edited": False, "not edited": True}.get(verdict)
    tiles = [Tile("verdict", verdict, good=good)]
    if weights.get("strength") is not None:
        tiles.append(Tile("strength", f"about {weights['strength']:.2f}"))
    if record.get("layers"):
        tiles.append(Tile("layers", ", ".join(map(str, record["layers"]))))
    if record.get("direction_cosine") is not None:
        note = "of the recovered direction with the given one"
        tiles.append(Tile("|cos|", f"{record['direction_cosine']:.3f}", note))
    rows = tuple(
        (name, *(_cell(one.get(key)) for key in _WRITER_KEYS))
        for name, one in weights.get("writers", {}).items()
    )
    used = [0, *(k for k in range(1, len(_WRITER_KEYS) + 1) if any(row[k] for row in rows))]
    head = ("writer", *(key.replace("_", " ") for key in _WRITER_KEYS))
    table = Table(
        tuple(head[k] for k in used),
        tuple(tuple(row[k] for k in used) for row in rows),
        tuple(range(1, len(used))),
        f"All {len(rows)} residual writers",
    )
    says = [f"“{one['text']}” in its {one['place']}" for one in record.get("mentions", [])]
    label = record.get("label") or {}
    sections: list[Section] = [
        Section("Evidence", lines=tuple(record["evidence"])),
        Section(
            "The residual writers",
            charts=tuple(figures.audit_charts(weights)),
            tables=(table,) if rows else (),
        ),
        Section(
            "What the files say of themselves",
            lines=tuple(says),
            tables=(_pairs("label", label, ("key", "value"), "What abl-mlx wrote"),)
            if label
            else (),
        ),
    ]
    if "not_asked" in behaviour:
        sections.append(Section("Behaviour", lines=(f"not asked: {behaviour['not_asked']}",)))
    elif behaviour:
        sections += eval_sections(behaviour)
    sections.append(_reproduce(command, record, record.get("hashes", {})))
    lead = (f"Against the base {record['base']}",) if "base" in record else ()
    return html(Page("Audited with abl-mlx", record["source"], lead, tuple(tiles), tuple(sections)))


_WRITER_KEYS = ("type", "energy", "of_mean", "relative_difference", "strength", "resemblance")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return charts.number(float(value)) if isinstance(value, int | float) else str(value)


# --- show --------------------------------------------------------------------------------------


def show_page(record: Record) -> str:
    """The page of `abl-mlx show`: a prompt's tokens by layer, before and after the edit.

    Args:
        record: of `show.show`: ``tokens`` (T), ``before`` and ``after`` (L, T).
    """
    values = {"before": record["before"], "after": record["after"]}
    most = max((abs(v) for rows in values.values() for row in rows for v in row), default=0.0)
    most = most or 1.0
    grids = tuple(_grid(name, rows, record["tokens"], most) for name, rows in values.items())
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
        (_token(token), *(f"{row[t]:+.5f}" for row in record["before"]))
        for t, token in enumerate(record["tokens"])
    )
    head = ("token", *(f"layer {layer}" for layer in range(len(record["before"]))))
    numbers = Table(head, rows, tuple(range(1, len(head))), "The numbers before the edit")
    sections = (
        Section("By layer and token", (text,), tables=(numbers,), grids=grids, legend=legend),
        Section("The direction", code=f"{summary_line(record['direction'])}\n"
                                      f"SHA-256 {record['direction']['sha256']}"),
    )  # fmt: skip
    lead = (f"“{record['prompt']}”",)
    return html(Page("Shown with abl-mlx", record["source"], lead, tiles, sections))


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
    """The class of a value in units of the largest."""
    step = min(SHADES, round(abs(share) * SHADES))
    return "p0" if step == 0 else f"{'p' if share > 0 else 'n'}{step}"


def _token(token: str) -> str:
    """A token with its blanks made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
