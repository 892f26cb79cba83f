"""Tables on stdout, steps on stderr, and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from abl_mlx.behaviour import reply_notes
from abl_mlx.behaviour.kept_refusals import words
from abl_mlx.behaviour.thought_figures import growth
from abl_mlx.choices import Editing
from abl_mlx.inputs.thinking import BOTH, OFF
from abl_mlx.records.directions import Chosen, Selection, TriedEdit
from abl_mlx.records.edits import (
    ApplyRecord,
    ConvertRecord,
    Drafting,
    EvaluatedEdit,
    Leaks,
    MeasureRecord,
    PushRecord,
    RunRecord,
    TensorLeak,
    UndoRecord,
    WrittenEdit,
)
from abl_mlx.records.evaluations import Comparison, Kept, Rate, Refusals, RefusalsInMode
from abl_mlx.records.looks import Changed, DiffRecord, InspectRecord
from abl_mlx.records.measurements import Thoughts
from abl_mlx.reports import (
    cliff_tables,
    condition_tables,
    explain_tables,
    part_tables,
    sae_tables,
    scorer_tables,
)
from abl_mlx.reports.recognition_tables import recognition_rows
from abl_mlx.support import notes
from abl_mlx.support.console import percent
from abl_mlx.support.units import in_bytes, in_words
from convert.base import escape

# What is said of sets of prompts whose refusals are to stay.
_SETS = {"kept": "; to stay", "off_topic": "; that the system message asks for"}


def interval(rate: Rate) -> str:
    """The Wilson 95% interval of a set's refusal rate, and the number of its prompts."""
    low, high = rate.interval
    return f"95% interval {low:.0%} to {high:.0%}, n={rate.n}"


def paired_cells(name: str, one: Comparison) -> tuple[str, str, str, str]:
    """A set's paired difference: (what, points, 95% interval, p)."""
    low, high = (100 * end for end in one.interval)
    return (
        f"refusals, {words(name)} prompts",
        f"{100 * one.difference:+.1f}",
        f"{low:+.1f} to {high:+.1f}",
        f"{one.p:.2g}",
    )


def asked_in(runtime: str, thinking: str | None) -> str:
    """How prompts were asked, for titles; figures of ``both`` name their mode themselves.

    Args:
        thinking: the mode of the figures, or the value of ``--thinking``; None for off.
    """
    where = "over HTTP" if runtime == "server" else f"in {runtime}"
    return f"asked {where}" + ("" if thinking in (None, OFF, BOTH) else f", thinking {thinking}")


def run_table(record: RunRecord) -> str:
    """The main results of a run as a table."""
    lines = [f"{record.source}: {summary_line(record.direction)}"]
    # Of several views, it was judged in one alone.
    if record.direction.single is not None and record.direction.views is None:
        lines.append(f"  {_single_line(record.direction.single)}")
    lines += sae_tables.lines(record.sae)
    for one in record.evaluations:
        asked = asked_in(one.runtime, record.options.prompting.thinking)
        rows = [
            ("", "before", "after", ""),
            *output_rows(record, one),
        ]
        if one.leak is not None:
            rows.append(("leak", "", f"{one.leak.total:.2g}", _leak_words(one.leak)))
        lines += [
            "",
            f"{one.output}  ({one.format}, {_types(one)}; {asked})",
            *aligned(rows),
            *output_notes(record, one),
        ]
    return "\n".join([*lines, *_mtp_lines(record.mtp)])


def output_rows(record: RunRecord, one: EvaluatedEdit) -> list[tuple[str, str, str, str]]:
    """What an output does beside the original: (name, before, after, note) of each figure."""
    rows = [
        *behaviour_rows(record.before, one.after),
        *kept_rows(one.kept),
        ("KL on harmless prompts, 1st token", "", f"{one.kl.k1:.4f}", "nats; 0 = same"),
        ("KL over 32 tokens", "", f"{one.kl.k32:.4f}", "nats a token"),
    ]
    if record.component is not None and one.component is not None:
        before, after = f"{record.component.before:.4f}", f"{one.component:.2g}"
        rows.append(("component |r·h|/|h|, largest", before, after, "over layers and prompts"))
    return rows + scorer_tables.rows(record.scorers, one.scorers)


