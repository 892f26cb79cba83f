"""Edited float weights with what was taken from them put back, or the adapter that does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from abl_mlx.inputs.sources import Source
from abl_mlx.outputs.undo_file import Taken
from abl_mlx.support.arrays import number
from convert.adapters import LowRank
from convert.base.errors import UserError

#: What an adapter that undoes an edit says of itself.
ADAPTER_NAME = "undoes the removal of the refusal direction"


def quantized(name: str, source: Source) -> UserError:
    """What to say of a tensor whose edit was rounded."""
    return UserError(
        f"{name} in {source.name} is quantized, and the rounding of its edit cannot be undone: go "
        "back to the model that was edited."
    )


def refuse_biases(path: Path, names: Iterable[str]) -> None:
    """Refuse an adapter of an edit that changed biases.

    Raises:
        UserError: naming the bias.
    """
    for name in names:
        if name.endswith(".bias"):
            raise UserError(
                f"{path}: {name} was edited, and an adapter cannot hold a bias; write the model "
                "instead."
            )


def missing_share(
    found: Mapping[str, Taken],
    edited: Callable[[str], mx.array],
    restored: Callable[[str], mx.array],
) -> float:
    """The share of what was taken that is not back in the written weights."""
    missing = wanted = 0.0
    for name, one in found.items():
        left, lost = one.lost(restored(name)), one.lost(edited(name))
        missing += number((left * left).sum())
        wanted += number((lost * lost).sum())
    return float((missing / wanted) ** 0.5) if wanted else 0.0


def low_rank(one: Taken, edited: mx.array) -> LowRank:
    """The change that brings an edited tensor back, for an adapter whose scale is 1."""
    along = np.array(one.lost(edited).astype(mx.float32))
    basis = np.array(one.basis.astype(mx.float32))
    if one.axis == -1:
        return LowRank("embedding", along, basis)
    left = np.broadcast_to(basis.T, (*along.shape[:-2], *basis.T.shape))
    return LowRank("experts" if along.ndim == 3 else "linear", left, along)


def stacked(parts: Sequence[LowRank]) -> LowRank:
    """One change of a stack of experts that the files hold one by one."""
    if len(parts) == 1:
        return parts[0]
    left, right = np.stack([p.left for p in parts]), np.stack([p.right for p in parts])
    return LowRank("experts", left, right)
