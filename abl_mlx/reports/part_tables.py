"""Tables of the attention heads and experts that write most along a direction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from abl_mlx.records.directions import Chosen, RankedPart
from abl_mlx.reports.page import Section, Table

#: How many heads or experts a table in a terminal lists; the record and the page have more.
_SHOWN = 8

_HEADS = "writes along the direction"
_EXPERTS = "share of tokens sent to it"


def lines(direction: Chosen) -> list[str]:
    """The first heads and experts, if they were ranked."""
    found = []
    for name, what, ranking in _rankings(direction):
        found += ["", f"  {name:<10} {what}: harmful, harmless, difference"]
        for one in ranking[:_SHOWN]:
            label, *numbers = _cells(one)
            more = "" if one.stable is None else f"   stable {one.stable:.0%}"
            found.append(f"  {label:<10} {' '.join(f'{cell:>10}' for cell in numbers)}{more}")
    return found


def section(direction: Chosen) -> Section | None:
    """All heads and experts that were ranked, for a page; None if none were."""
    tables = []
    for name, what, ranking in _rankings(direction):
        stable = ("stable",) if ranking[0].stable is not None else ()
        head = (f"{name}: {what}", "harmful", "harmless", "difference", *stable)
        rows = tuple(
            (*_cells(one), *([f"{one.stable:.0%}"] if one.stable is not None else []))
            for one in ranking
        )
        tables.append(Table(head, rows, tuple(range(1, len(head)))))
    if not tables:
        return None
    about = (
        "Layer and number, both counted from 0; the largest difference of harmful and harmless "
        "prompts first."
    )
    return Section("Heads and experts", (about,), tables=tuple(tables))


def _rankings(direction: Chosen) -> Iterator[tuple[str, str, Sequence[RankedPart]]]:
    """(name, what its figures are, ranking) of heads and of experts, as far as they were ranked."""
    if direction.heads:
        yield "head", _HEADS, direction.heads
    if direction.experts:
        yield "expert", _EXPERTS, direction.experts


def _cells(one: RankedPart) -> tuple[str, str, str, str]:
    return (
        f"{one.layer}.{one.number}",
        f"{one.harmful:.4f}",
        f"{one.harmless:.4f}",
        f"{one.harmful - one.harmless:.4f}",
    )
