"""What is done to which writer, and the exact target for its weight (DESIGN section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from abl_mlx.arrays import number
from abl_mlx.writers import Writer
from convert.errors import UserError


def orthonormal(directions: mx.array) -> mx.array:
    """An orthonormal basis of the span of ``directions`` (k, d): (k, d) float32, by QR.

    A single direction is divided by its norm, so its sign stays.

    Raises:
        UserError: when a direction is zero, not finite, or depends on the others.
    """
    directions = directions.astype(mx.float32)
    norms = mx.sqrt((directions * directions).sum(axis=1, keepdims=True))
    if not mx.isfinite(norms).all().item() or number(norms.min()) == 0:
        raise UserError("a direction is zero or not finite: it points nowhere.")
    unit = directions / norms
    if unit.shape[0] == 1:
        return unit
    q, r = mx.linalg.qr(unit.T, stream=mx.cpu)
    diagonal = mx.diag(r)
    if number(mx.abs(diagonal).min()) < 1e-4:
        raise UserError("the directions depend on one another: leave out the superfluous ones.")
    return (q * mx.sign(diagonal)).T


@dataclass(frozen=True)
class Edit:
    """Removal of directions from residual writers; knows nothing of file formats.

    Attributes:
        directions: (k, d) float32, in the residual stream; any length, linearly independent.
        strength: α; 1 removes the component, 0.5 half of it, negative values strengthen it.
        layers: the layers whose writers are edited; None for all of them.
        embedding: whether the embedding's rows are edited too. With tied embeddings this edits the
            output head as well.
    """

    directions: mx.array
    strength: float = 1.0
    layers: frozenset[int] | None = None
    embedding: bool = True

    def touches(self, writer: Writer) -> bool:
        """Whether this writer is edited."""
        if writer.kind == "embedding":
            return self.embedding
        return self.layers is None or writer.layer in self.layers

    def chosen(self, writers: Iterable[Writer]) -> list[Writer]:
        """The writers that are edited.

        Raises:
            UserError: when there are none, or the strength is 0: such an edit changes nothing.
        """
        chosen = [writer for writer in writers if self.touches(writer)]
        if not chosen or self.strength == 0:
            raise UserError(
                "this edit changes nothing: choose layers that the model has (--layers) and a "
                "--strength other than 0."
            )
        return chosen

    def basis(self, writer: Writer) -> mx.array:
        """Orthonormal directions in the writer's own output: (k, d) float32.

        Behind a gain g the stream sees g ⊙ y, whose component along r is (g ⊙ r)·y.
        """
        if writer.gain is None:
            return orthonormal(self.directions)
        return orthonormal(self.directions * writer.gain[None, :])


def remove(basis: mx.array, strength: float, values: mx.array, axis: int) -> mx.array:
    """values − α U(Uᵀ values) along one axis of size d; ``basis`` is U as (k, d), orthonormal.

    Works for any rank: a weight (d, n) with axis 0, an expert stack (E, d, n) with axis 1, an
    embedding (V, d) or an activation (..., d) with axis -1, a bias (d,) with axis 0.
    """
    if axis % values.ndim == values.ndim - 1:
        return values - strength * ((values @ basis.T) @ basis)
    # (…, d, n): contract the second axis from the right.
    return values - strength * (basis.T @ (basis @ values))


def stream_axis(kind: str, parameter: str) -> int:
    """The axis of a writer's ``weight`` or ``bias`` that lies in the residual stream."""
    return -1 if kind == "embedding" or parameter == "bias" else -2


def target(edit: Edit, writer: Writer, parameter: str, values: mx.array) -> mx.array:
    """The exact edited value, in float32, of a writer's ``weight`` or ``bias``.

    Args:
        values: the parameter in float32, in MLX's layout: (d, n), (E, d, n), (V, d), (d,) or
            (E, d) for the biases of experts.
    """
    axis = stream_axis(writer.kind, parameter)
    return remove(edit.basis(writer), edit.strength, values.astype(mx.float32), axis)