def output_notes(record: RunRecord, one: EvaluatedEdit) -> list[str]:
    """The notes on an output, and on the replies before and after."""
    said = [
        note
        for behaviour, who in ((record.before, "before"), (one.after, "after"))
        for note in reply_notes.sentences(behaviour, who)
    ]
    return [*notes.lines(one.note), *(f"  note: {note}." for note in said)]


def _leak_words(leak: Leaks) -> str:
    what = "share of the edit lost in writing"
    left = leak.with_left_out
    return what if left is None else f"{what}; {left:.2g} with what is left out"


def _single_line(single: TriedEdit) -> str:
    """A line that says why one direction was not enough."""
    return (
        f"one direction ({summary_line(single)}) would leave {percent(single.refused)} of the "
        "validation prompts opening in the way that sets them apart"
    )


def _mtp_lines(drafting: Drafting | None) -> list[str]:
    """A line on tensors of multi-token prediction, if there are any."""
    if drafting is None:
        return []
    count, edited = drafting.tensors, len(drafting.edited)
    done = (
        f"{edited} of {count} tensors edited"
        if edited
        else f"{count} tensors found and left as they are; --mtp edits them too"
    )
    return [f"multi-token prediction: {done}"]


def _types(one: WrittenEdit) -> str:
    types = ", ".join(one.types or [])
    return types if types.startswith("rank") else f"edited tensors {types}"


def behaviour_rows(
    before: Refusals | None, after: Refusals, more: Mapping[str, str] | None = None
) -> list[tuple[str, str, str, str]]:
    """The rates of two models: (name, before, after, note) of each, mode of thinking after mode.

    Args:
        before: None where there is one model alone.
        more: set -> what is added to its note.
    """
    rows = _mode_rows(before, after, more or {})
    for mode, now in (after.modes or {}).items():
        was = None if before is None else (before.modes or {}).get(mode)
        rows += [
            (f"{name}, thinking {mode}", old, new, note)
            for name, old, new, note in _mode_rows(was, now, more or {})
        ]
    return rows + recognition_rows(before, after)


def _mode_rows(
    before: RefusalsInMode | None, after: RefusalsInMode, more: Mapping[str, str]
) -> list[tuple[str, str, str, str]]:
    was = {} if before is None else before.rates
    rows = [
        (
            f"refusals, {words(name)} prompts",
            percent(was[name].share) if name in was else "",
            percent(now.share),
            interval(now) + _SETS.get(name, "") + more.get(name, ""),
        )
        for name, now in after.rates.items()
    ]
    broken = "" if before is None else percent(before.broken_rate)
    rows.append(("broken replies", broken, percent(after.broken_rate), "empty or looping"))
    if after.expected_answer_rate is not None:
        rows.append(
            (
                "known answers, harmful prompts",
                "" if before is None else percent(before.expected_answer_rate),
                percent(after.expected_answer_rate),
                "exactly what stage 1 taught",
            )
        )
    return rows + _thought_rows(None if before is None else before.thoughts, after.thoughts)


def kept_rows(kept: Mapping[str, Kept] | None) -> list[tuple[str, str, str, str]]:
    """How many of the refusals that are to stay do stay: (name, before, after, note) of a set."""
    rows = []
    for name, one in (kept or {}).items():
        low, high = one.interval
        note = f"95% interval {low:.0%} to {high:.0%}; at least {one.wanted:.0%} are to stay"
        told = percent(one.share) if one.share is not None else ""
        rows.append(
            (
                f"refusals that stay, {words(name)} prompts",
                str(one.refused),
                str(one.kept),
                f"{told}, {note}{'' if one.enough else ': NOT MET'}"
                if told
                else "none is refused as it is",
            )
        )
    return rows


