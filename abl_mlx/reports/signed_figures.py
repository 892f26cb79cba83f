"""Signed figures of a model, and a block of Markdown with them for its model card."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abl_mlx.records.edits import RunRecord
from abl_mlx.records.evaluations import AskedPrompts, Divergence, EvalRecord, Refusals
from abl_mlx.reports.tables import behaviour_rows
from convert.base import escape


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a signed record says of a model.

    Attributes:
        after: the model's refusal rates.
        before: those of the model that it is compared with, if there is one.
        other: that model's name.
        other_files: its files -> SHA-256, as far as they are known.
        edited: whether the model is an edit of that model.
        kl: KL from that model.
        prompts: set -> number and hash of its prompts, as far as they are known.
    """

    after: Refusals
    before: Refusals | None
    other: str | None
    other_files: dict[str, str]
    edited: bool
    kl: Divergence | None
    prompts: dict[str, AskedPrompts]

    @classmethod
    def of_eval(cls, record: EvalRecord) -> Figures:
        """The figures of `eval`, compared with its baseline."""
        baseline = record.baseline
        return cls(
            after=record,
            before=baseline,
            other=None if baseline is None else baseline.source,
            other_files={},
            edited=False,
            kl=record.kl,
            prompts=record.prompts,
        )

    @classmethod
    def of_run(cls, record: RunRecord, output: str) -> Figures:
        """The figures of one output of `run`, compared with the model that was edited.

        Raises:
            KeyError: when the record has no such output.
        """
        one = {Path(one.output).name: one for one in record.evaluations}[output]
        return cls(
            after=one.after,
            before=record.before,
            other=record.base_model,
            other_files=record.hashes.source,
            edited=True,
            kl=one.kl,
            prompts={},
        )


@dataclass(frozen=True, kw_only=True)
class Signed:
    """Figures from evidence whose signature was checked.

    Attributes:
        model: the model's name.
        files: its files -> SHA-256; none of a server.
        version, command: of abl-mlx, and its command that measured.
        figures: the figures.
        evidence, evidence_sha256: the name and the hash of the file with the evidence.
        key_sha256: the hash of the public key in PEM.
    """

    model: str
    files: dict[str, str]
    version: str
    command: str
    figures: Figures
    evidence: str
    evidence_sha256: str
    key_sha256: str


def card(signed: Signed) -> str:
    """The block for a model card: the figures, the files, and how to check them."""
    figures = signed.figures
    rows = [
        ("", figures.other or "", "this model", ""),
        *behaviour_rows(figures.before, figures.after),
    ]
    if figures.kl is not None:
        rows.append(("KL on harmless prompts, 1st token", "", f"{figures.kl.k1:.4f}", "nats"))
        rows.append(("KL over 32 tokens", "", f"{figures.kl.k32:.4f}", "nats a token"))
    head, *table = [
        _row([escape.markdown(cell) for cell in (row if figures.before else (row[0], *row[2:]))])
        for row in rows
    ]
    lines = [
        "## Signed figures",
        "",
        f"Of {escape.code(signed.model)}, measured by `abl-mlx {escape.line(signed.command)}` "
        f"{escape.markdown(signed.version)}:",
        "",
        head,
        "|---" * (head.count(" | ") + 1) + "|",
        *table,
        "",
        f"They are signed in {escape.code(signed.evidence)} (SHA-256 "
        f"`{signed.evidence_sha256}`), with the key whose public half in PEM has the SHA-256 "
        f"`{signed.key_sha256}`. To check the signature, and that your files are the measured "
        "ones:",
        "",
        "```sh",
        f"abl-mlx verify {shlex.quote(signed.evidence)} --key PUBLIC.pem --model MODEL",
        "```",
    ]
    if signed.files:
        lines += ["", "| file | SHA-256 |", "|---|---|"]
        lines += [_row([escape.code(name), f"`{one}`"]) for name, one in signed.files.items()]
    return "\n".join([*lines, ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
