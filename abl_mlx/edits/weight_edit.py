"""`WeightEdit`: what is asked of a change of weights so that it can be written in any format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from abl_mlx.models.writers import Writer


class WeightEdit(Protocol):
    """A change of weights that does not depend on a file format; outputs write any such edit.

    In a tensor that it changes, the edit moves each line (a column for axis -2, a row for axis -1)
    within the span of a few vectors, `basis`. Rounding preserves the components along them.
    """

    @property
    def strength(self) -> float:
        """α, by which the whole change is multiplied; an adapter's scale."""

    @property
    def norm(self) -> str:
        """Which norms of the weights are kept, one of `choices.NORMS`."""

    @property
    def places(self) -> str:
        """What is edited, one of `choices.PLACES`."""

    @property
    def width(self) -> int:
        """d, the number of dimensions of the residual stream."""

    def strength_of(self, writer: Writer) -> float:
        """The strength α for one writer."""

    def touches(self, writer: Writer) -> bool:
        """Whether this writer is edited."""

    def chosen(self, writers: Iterable[Writer]) -> list[Writer]:
        """The writers that are edited.

        Raises:
            UserError: when there are none, or the edit does not fit them.
        """

    def parameters(self, writer: Writer) -> tuple[str, ...]:
        """Which of ``weight`` and ``bias`` the edit changes, of those that the writer has."""

    def axis(self, writer: Writer, parameter: str) -> int:
        """The axis along which the lines of a parameter run: -1 or -2."""

    def basis(self, writer: Writer) -> mx.array:
        """The vectors within whose span lines move: orthonormal, float32 (k, length of a line)."""

    def taken(self, writer: Writer, along: Any, axis: int) -> Any:
        """The components that the edit takes away from a parameter.

        Args:
            writer: the writer.
            along: the parameter's components along `basis`: (…, k, n) for axis -2, (…, k) for
                axis -1; MLX or NumPy.
            axis: the axis of length k.
        """

    def without_norms(self) -> WeightEdit:
        """The same edit, keeping no norms."""

    def of_slab(self, rows: slice, columns: slice) -> WeightEdit:
        """The edit of a part of each tensor, for functions that are given this part only.

        Args:
            rows: its rows, counted through all experts.
            columns: its columns.
        """

    def of_expert(self, expert: int) -> WeightEdit:
        """The edit of the tensor of one expert, if each has a tensor of its own."""

    def low_rank(self, writer: Writer, along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Factors of the change of a weight at strength 1, (…, out, k) and (…, k, in), float32.

        Args:
            writer: the writer.
            along: the weight's components along `basis`.
        """


class LayeredEdit(WeightEdit, Protocol):
    """A change of weights whose strength can differ from layer to layer."""

    def with_profile(self, profile: Mapping[str, Sequence[float]]) -> LayeredEdit:
        """The same edit with a factor of its strength for each layer.

        Args:
            profile: the factors of each layer, for ``attention`` and ``mlp`` writers.
        """

    def without_norms(self) -> LayeredEdit:
        """The same edit, keeping no norms."""