def rounded(
    edit: Edit, writer: Writer, parameter: str, exact: mx.array, dtype: mx.Dtype
) -> mx.array:
    """Exact edited values in a float dtype, with the component kept where the edit put it.

    The same as `rounding` does on a quantized grid, and as needed: in a wide bfloat16 model a
    plain cast leaves 1% of the component. Each line is rounded from values shifted along the
    directions, the shift being corrected by what is left; the best of a few rounds is kept.

    Args:
        exact: float32, as `target` gives it.
    """
    basis, axis = edit.basis(writer), stream_axis(writer.kind, parameter)
    best = exact.astype(dtype)
    left = shift = _along(basis, best.astype(mx.float32) - exact, axis)
    least = (left * left).sum(axis=axis, keepdims=True)
    for _ in range(_FLOAT_ROUNDS):
        values = (exact - _spread(basis, shift, axis)).astype(dtype)
        left = _along(basis, values.astype(mx.float32) - exact, axis)
        size = (left * left).sum(axis=axis, keepdims=True)
        best, least = mx.where(size < least, values, best), mx.minimum(size, least)
        shift = shift + left
        mx.eval(best, least, shift)
    return best


# Corrections of the shift; the last ones gain little.
_FLOAT_ROUNDS = 3


def _spread(basis: mx.array, components: mx.array, axis: int) -> mx.array:
    """The vectors with these components: Uᵀ applied along one axis, the adjoint of `_along`."""
    return components @ basis if axis == -1 else basis.T @ components


@dataclass(frozen=True)
class Leak:
    """How much of the edit is missing from written values (DESIGN section 6); parts add up.

    Attributes:
        missing: ‖uᵀ(W_written − W_target)‖².
        wanted: ‖uᵀ(W_source − W_target)‖².
        error2: ‖W_written − W_target‖², over all weights.
        target2: ‖W_target‖².
    """

    missing: float = 0.0
    wanted: float = 0.0
    error2: float = 0.0
    target2: float = 0.0

    def __add__(self, other: Leak) -> Leak:
        return Leak(
            self.missing + other.missing,
            self.wanted + other.wanted,
            self.error2 + other.error2,
            self.target2 + other.target2,
        )

    @property
    def value(self) -> float:
        """The share of the component still there: 0 gone, 1 nothing happened."""
        return float((self.missing / self.wanted) ** 0.5) if self.wanted else 0.0

    @property
    def error(self) -> float:
        """Relative weight error against the exact float edit."""
        return float((self.error2 / self.target2) ** 0.5) if self.target2 else 0.0


def leak(edit: Edit, writer: Writer, parameter: str, source: mx.array, written: mx.array) -> Leak:
    """Leak of one parameter, from its values before the edit and as read back from the output."""
    basis, axis = edit.basis(writer), stream_axis(writer.kind, parameter)
    source, written = source.astype(mx.float32), written.astype(mx.float32)
    wanted = remove(basis, edit.strength, source, axis)
    difference = written - wanted
    # What the edit takes away is α Uᵀ(U W), whose component is α U W.
    taken = edit.strength * _along(basis, source, axis)
    missing = _along(basis, difference, axis)
    sums = [(part * part).sum() for part in (missing, taken, difference, wanted)]
    mx.eval(*sums)
    return Leak(*map(number, sums))


def _along(basis: mx.array, values: mx.array, axis: int) -> mx.array:
    """U applied along one axis: the components, one for each direction and line."""
    return values @ basis.T if axis % values.ndim == values.ndim - 1 else basis @ values


def total_leak(leaks: Sequence[Leak]) -> float:
    """Root of the summed squares over all edited parameters.

    Raises:
        UserError: when the source held nothing of the direction, so that nothing was edited.
    """
    wanted = sum(leak.wanted for leak in leaks)
    if wanted == 0:
        raise UserError(
            "nothing of the direction was in the weights to begin with: the edit changed nothing; "
            "is the model already edited along this direction?"
        )
    return float((sum(leak.missing for leak in leaks) / wanted) ** 0.5)
