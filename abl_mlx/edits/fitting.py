"""Does a model have the layers, heads and experts that an edit names?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from abl_mlx.models.writers import Writer
from convert.base.errors import UserError


def check_layers(there: set[int], chosen: frozenset[int] | None, given: Mapping[str, int]) -> None:
    """Check that a model has the layers of an edit, and the edit something for all of its own.

    Args:
        there: the layers of the model's writers; its embedding is in layer -1.
        chosen: the layers that are to be edited; None for all.
        given: what the edit has for each layer ("directions", "strengths"), and for how many.

    Raises:
        UserError: when the model has none of the chosen layers, or more than were measured.
    """
    deepest = max(there, default=-1)
    if chosen and deepest >= 0 and not chosen & there:
        raise UserError(
            f"--layers: this model has no weights to edit in layer {min(chosen)}: they are in "
            f"layers {min(there - {-1})} to {deepest}."
        )
    for what, count in given.items():
        if deepest >= count:
            raise UserError(
                f"there are {what} for {count} layers, but the model has a layer {deepest}: they "
                "were measured on another model."
            )


def check_parts(
    writers: Iterable[Writer], what: str, pairs: Iterable[tuple[int, int]] | None
) -> None:
    """Check that a model has the heads or experts that are to be edited.

    Args:
        writers: the model's.
        what: "heads" or "experts".
        pairs: layers and numbers; None for all.

    Raises:
        UserError: naming one that it does not have.
    """
    have = {
        one.layer: one.parts
        for one in writers
        if one.parts and (one.kind == "experts") == (what == "experts")
    }
    for layer, part in sorted(pairs or ()):
        if part >= have.get(layer, 0):
            count = f"{have[layer]} {what}" if layer in have else f"no {what} to edit"
            raise UserError(
                f"--{what} {layer}.{part}: layer {layer} of this model has {count}, counted from 0."
            )
