"""Tables of the attention heads and experts that write most along a direction."""

from __future__ import annotations

from abl_mlx.records.directions import Chosen

#: How many heads or experts a table lists; the record has more.
_SHOWN = 8


def lines(direction: Chosen) -> list[str]:
    """The first heads and experts, if they were ranked."""
    found = []
    for name, what, ranking in (
        ("head", "writes along the direction", direction.heads),
        ("expert", "share of tokens sent to it", direction.experts),
    ):
        if not ranking:
            continue
        found += ["", f"  {name:<10} {what}: harmful, harmless, difference"]
        for one in ranking[:_SHOWN]:
            more = "" if one.stable is None else f"   stable {one.stable:.0%}"
            label = f"{one.layer}.{one.number}"
            found.append(
                f"  {label:<10} {one.harmful:10.4f} {one.harmless:10.4f} "
                f"{one.harmful - one.harmless:10.4f}{more}"
            )
    return found
