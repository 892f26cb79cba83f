"""`Update`: a low-rank change that is added to the last matrix of some layers' MLPs.

Rank-One Model Editing (Meng et al. 2022, arXiv:2202.05262) and its block form MEMIT (Meng et al.
2023, arXiv:2210.07229) find such a change, so that chosen inputs, the keys, get other outputs and
all other inputs keep theirs as far as possible. `abl_mlx.edits.least_squares` has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.edits import projection
from abl_mlx.models.writers import Writer
from convert.base.errors import UserError


@dataclass(frozen=True)
class Factors:
    """The change of one matrix, left @ right.

    Attributes:
        left: (d, k) float32.
        right: (k, n) float32, of full rank.
        keys: (m, n) float32, further inputs at which rounding keeps the change exact, apart from
            the rows of ``right``; they are independent of those and of each other.
    """

    left: np.ndarray
    right: np.ndarray
    keys: np.ndarray

    @property
    def basis(self) -> np.ndarray:
        """An orthonormal basis of the rows of ``right`` and ``keys``: float32 (k + m, n)."""
        return projection.orthonormal(np.concatenate([self.right, self.keys]))


@dataclass(frozen=True)
class Update:
    """W + α · left @ right in the MLPs of some layers, with factors of each layer's own.

    A row of the change lies in the span of the rows of ``right``. So lines are rows, and rounding
    preserves what each row of the weight does to these inputs.

    Attributes:
        factors: layer -> its change.
        strength: α.
        norm: always ``none``.
        places: always ``writers``.
        rows: the rows of each matrix that are edited; None for all.
    """

    factors: Mapping[int, Factors]
    strength: float = 1.0
    norm: str = "none"
    places: str = "writers"
    rows: slice | None = None

    @property
    def width(self) -> int:
        """d, the number of dimensions of the residual stream."""
        return int(next(iter(self.factors.values())).left.shape[0])

    def strength_of(self, writer: Writer) -> float:
        """The strength α for one writer."""
        return self.strength

    def touches(self, writer: Writer) -> bool:
        """Whether this writer is edited."""
        return not writer.reads and writer.component == "mlp" and writer.layer in self.factors

    def chosen(self, writers: Iterable[Writer]) -> list[Writer]:
        """The writers that are edited: one matrix in each layer of `factors`.

        Raises:
            UserError: when a layer has no such matrix or several, or the strength is 0.
        """
        chosen = [writer for writer in writers if self.touches(writer)]
        for layer in sorted(self.factors):
            here = [writer for writer in chosen if writer.layer == layer]
            if len(here) != 1 or here[0].kind != "linear":
                raise UserError(
                    f"this edit changes the last matrix of layer {layer}'s MLP, and the model has "
                    f"{_counted(here)} there: models with experts, and other models than the one "
                    "it was made for, cannot have it."
                )
        if self.strength == 0:
            raise UserError("this edit changes nothing: choose a --strength other than 0.")
        return chosen

    def parameters(self, writer: Writer) -> tuple[str, ...]:
        """The parameters that the edit changes: the weight alone."""
        return ("weight",)

    def axis(self, writer: Writer, parameter: str) -> int:
        """The axis along which lines run: that of the inputs."""
        return -1

    def basis(self, writer: Writer) -> mx.array:
        """The inputs at which rounding keeps the change: orthonormal, float32 (k + m, n)."""
        return mx.array(self.factors[writer.layer].basis)

    def taken(self, writer: Writer, along: Any, axis: int) -> Any:
        """The components that the edit takes away from a weight: (rows, k + m), as by `Edit`.

        They do not depend on the weight's own components.
        """
        left, right = self.low_rank(writer, np.zeros(0))
        basis = self.factors[writer.layer].basis.astype(np.float64)
        found = -self.strength * (left.astype(np.float64) @ (right.astype(np.float64) @ basis.T))
        if isinstance(along, mx.array):
            return mx.array(found.astype(np.float32))
        return found.astype(along.dtype)

    def with_profile(self, profile: Mapping[str, Sequence[float]]) -> Update:
        """The same edit with its change of each layer multiplied by ``profile["mlp"][layer]``."""
        factors = {
            layer: replace(one, left=np.float32(profile["mlp"][layer]) * one.left)
            for layer, one in self.factors.items()
            if profile["mlp"][layer] != 0
        }
        return replace(self, factors=factors)

    def without_norms(self) -> Update:
        """The same edit, which keeps no norms."""
        return self

    def of_slab(self, rows: slice, columns: slice) -> Update:
        """The edit of some rows of each matrix."""
        return replace(self, rows=rows)

    def of_expert(self, expert: int) -> Update:
        """The edit itself, which changes no experts."""
        return self

    def low_rank(self, writer: Writer, along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Factors of the change at strength 1: (rows, k) and (k, n), float32."""
        found = self.factors[writer.layer]
        return found.left[self.rows or slice(None)], found.right


def _counted(here: list[Writer]) -> str:
    kinds = [f"{one.path} ({one.kind})" for one in here[:3]]
    return ", ".join(kinds) or "none"
