"""Makes the chosen edit: directions with the strength, layers, norm and pin of the flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from abl_mlx.choices import REFLECTION, Editing, Writing
from abl_mlx.directions import parts
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.pinning import held_at
from abl_mlx.edits.edit import Edit, Pairs
from abl_mlx.edits.routing import Routing
from abl_mlx.edits.update import Factors, Update
from abl_mlx.models.writers import Writer
from abl_mlx.support.console import say
from abl_mlx.support.flags import first_given, not_together
from convert.base.errors import UsageError, UserError


def make_edit(
    selected: mx.array,
    editing: Editing,
    *,
    recipe: Mapping[str, Any] | None = None,
    pin: mx.array | None = None,
    heads: Pairs | None = None,
    experts: Pairs | None = None,
) -> Edit:
    """The edit that removes directions with the chosen options.

    Args:
        selected: the directions, (k, d) or (L, k, d).
        editing: the chosen options.
        recipe: what a direction file says of the edit besides the directions: ``profile``,
            ``embedding``, ``strength`` (a factor of the chosen one) and ``norm``.
        pin: the components along the directions that the embedding gets, in its units.
        heads, experts: as of `Edit`; None also where ``editing`` names some that are not known yet.

    Raises:
        UserError: when flags do not go together.
    """
    recipe = recipe or {} if editing.kind == "project" else {}
    editing = with_norm(editing, recipe)
    if pin is not None and editing.norm != "none":
        raise UserError(not_together("--pin", "--norm"))
    embedding = editing.reaches_embedding and recipe.get("embedding") is not False
    if pin is not None and selected.ndim == 3:
        raise UserError(
            "--pin holds the same directions in all layers, and these differ by layer: leave it "
            "out."
        )
    if pin is not None and not embedding:
        raise UserError("--pin is written into the embedding: leave --no-embedding out.")
    # A reflection has one strength everywhere.
    strength = editing.alpha * float(recipe.get("strength") or 1.0)
    # Routers have no directions, and these are tried on what writes to the stream.
    places = "writers" if editing.edit == "routers" else editing.edit
    return Edit(
        selected, strength, editing.layers, embedding, recipe.get("profile"), editing.norm, pin,
        places, heads, experts,
    )  # fmt: skip


def with_norm(editing: Editing, recipe: Mapping[str, Any] | None) -> Editing:
    """The options with the norms that a direction file says are kept, if the flags name none."""
    kept = (recipe or {}).get("norm")
    plain = (editing.norm, editing.kind, editing.edit) == ("none", "project", "writers")
    return replace(editing, norm=kept) if kept and plain else editing


def edit_of(direction: DirectionFile, editing: Editing) -> Edit | Update | Routing:
    """The edit of a direction file with the chosen options.

    It removes directions, adds updates, or lowers the routing of experts.

    Raises:
        UserError: when flags do not go together, or the file lacks what ``--pin`` needs.
    """
    metadata = direction.metadata
    if direction.updates is not None:
        return update_of(direction.updates, editing)
    if editing.edit == "routers":
        _, experts = parts_of(direction, editing)
        return Routing(experts, editing.strength, editing.layers)
    pin = held_at(
        editing.pin,
        metadata.get("pins"),
        metadata.get("embedding_scale"),
        int(direction.selected.shape[-2]),
    )
    heads, experts = parts_of(direction, editing)
    return make_edit(
        direction.selected, editing, recipe=metadata.get("recipe"), pin=pin, heads=heads,
        experts=experts,
    )  # fmt: skip


def check_layers_and_parts(width: int, writers: Sequence[Writer], editing: Editing) -> None:
    """Check, before a direction is known, that the model has the layers, heads and experts.

    Args:
        width: of the residual stream.
        writers: what is edited, of the model.
        editing: the chosen options.

    Raises:
        UserError: naming what it does not have; or when the edit would change nothing.
    """
    heads, experts = (
        None if text is None or parts.is_count(text) else parts.chosen(text, None, flag)
        for flag, text in (("--heads", editing.heads), ("--experts", editing.experts))
    )
    any_direction = mx.ones((1, width))
    make_edit(any_direction, editing, heads=heads, experts=experts).chosen(writers)


def parts_of(direction: DirectionFile, editing: Editing) -> tuple[Pairs | None, Pairs | None]:
    """The heads and the experts that the flags name; None for all.

    Raises:
        UserError: when they are of a ranking that the direction file lacks.
    """
    summary = direction.metadata.get("summary", {})
    named = []
    for flag, text in (("heads", editing.heads), ("experts", editing.experts)):
        pairs = None if text is None else parts.chosen(text, summary.get(flag), f"--{flag}")
        named.append(pairs)
    return named[0], named[1]


def update_of(updates: Mapping[int, Factors], editing: Editing) -> Update:
    """The edit that adds a direction file's updates with the chosen options.

    Raises:
        UsageError: naming a flag that has no meaning for it.
    """
    flag = first_given((
        ("--layers", editing.layers), ("--norm", editing.norm != "none"), ("--pin", editing.pin),
        ("--kind", editing.kind != "project"), ("--edit", editing.edit != "writers"),
    ))  # fmt: skip
    if flag is not None:
        raise UsageError(
            f"{flag} is for the removal of directions, and --method rome changes what MLPs do "
            "with some inputs: leave it out."
        )
    return Update(dict(updates), editing.strength)


def _check_routers(editing: Editing, of_writers: tuple[tuple[str, object], ...]) -> None:
    if editing.experts is None:
        raise UsageError(
            "--edit routers lowers the routing of experts: name them by --experts N or --experts "
            "LAYER.EXPERT."
        )
    other = first_given((
        ("--heads", editing.heads), ("--pin", editing.pin),
        (f"--norm {editing.norm}", editing.norm != "none"), *of_writers,
    ))  # fmt: skip
    if other is not None:
        raise UsageError(not_together("--edit routers", other))


def check(editing: Editing, writing: Writing | None = None) -> None:
    """Check that the flags of an edit go together.

    An edit that overshoots, because it multiplies the component by 1 − strength, is warned of.

    Raises:
        UsageError: naming flags that do not go together.
    """
    if editing.kind == "reflect":
        if editing.strength != 1:
            raise UsageError(
                f"--kind reflect reverses the component, which is strength {REFLECTION:g}: leave "
                "--strength out."
            )
        if editing.norm != "none":
            raise UsageError(
                "--kind reflect keeps the norms of columns, and no others can be kept with it: "
                "leave --norm out."
            )
        if editing.pin is not None:
            raise UsageError(
                "--kind reflect leaves the embedding alone, into which --pin is written: leave "
                "one of them out."
            )
        if editing.edit != "writers":
            raise UsageError(
                "--kind reflect mirrors what is written to the stream: leave it out, or --edit "
                f"{editing.edit}."
            )
    writing = writing or Writing()
    of_writers = (("--mtp", writing.mtp), ("--tensors", writing.tensors))
    if editing.edit == "routers":
        _check_routers(editing, of_writers)
    elif editing.by_parts:
        flag = "--heads" if editing.heads is not None else "--experts"
        other = first_given((
            ("--pin", editing.pin), (f"--norm {editing.norm}", editing.norm != "none"),
            (f"--edit {editing.edit}", editing.edit != "writers"), *of_writers,
        ))  # fmt: skip
        if other is not None:
            raise UsageError(not_together(flag, other))
    if editing.edit == "readers" and (other := first_given((("--pin", editing.pin), *of_writers))):
        raise UsageError(
            f"{other} is about weights that write to the residual stream: leave it out, or "
            "--edit readers."
        )
    if (strength := editing.strength) > 2 and editing.edit != "routers":
        say(
            f"warning: --strength {strength:g} overshoots: beyond 2 the component returns reversed "
            f"and longer than it was ({strength - 1:.3g} times); 1 removes it"
        )