def _thought_rows(
    before: Thoughts | None, after: Thoughts | None
) -> list[tuple[str, str, str, str]]:
    """How long thoughts are, how many do not end, and how many loop."""

    def cell(one: Thoughts | None, name: str) -> str:
        value = None if one is None else getattr(one, name)
        return "" if value is None else f"{value:.0f}"

    if before is None and after is None:
        return []
    longer = growth(before, after)
    note = "those that end" if longer is None else f"those that end; {longer:.2f} times as long"
    return [
        (what, cell(before, name), cell(after, name), note)
        for what, name, note in (
            ("thoughts, mean words", "words", note),
            ("thoughts without an end", "unclosed", "within the longest reply"),
            ("thoughts that loop", "looping", "say the same over and over"),
        )
    ]


def aligned(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """Lines of a table with name, before, after and note."""
    first = max(len(row[0]) for row in rows)
    return [f"  {a:<{first}}  {b:>8}  {c:>8}   {d}".rstrip() for a, b, c, d in rows]


def summary_line(direction: Selection) -> str:
    """A short description of the chosen direction."""
    if direction.method in (None, "given"):
        return "a given direction"
    if isinstance(direction, Chosen) and direction.update is not None:
        return "{}, MLPs of layers {} to {}".format(direction.method, *direction.update.layers)
    parts = [direction.method]
    if direction.features:
        several = "s" if len(direction.features) > 1 else ""
        parts.append(f"feature{several} {', '.join(map(str, direction.features))}")
    if direction.rank is not None:
        parts.append(f"rank {direction.rank}")
    if direction.across is not None:
        parts.append(
            f"across layers {', '.join(map(str, direction.among))}"
            if direction.among
            else f"across all {direction.across}"
        )
    # A direction that `audit` recovered has neither layer nor position.
    layer, position = direction.layer, direction.position
    if direction.orthogonal_to is not None:
        parts.append("orthogonal to what is kept")
    if direction.per_layer and layer is None:
        parts.append("for each layer its own")
    if layer is not None:
        parts.append(f"after layer {layer:g}")
    if position is not None:
        parts.append(f"at token {position}")
    return ", ".join(parts)


def measure_line(record: MeasureRecord) -> str:
    """The record of `abl-mlx measure` as a table."""
    line = f"{record.outputs[0]}: {summary_line(record.direction)} of {record.source}"
    more = condition_tables.condition_lines(record.condition)
    more += explain_tables.lines(record.explained)
    more += cliff_tables.lines(record.cliff)
    more += part_tables.lines(record.direction)
    return "\n".join([line, *notes.lines(record.note), *more, *sae_tables.lines(record.sae)])


def apply_table(record: ApplyRecord) -> str:
    """The record of `abl-mlx apply` as a table with a row for each tensor."""
    lines = []
    for one in record.written:
        lines.append(f"{one.output}  ({one.format})")
        if one.leak is not None:
            left = one.leak.with_left_out
            more = "" if left is None else f"; {left:.5f} with what is left out"
            rows = [_tensor_row(name, each) for name, each in one.leak.tensors.items()]
            lines += _align_columns([_TENSOR_COLUMNS, *rows])
            lines.append(f"{_leak_figures(one.leak)}{more}")
        lines += notes.lines(one.note)
    return "\n".join([*lines, *_mtp_lines(record.mtp)])


def _leak_figures(leak: Leaks) -> str:
    return f"leak {leak.total:.5f}, largest in one tensor {leak.max:.5f}"


_TENSOR_COLUMNS = ("tensor", "type", "bytes changed", "codes changed", "weight error", "leak")


def _tensor_row(
    name: str, leak: TensorLeak | None, change: Changed | None = None
) -> tuple[str, ...]:
    """The row of a tensor; cells that do not apply, or are not known, are empty.

    Args:
        name: the tensor's name.
        leak: the leak of its edit, if it was edited.
        change: its differences between two GGUFs, if these are shown.
    """
    known = [one for one in (change, leak) if one is not None]
    changed = next((one.bytes_changed for one in known if one.bytes_changed is not None), None)
    codes = None if leak is None else leak.codes_changed
    return (
        name,
        next((one.type for one in known if one.type is not None), ""),
        "" if changed is None else f"{changed:,}",
        "" if codes is None else percent(codes),
        "" if leak is None else f"{leak.weight_error:.4f}",
        "" if leak is None else f"{leak.leak:.5f}",
    )


def _align_columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A table with a heading, without columns that are empty in every row."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    cells = [
        [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        for row in zip(*columns, strict=True)
    ]
    return ["  ".join(row).rstrip() for row in cells]


def diff_table(record: DiffRecord) -> str:
    """The record of `abl-mlx diff` as a table."""
    edited = {} if record.leak is None else record.leak.tensors
    rows = [_tensor_row(name, edited.get(name), one) for name, one in record.changed.items()]
    lines = _align_columns([_TENSOR_COLUMNS, *rows])
    lines.append(f"{len(record.changed)} of {record.tensors} tensors differ")
    if record.leak is not None:
        lines.append(f"{_leak_figures(record.leak)}; weight error {record.weight_error:.4f}")
    return "\n".join(lines)


def convert_table(record: ConvertRecord) -> str:
    """The record of `abl-mlx convert` as a table."""
    made = ", ".join(f"{count} × {name}" for name, count in record.tensors.items())
    line = f"{record.output}  ({record.format}, {in_bytes(record.bytes)}): {made}"
    return "\n".join([line, *notes.lines(record.note)])


def push_table(record: PushRecord) -> str:
    """The record of `abl-mlx push` as a table."""
    lines = [f"  {one.name}  {in_bytes(one.bytes)}" for one in record.files]
    total = in_bytes(sum(one.bytes for one in record.files))
    if record.commit is not None:
        return "\n".join([f"{record.output}  ({total})", *lines, record.commit])
    seen = "private" if record.private else "public"
    head = f"{record.output}  ({total}) would go to {record.address}, {seen} if it is new:"
    return "\n".join([head, *lines, "Nothing was uploaded: add --yes to do so."])


def undo_table(record: UndoRecord) -> str:
    """The record of `abl-mlx undo` as a table."""
    lines = []
    for one in record.written:
        lines.append(f"{one.output}  ({one.format})")
        if one.missing is not None:
            lines.append(f"  {one.missing:.2g} of what the edit took is still missing")
    return "\n".join([*lines, f"{record.tensors} tensors, from {record.from_}"])


def _head_words(record: InspectRecord) -> str:
    if not record.tied:
        return "its own weights"
    copies = record.head_copies
    stored = f", and stored as {', '.join(copies)}, which is edited alike" if copies else ""
    return f"tied to the embedding{stored}"


def inspect_table(record: InspectRecord) -> str:
    """The record of `abl-mlx inspect` as a table."""
    edit = record.edit
    rows = [
        ("architecture", record.architecture),
        ("layers", f"{record.layers}, residual stream of {record.width} dimensions"),
        ("parameters", f"{in_words(record.parameters)}, {', '.join(record.dtypes)}"),
        ("quantization", str(record.quantization or "none")),
        ("output head", _head_words(record)),
    ]
    if record.template_fault is not None:
        rows.append(("chat template", f"none that can be used: {record.template_fault}"))
    elif record.template_tail is not None:
        rows.append(("chat template", f"{record.template_tail} tokens after the instruction"))
    if record.runs_in_mlx is not None:
        can = "yes: `run` and `measure` need nothing but this file"
        rows.append(("runs in MLX", can if record.runs_in_mlx else "no: it can be edited only"))
    lines = [record.source, *(f"  {name:<14}  {value}" for name, value in rows)]
    lines.append("  residual writers")
    for writer in record.writers:
        note = ", through a norm's gain" if writer.gain else ""
        note += ", with bias" if writer.bias else ""
        lines.append(f"    {writer.count:>4} × {writer.pattern}  ({writer.kind}{note})")
    lines.append(
        f"  an edit touches {edit.tensors} tensors with {in_words(edit.parameters)} "
        f"parameters ({percent(edit.share)} of the model)"
    )
    return "\n".join([*lines, *(f"  {line}" for line in _mtp_lines(record.mtp))])


def card(
    record: RunRecord | ApplyRecord,
    one: WrittenEdit,
    title: str,
    record_name: str,
    *,
    adapter: bool = False,
) -> str:
    """The model card, which says that the model was edited, how, and with what effect.

    Args:
        record: the record of `run`, or of `apply` (which has no evaluations).
        one: the record's entry about this output.
        title: the source model's name.
        record_name: the name of the record's file beside the card.
        adapter: whether the output is an adapter, which is used together with its base model.
    """
    head = [*card_head(record), "- abliterated", "- abl-mlx", "---"]
    direction, editing = Chosen.of(escape.record(record.direction.json)), record.options.editing
    what = "This is an adapter." if adapter else "This is an edited model."
    base = escape.code(record.base_model)
    does = (
        f"It takes the refusal direction out of what {base} writes, whose files stay "
        "as they are; it fits these very weights alone, and was made"
        if adapter
        else f"Its refusal direction was orthogonalized out of the weights of {base}"
    )
    body = [
        f"# {escape.markdown(title)}, abliterated",
        "",
        f"**{what}** {does} with [abl-mlx](https://pypi.org/project/abl-mlx/) "
        f"{record.abl_mlx}. The model declines less than the original does; what it is used for "
        "is the responsibility of whoever runs it.",
        "",
        f"- direction: {summary_line(direction)}; SHA-256 `{direction.sha256}`",
        f"- {_kind(editing)}; layers {_layers(editing.layers)}; embedding "
        f"{'edited' if one.embedding else 'not edited'}",
    ]
    if one.leak is not None:
        body.append(f"- leak (share of the edit lost in writing): {one.leak.total:.2g}")
    if one.note:
        body.append(f"- note: {escape.line(one.note)}")
    if isinstance(one, EvaluatedEdit) and isinstance(record, RunRecord):
        rows = [*behaviour_rows(record.before, one.after), *kept_rows(one.kept)]
        body += [
            "",
            f"On held-out prompts, {asked_in(one.runtime, record.options.prompting.thinking)}:",
            "",
            "| | before | after | |",
            "|---|---|---|---|",
            *(f"| {a} | {b} | {c} | {d} |" for a, b, c, d in rows),
            f"| KL(original ‖ edited), 1st token, nats | | {one.kl.k1:.4f} | |",
            f"| KL over 32 tokens, nats a token | | {one.kl.k32:.4f} | |",
        ]
    body += [
        "",
        "Everything measured, with hashes and options, is in the record "
        f"{escape.code(record_name)}.",
        "",
    ]
    return "\n".join([*head, "", *body])


def card_head(record: RunRecord | ApplyRecord) -> list[str]:
    """The first lines of a card's front matter: the base model on Hugging Face, if it is known.

    The lines for tags must follow.
    """
    base = record.repository
    return ["---", *([f"base_model: {escape.yaml(base)}"] if base else []), "tags:"]


def _kind(editing: Editing) -> str:
    return "reflection" if editing.kind == "reflect" else f"strength {editing.strength:g}"


def _layers(layers: frozenset[int] | None) -> str:
    return "all" if layers is None else ", ".join(map(str, sorted(layers)))
