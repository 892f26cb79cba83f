"""Rows of tables with the figures of scorers."""

from __future__ import annotations

from collections.abc import Mapping

from abl_mlx.records.measurements import Scored


def rows(
    before: Mapping[str, Scored] | None, after: Mapping[str, Scored] | None
) -> list[tuple[str, str, str, str]]:
    """The figures of two models: (name, before, after, note) of each scorer.

    Args:
        before: None where there is one model alone.
    """
    found = []
    for name, scored in (after or {}).items():
        had = (before or {}).get(name)
        note = f"{scored.unit}, {scored.n} prompts; lower is better"
        was = "" if had is None else f"{had.figure:.3f}"
        found.append((f"scorer {name}", was, f"{scored.figure:.3f}", note))
    return found
