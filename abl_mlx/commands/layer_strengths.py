"""Strengths of each layer for the chosen edit: a few steps by default, or learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abl_mlx.choices import Measuring
from abl_mlx.directions import methods
from abl_mlx.directions.learning import Learned, learned
from abl_mlx.directions.trial import Trial
from abl_mlx.directions.trimming import Trimmed, trimmed
from abl_mlx.edits.edit import Edit
from convert.base.errors import UsageError

#: Why the strengths are what they are, for the record.
BY_TRIMMING = "strengths of each layer by gradients of both"
BY_LEARNING = "strengths of each layer learned by gradients"


def check(how: Measuring) -> None:
    """Check that strengths can be learned with the chosen flags.

    Raises:
        UsageError: naming a flag that does not go with ``--learn-strengths``.
    """
    if how.searching.learn_strengths is None:
        return
    prompting, editing, method = how.prompting, how.editing, how.finding.method
    own = methods.named(method).strengths(1)
    for flag, given in (
        ("--direction", how.given.direction is not None),
        (f"--method {method}", method == "over-refusal" or own is not None),
        ("--thinking", prompting.thinking != "off"),
        ("--keep", prompting.keep is not None),
        ("--keep-system", prompting.keep_system is not None),
        (f"--kind {editing.kind}", editing.kind != "project"),
        ("--heads or --experts", editing.by_parts),
    ):
        if given:
            raise UsageError(
                f"--learn-strengths and {flag} do not go together: leave one of them out."
            )


def better(
    trial: Trial, edit: Edit, layers: int, how: Measuring, notes: Mapping[str, Any]
) -> tuple[Trimmed | Learned, str, float] | None:
    """Other strengths of each layer, if they are better than 1 everywhere.

    Without ``--learn-strengths`` they are looked for only where first tokens chose the edit, and no
    flag says what is edited.

    Args:
        trial: tries edits.
        edit: the chosen edit.
        layers: L, the number of the model's layers.
        how: the chosen options.
        notes: what the record says of the choice so far.

    Returns:
        The edit with its effect, how it was found, and the KL at strength 1.
    """
    steps, editing = how.searching.learn_strengths, how.editing
    if steps is not None:
        before = trial.of_edit(edit)
        found = learned(trial, edit, layers, steps, before)
        return None if found is None else (found, BY_LEARNING, before.kl)
    by_hand = editing.layers is not None or editing.pin is not None or editing.norm == "rows"
    by_hand = by_hand or editing.kind != "project" or editing.by_parts
    if "validation_kl" not in notes or how.finding.method == "over-refusal" or by_hand:
        return None
    refused, kl = notes["refused"], notes["validation_kl"]
    quick = trimmed(trial, edit, layers, refused, kl)
    return None if quick is None else (quick, BY_TRIMMING, kl)
