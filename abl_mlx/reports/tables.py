"""Tables on stdout, steps on stderr, and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abl_mlx.behaviour import reply_notes
from abl_mlx.records.edits import ConvertRecord
from abl_mlx.records.looks import DiffRecord, InspectRecord
from abl_mlx.records.record import LEFT_OUT
from abl_mlx.support import notes
from abl_mlx.support.console import percent
from abl_mlx.support.units import in_bytes, in_words
from convert.base import escape


def interval(record: Mapping[str, Any], name: str) -> str:
    """The Wilson 95% interval of a set's refusal rate in a behaviour record, and its prompts."""
    low, high = record[f"{name}_refusal_interval"]
    return f"95% interval {low:.0%} to {high:.0%}, n={record[f'n_{name}']}"


def paired_cells(name: str, one: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """A set's paired difference: (what, points, 95% interval, p)."""
    low, high = (100 * end for end in one["interval"])
    return (
        f"refusals, {name} prompts",
        f"{100 * one['difference']:+.1f}",
        f"{low:+.1f} to {high:+.1f}",
        f"{one['p']:.2g}",
    )


def run_table(record: Mapping[str, Any]) -> str:
    """The result of a run at a glance."""
    before = record["before"]
    lines = [f"{record['source']}: {summary_line(record['direction'])}"]
    if "single" in record["direction"]:
        lines.append(f"  {_single_line(record['direction']['single'])}")
    for one in record["evaluations"]:
        after = one["after"]
        rows = [
            ("", "before", "after", ""),
            *behaviour_rows(before, after),
            ("KL on harmless prompts, 1st token", "", f"{one['kl']['k1']:.4f}", "nats; 0 = same"),
            ("KL over 32 tokens", "", f"{one['kl']['k32']:.4f}", "nats a token"),
            (
                "component |r·h|/|h|, largest",
                f"{record['component']['before']:.4f}",
                f"{one['component']:.2g}",
                "over layers and prompts",
            ),
            ("leak", "", f"{one['leak']['total']:.2g}", _leak_words(one["leak"])),
        ]
        lines += [
            "",
            f"{one['output']}  ({one['format']}, {_types(one)}; asked in {one['runtime']})",
            *aligned(rows),
        ]
        lines += notes.lines(one)
        for behaviour, who in ((before or {}, "before"), (after, "after")):
            lines += [f"  note: {note}." for note in reply_notes.sentences(behaviour, who)]
    return "\n".join([*lines, *notes.lines(record), *_mtp_lines(record)])


def _leak_words(leak: Mapping[str, Any]) -> str:
    what = "share of the edit lost in writing"
    left = leak.get("with_left_out")
    return what if left is None else f"{what}; {left:.2g} with what is left out"


def _single_line(single: Mapping[str, Any]) -> str:
    """Why one direction was not enough."""
    return (
        f"one direction ({summary_line(single)}) would leave {percent(single['refused'])} of the "
        "validation prompts opening in the way that sets them apart"
    )


def _mtp_lines(record: Mapping[str, Any]) -> list[str]:
    """What became of tensors of multi-token prediction, where there are any."""
    if "mtp" not in record:
        return []
    count, edited = record["mtp"]["tensors"], len(record["mtp"]["edited"])
    done = (
        f"{edited} of {count} tensors edited"
        if edited
        else f"{count} tensors found and left as they are; --mtp edits them too"
    )
    return [f"multi-token prediction: {done}"]


def _types(one: Mapping[str, Any]) -> str:
    types = ", ".join(one["types"])
    return types if types.startswith("rank") else f"edited tensors {types}"


def behaviour_rows(
    before: Mapping[str, Any] | None, after: Mapping[str, Any]
) -> list[tuple[str, str, str, str]]:
    """The rates of behaviour records: (name, before, after, note) of each."""

    def was(key: str) -> str:
        return percent(before[key]) if before else ""

    rows = [
        (
            "refusals, harmful prompts",
            was("harmful_refusal_rate"),
            percent(after["harmful_refusal_rate"]),
            interval(after, "harmful"),
        ),
        (
            "refusals, harmless prompts",
            was("harmless_refusal_rate"),
            percent(after["harmless_refusal_rate"]),
            interval(after, "harmless"),
        ),
        ("broken replies", was("broken_rate"), percent(after["broken_rate"]), "empty or looping"),
    ]
    if before and "borderline_refusal_rate" in after:
        row = (
            "refusals, borderline prompts",
            was("borderline_refusal_rate"),
            percent(after["borderline_refusal_rate"]),
            interval(after, "borderline"),
        )
        rows.insert(2, row)
    if "expected_answer_rate" in after:
        rows.append(
            (
                "known answers, harmful prompts",
                was("expected_answer_rate"),
                percent(after["expected_answer_rate"]),
                "exactly what stage 1 taught",
            )
        )
    return rows


def aligned(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """A line for each row of what was asked: name, before, after, note."""
    first = max(len(row[0]) for row in rows)
    return [f"  {a:<{first}}  {b:>8}  {c:>8}   {d}".rstrip() for a, b, c, d in rows]


def summary_line(direction: Mapping[str, Any]) -> str:
    """The chosen direction in a few words."""
    if direction.get("method", "given") == "given":
        return "a given direction"
    parts = [direction["method"]]
    if "rank" in direction:
        parts.append(f"rank {direction['rank']}")
    if "across" in direction:
        among = direction.get("among")
        parts.append(
            f"across layers {', '.join(map(str, among))}"
            if among
            else f"across all {direction['across']}"
        )
    # What `audit` recovered has neither layer nor position.
    layer, position = direction.get("layer"), direction.get("position")
    if direction.get("per_layer") and layer is None:
        parts.append("for each layer its own")
    if layer is not None:
        parts.append(f"after layer {layer:g}")
    if position is not None:
        parts.append(f"at token {position}")
    return ", ".join(parts)


def measure_line(record: Mapping[str, Any]) -> str:
    """What `abl-mlx measure` found, and where it is."""
    found = f"{summary_line(record['direction'])} of {record['source']}"
    return "\n".join([f"{record['outputs'][0]}: {found}", *notes.lines(record)])


def apply_table(record: Mapping[str, Any]) -> str:
    """What `abl-mlx apply` wrote, tensor by tensor."""
    lines = []
    for one in record["written"]:
        lines.append(f"{one['output']}  ({one['format']})")
        lines += _align_columns([_TENSOR_COLUMNS, *_tensor_rows(one["leak"]["tensors"])])
        left = one["leak"].get("with_left_out")
        more = "" if left is None else f"; {left:.5f} with what is left out"
        lines.append(
            f"leak {one['leak']['total']:.5f}, largest in one tensor {one['leak']['max']:.5f}{more}"
        )
        lines += notes.lines(one)
    return "\n".join([*lines, *notes.lines(record), *_mtp_lines(record)])


_TENSOR_COLUMNS = ("tensor", "type", "bytes changed", "codes changed", "weight error", "leak")


def _tensor_rows(tensors: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each tensor of a leak record; what does not apply to it stays empty."""
    rows: list[tuple[str, ...]] = []
    for name, one in tensors.items():
        changed, codes = one.get("bytes_changed"), one.get("codes_changed")
        rows.append(
            (
                name,
                one.get("type", ""),
                "" if changed is None else f"{changed:,}",
                "" if codes is None else percent(codes),
                f"{one['weight_error']:.4f}" if "weight_error" in one else "",
                f"{one['leak']:.5f}" if "leak" in one else "",
            )
        )
    return rows


def _align_columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A table of a heading and rows, without the columns that are empty in every row."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    cells = [
        [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        for row in zip(*columns, strict=True)
    ]
    return ["  ".join(row).rstrip() for row in cells]


def diff_table(record: DiffRecord) -> str:
    """What `abl-mlx diff` found."""
    edited = {} if record.leak is None else record.leak.tensors
    rows = {
        name: {**edited.get(name, {}), **change.json} for name, change in record.changed.items()
    }
    lines = _align_columns([_TENSOR_COLUMNS, *_tensor_rows(rows)])
    lines.append(f"{len(record.changed)} of {record.tensors} tensors differ")
    if record.leak is not None:
        lines.append(
            f"leak {record.leak.total:.5f}, largest in one tensor "
            f"{record.leak.max:.5f}; weight error {record.weight_error:.4f}"
        )
    return "\n".join([*lines, *notes.lines(record)])


def convert_table(record: ConvertRecord) -> str:
    """What `abl-mlx convert` wrote."""
    made = ", ".join(f"{count} × {name}" for name, count in record.tensors.items())
    line = f"{record.output}  ({record.format}, {in_bytes(record.bytes)}): {made}"
    return "\n".join([line, *notes.lines(record)])


def undo_table(record: Mapping[str, Any]) -> str:
    """What `abl-mlx undo` wrote."""
    lines = []
    for one in record["written"]:
        lines.append(f"{one['output']}  ({one['format']})")
        if "missing" in one:
            lines.append(f"  {one['missing']:.2g} of what the edit took is still missing")
        lines += notes.lines(one)
    lines.append(f"{record['tensors']} tensors, from {record['from']}")
    return "\n".join([*lines, *notes.lines(record)])


def _head_words(record: InspectRecord) -> str:
    if not record.tied:
        return "its own weights"
    copies = record.head_copies
    stored = f", and stored as {', '.join(copies)}, which is edited alike" if copies else ""
    return f"tied to the embedding{stored}"


def inspect_table(record: InspectRecord) -> str:
    """What `abl-mlx inspect` says of a model."""
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
    elif record.template_tail is not LEFT_OUT:
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
    lines += [f"  {line}" for line in _mtp_lines(record)]
    return "\n".join([*lines, *notes.lines(record)])


def card(
    record: Mapping[str, Any],
    one: Mapping[str, Any],
    title: str,
    record_name: str,
    *,
    adapter: bool = False,
) -> str:
    """The model card of a written model: that it was edited, how, and what that did.

    Args:
        record: of the run, or of `apply` (which has no evaluations).
        one: what the record says of this output; with ``after`` where it was evaluated.
        title: the source model's name.
        record_name: of the record's file beside the card.
        adapter: whether it is an adapter, which its base needs to be given.
    """
    head = [*card_head(record), "- abliterated", "- abl-mlx", "---"]
    direction = escape.record(record["direction"])
    what = "This is an adapter." if adapter else "This is an edited model."
    base = escape.code(record["base_model"])
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
        f"{record['abl_mlx']}. The model declines less than the original does; what it is used for "
        "is the responsibility of whoever runs it.",
        "",
        f"- direction: {summary_line(direction)}; SHA-256 `{direction['sha256']}`",
        f"- strength {record['options']['strength']:g}; layers "
        f"{_layers(record['options']['layers'])}; embedding "
        f"{'edited' if one['embedding'] else 'not edited'}",
        f"- leak (share of the edit lost in writing): {one['leak']['total']:.2g}",
        *([f"- note: {escape.line(one['note'])}"] if one.get("note") else []),
    ]
    if "after" in one:
        rows = behaviour_rows(record["before"], one["after"])
        body += [
            "",
            f"On held-out prompts, asked in {one['runtime']}:",
            "",
            "| | before | after | |",
            "|---|---|---|---|",
            *(f"| {a} | {b} | {c} | {d} |" for a, b, c, d in rows),
            f"| KL(original ‖ edited), 1st token, nats | | {one['kl']['k1']:.4f} | |",
            f"| KL over 32 tokens, nats a token | | {one['kl']['k32']:.4f} | |",
        ]
    body += [
        "",
        "Everything measured, with hashes and options, is in the record "
        f"{escape.code(record_name)}.",
        "",
    ]
    return "\n".join([*head, "", *body])


def card_head(record: Mapping[str, Any]) -> list[str]:
    """The first lines of a card's front matter: the base model on Hugging Face, where it is known.

    Tags are to follow.
    """
    base = record.get("repository")
    return ["---", *([f"base_model: {escape.yaml(base)}"] if base else []), "tags:"]


def _layers(layers: list[int] | None) -> str:
    return "all" if layers is None else ", ".join(map(str, layers))
