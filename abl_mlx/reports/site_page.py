"""The page of `abl-mlx publish`: its files, and what it says of the edit."""

from __future__ import annotations

import lzma
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abl_mlx.records.edits import ApplyRecord, EvaluatedEdit, PublishRecord, RunRecord, WrittenEdit
from abl_mlx.reports import induce_tables
from abl_mlx.reports.tables import asked_in, behaviour_rows, kept_rows, summary_line
from abl_mlx.support import notes
from abl_mlx.support.units import in_bytes

STATIC = Path(__file__).with_name("site")

#: The headers with which browsers allow several threads. Cloudflare Pages and Netlify read them
#: from this file; without them one thread is used.
_HEADERS = """/*
  Cross-Origin-Opener-Policy: same-origin
  Cross-Origin-Embedder-Policy: require-corp
"""


def write_files(folder: Path) -> None:
    """Write the files of a page that are the same for every model."""
    for place in sorted(STATIC.iterdir()):
        if place.suffix == ".xz":
            with lzma.open(place) as packed, open(folder / place.stem, "wb") as out:
                shutil.copyfileobj(packed, out)
        else:
            shutil.copyfile(place, folder / place.name)
    (folder / "_headers").write_text(_HEADERS, encoding="utf-8")


def said(
    record: RunRecord | ApplyRecord, one: WrittenEdit, title: str, licence: str | None
) -> dict[str, Any]:
    """What a page says of an edit: its title, a sentence, and two tables.

    Args:
        one: the record's entry about the edited model.
        title: the name of the original.
        licence: of the original; None where its file names none.
    """
    induced = isinstance(record, RunRecord) and record.induced
    direction, editing = record.direction, record.options.editing
    facts = {"original": title, "its licence": licence or "its file names none"}
    if induced:
        facts["constant"] = induce_tables.what_was_added(direction)
    else:
        layers = "all" if editing.layers is None else ", ".join(map(str, sorted(editing.layers)))
        facts |= {
            "direction": summary_line(direction), "kind": editing.kind,
            "strength": f"{editing.strength:g}", "layers": layers,
            "embedding": "edited" if one.embedding else "not edited",
        }  # fmt: skip
    if one.leak is not None:
        facts["leak"] = f"{one.leak.total:.2g}, the share of the edit lost in writing"
    if record.hashes.direction:
        facts["SHA-256 of the direction"] = record.hashes.direction
    figures: list[Sequence[str]] = []
    if isinstance(record, RunRecord) and isinstance(one, EvaluatedEdit):
        facts["replies"] = asked_in(one.runtime, record.options.prompting.thinking)
        figures += [*behaviour_rows(record.before, one.after), *kept_rows(one.kept)]
        figures.append(("KL on harmless prompts, 1st token", "", f"{one.kl.k1:.4f}", "nats"))
    sentence = (
        f"{title}, made to refuse what it is asked, harmless requests too: a constant is added to "
        "its residual stream."
        if induced
        else f"The refusal direction of {title} was taken out of its weights: the edited model "
        "declines less than the original does."
    )
    return {
        "title": f"{title}, {'made to refuse' if induced else 'abliterated'}",
        "said": sentence,
        "facts": list(facts.items()),
        "figures": figures,
    }


def licence_of(metadata: Mapping[str, Any]) -> str | None:
    """The licence that the metadata of a GGUF name, with its address."""
    found = [metadata.get(f"general.license{end}") for end in ("", ".name", ".link")]
    return ", ".join(str(one) for one in found if one) or None


def table(record: PublishRecord) -> str:
    """The record of `abl-mlx publish` as a table."""
    lines = [f"  {one.name}  {in_bytes(one.bytes)}" for one in record.files]
    head = f"{record.output}  ({in_bytes(sum(one.bytes for one in record.files))})"
    look = f"look at it: python3 -m http.server -d {shlex.quote(record.output)}"
    return "\n".join([head, *lines, *notes.lines(record.note), look])
