"""Residual writers of two models, paired, and the mathematics of their differences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from abl_mlx.outputs.stream_weights import StreamWeight, StreamWeights, Unreachable
from convert.base.errors import UserError

Pair = tuple[StreamWeight, StreamWeight]


def matched(
    before: StreamWeights, after: StreamWeights, base: str, name: str
) -> tuple[list[Pair], list[str]]:
    """The writers of two models, paired by their names, and names of those that have no other one.

    Args:
        before, after: the writers of the base and of the model.
        base, name: what the two are called.

    Raises:
        UserError: when the two models have different shapes.
        Unreachable: when no writer of one has the name of one of the other.
    """
    if (before.width, before.layers) != (after.width, after.layers):
        raise UserError(
            f"{name} has {after.layers} layers of width {after.width}, and {base} has "
            f"{before.layers} of {before.width}: these are not the same model."
        )
    names = {one.name: one for one in before.writers}
    if not any(one.name in names for one in after.writers):
        names = {one.path: one for one in before.writers if one.path is not None}
        keys = [one.path for one in after.writers]
    else:
        keys = [one.name for one in after.writers]
    pairs: list[Pair] = []
    left_out = []
    for key, new in zip(keys, after.writers, strict=True):
        old = names.get(key) if key is not None else None
        if old is None or (old.columns_moved != new.columns_moved):
            left_out.append(new.name)
            continue
        if old.lines != new.lines or old.axis != new.axis:
            raise UserError(
                f"{new.name} has the shape {new.shape} in {name} and {old.shape} in {base}: these "
                "are not the same model."
            )
        pairs.append((old, new))
    if not pairs:
        raise Unreachable(
            f"the residual writers of {name} cannot be matched with those of {base}: convert one "
            "to the other's format first (`abl-mlx convert`)."
        )
    return pairs, left_out


def both(pair: Pair) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield slabs of the base's and the model's weights, float32 (d, c) each."""
    old, new = pair
    for slab in new.slabs():
        yield old.values(slab), new.values(slab)
        old.release()
        new.release()


def plain(pair: Pair) -> Pair:
    """A writer before and after the edit as stored, without the gain behind it."""
    old, new = pair
    return replace(old, gain=None), replace(new, gain=None)


def largest(gram: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues of a Gram matrix and their vectors: (count,), (d, count)."""
    block = np.random.default_rng(1).standard_normal((len(gram), min(len(gram), count + 8)))
    for _ in range(12):
        block = np.linalg.qr(gram @ block)[0]
    values, turn = np.linalg.eigh(block.T @ (gram @ block))
    return values[::-1][:count], (block @ turn)[:, ::-1][:, :count]
