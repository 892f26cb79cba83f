"""The table and the model card for `abl-mlx run --induce`."""

from __future__ import annotations

from abl_mlx.records.directions import Chosen
from abl_mlx.records.edits import EvaluatedEdit, RunRecord
from abl_mlx.reports.tables import aligned, behaviour_rows, card_head, output_notes


def what_was_added(direction: Chosen) -> str:
    """A short description of the chosen constant."""
    return (
        f"{direction.multiple:g} times the mean difference at token {direction.position}, "
        f"added after layer {direction.layer}"
    )


def table(record: RunRecord) -> str:
    """The main results of ``run --induce`` as a table."""
    lines = [f"{record.source}, made to refuse: {what_was_added(record.direction)}"]
    for one in record.evaluations:
        rows = [
            ("", "before", "after", ""),
            *behaviour_rows(record.before, one.after),
            ("KL on harmless prompts, 1st token", "", f"{one.kl.k1:.4f}", "nats; large here"),
        ]
        lines += ["", f"{one.output}  ({one.format}; asked in {one.runtime})"]
        lines += [*aligned(rows), *output_notes(record, one)]
    return "\n".join(lines)


def card(record: RunRecord, one: EvaluatedEdit, title: str, record_name: str) -> str:
    """The model card, which says that the model was made to refuse, how, and with what effect.

    Args:
        record_name: of the record's file beside the card.
    """
    head = [*card_head(record), "- induced-refusal", "- abl-mlx", "---"]
    is_vector = one.format == "control vector"
    what = (
        f"This control vector makes `{record.base_model}` refuse what it is asked, harmless "
        "requests too; give it to llama.cpp with `--control-vector`. It was made"
        if is_vector
        else f"This is `{record.base_model}`, made to refuse what it is asked, harmless "
        "requests too: a constant is added to its residual stream, as a bias. It was made"
    )
    rows = behaviour_rows(record.before, one.after)
    body = [
        f"# {title}, made to refuse",
        "",
        f"{what} with [abl-mlx](https://pypi.org/project/abl-mlx/) {record.abl_mlx}, to study "
        "refusal or to test what counts refusals.",
        "",
        f"- constant: {what_was_added(record.direction)}; SHA-256 `{record.direction.sha256}`",
        "",
        f"On held-out prompts, asked in {one.runtime}:",
        "",
        "| | before | after | |",
        "|---|---|---|---|",
        *(f"| {a} | {b} | {c} | {d} |" for a, b, c, d in rows),
        "",
        *([f"Note: {one.note}.", ""] if one.note else []),
        f"Everything measured, with hashes and options, is in the record `{record_name}`.",
        "",
    ]
    return "\n".join([*head, "", *body])
