"""How much was read of models on Hugging Face, as lines of a table."""

from __future__ import annotations

from collections.abc import Sequence

from abl_mlx.records.looks import PartRead
from abl_mlx.support.console import percent
from abl_mlx.support.units import in_bytes


def lines(parts: Sequence[PartRead] | None) -> list[str]:
    """One line for each model of which parts were read."""
    return [
        f"  read {in_bytes(part.read)} of {part.model}"
        + (f", and {in_bytes(part.kept)} of before" if part.kept else "")
        + f": {percent(part.share)} of its {in_bytes(part.total)} of weights"
        for part in parts or []
    ]
