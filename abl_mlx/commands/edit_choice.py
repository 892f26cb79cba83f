"""Makes the chosen edit: directions with the strength, layers, norm and pin of the flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from abl_mlx.choices import Editing
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.pinning import held_at
from abl_mlx.edits.edit import Edit
from abl_mlx.support.console import say
from convert.base.errors import UserError


def make_edit(
    selected: mx.array,
    editing: Editing,
    *,
    recipe: Mapping[str, Any] | None = None,
    pin: mx.array | None = None,
) -> Edit:
    """The edit that removes directions with the chosen options.

    Args:
        selected: the directions, (k, d) or (L, k, d).
        editing: the chosen options.
        recipe: the result of a search besides the directions: ``profile`` and ``embedding``.
        pin: the components along the directions that the embedding gets, in its units.

    Raises:
        UserError: when flags do not go together.
    """
    recipe = recipe or {}
    if pin is not None and editing.norm != "none":
        raise UserError("--pin and --norm do not go together: leave one of them out.")
    embedding = editing.embedding and bool(recipe.get("embedding", True))
    if pin is not None and selected.ndim == 3:
        raise UserError(
            "--pin holds the same directions in all layers, and these differ by layer: leave it "
            "out."
        )
    if pin is not None and not embedding:
        raise UserError("--pin is written into the embedding: leave --no-embedding out.")
    return Edit(
        selected, editing.strength, editing.layers, embedding, recipe.get("profile"), editing.norm,
        pin,
    )  # fmt: skip


def edit_of(direction: DirectionFile, editing: Editing) -> Edit:
    """The edit that removes a direction file's directions with the chosen options.

    Raises:
        UserError: when flags do not go together, or the file lacks what ``--pin`` needs.
    """
    metadata = direction.metadata
    pin = held_at(
        editing.pin,
        metadata.get("pins"),
        metadata.get("embedding_scale"),
        int(direction.selected.shape[-2]),
    )
    return make_edit(direction.selected, editing, recipe=metadata.get("recipe"), pin=pin)


def warn_of_strength(strength: float) -> None:
    """Warn if an edit overshoots: it multiplies the component by 1 − strength."""
    if strength > 2:
        say(
            f"warning: --strength {strength:g} overshoots: beyond 2 the component returns reversed "
            f"and longer than it was ({strength - 1:.3g} times); 1 removes it"
        )
