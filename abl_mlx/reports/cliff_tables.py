"""The refusal cliff of a model that thinks, as lines of text."""

from __future__ import annotations

from abl_mlx.records.cliffs import RefusalCliff


def lines(found: RefusalCliff | None) -> list[str]:
    """What `measure --refusal-cliff` found; nothing without it."""
    if found is None:
        return []
    heads = ", ".join(f"{one.layer}.{one.head}" for one in found.heads)
    return [
        f"  refusal cliff: a probe gives harmful prompts {found.plateau:.2f} within the last "
        f"{len(found.positions)} tokens of the thought and {found.final:.2f} at its end "
        f"(harmless {found.harmless[-1]:.2f}; accuracy {found.accuracy:.0%})",
        f"  heads that write most against refusal there: {heads} "
        f"({found.suppressed:.0%} of what all heads write against it)"
        if heads
        else "  no head writes against refusal there",
    ]
