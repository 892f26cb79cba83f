"""Restoring edited float weights, or making the adapter that restores them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from abl_mlx.inputs.sources import Source
from abl_mlx.outputs.edit_label import Label
from abl_mlx.outputs.undo_file import Taken
from abl_mlx.support.arrays import number
from convert.adapters import LowRank
from convert.base.errors import UserError

#: The name of an adapter that undoes an edit.
ADAPTER_NAME = "undoes the removal of the refusal direction"


def quantized(name: str, source: Source) -> UserError:
    """The error to raise for a quantized tensor, whose edit was rounded and cannot be undone."""
    return UserError(
        f"{name} in {source.name} is quantized, and the rounding of its edit cannot be undone: go "
        "back to the model that was edited."
    )


def refuse_biases(path: Path, names: Iterable[str]) -> None:
    """Refuse an adapter that undoes an edit of biases.

    Raises:
        UserError: naming a bias, if there is one among ``names``.
    """
    for name in names:
        if name.endswith(".bias"):
            raise UserError(
                f"{path}: {name} was edited, but an adapter cannot hold a bias; write the model "
                "instead."
            )


def refuse_readers(path: Path, label: Label) -> None:
    """Refuse an adapter that undoes an edit of readers or routers.

    Raises:
        UserError: when it is one.
    """
    if label.edit != "writers":
        raise UserError(
            f"{path}: the edit of {label.edit} is not undone by an adapter: write the model "
            "instead."
        )


def missing_share(
    found: Mapping[str, Taken],
    edited: Callable[[str], mx.array],
    restored: Callable[[str], mx.array],
) -> float:
    """The share of the removed components that is missing from the restored weights."""
    missing = wanted = 0.0
    for name, one in found.items():
        left, lost = one.lost(restored(name)), one.lost(edited(name))
        missing += number((left * left).sum())
        wanted += number((lost * lost).sum())
    return float((missing / wanted) ** 0.5) if wanted else 0.0


def low_rank(one: Taken, edited: mx.array) -> LowRank:
    """The change that restores an edited tensor, for an adapter with scale 1."""
    along = np.array(one.lost(edited).astype(mx.float32))
    basis = np.array(one.basis.astype(mx.float32))
    if one.axis == -1:
        return LowRank("embedding", along, basis)
    left = np.broadcast_to(basis.T, (*along.shape[:-2], *basis.T.shape))
    return LowRank("experts" if along.ndim == 3 else "linear", left, along)


def stacked(parts: Sequence[LowRank]) -> LowRank:
    """One change for a stack of experts, from those of separate experts."""
    if len(parts) == 1:
        return parts[0]
    left, right = np.stack([p.left for p in parts]), np.stack([p.right for p in parts])
    return LowRank("experts", left, right)
