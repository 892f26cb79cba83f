"""What is done to which writer, and the exact target for its weight (DESIGN section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from abl_mlx.arrays import number, numpy_of
from abl_mlx.writers import Writer
from convert.errors import UserError


def orthonormal(directions: mx.array) -> mx.array:
    """An orthonormal basis of the span of ``directions`` (k, d): (k, d) float32, by QR.

    A single direction is divided by its norm, so its sign stays. Of (L, k, d) one for each layer.

    Raises:
        UserError: when a direction is zero, not finite, or depends on the others.
    """
    if directions.ndim == 3:
        return mx.stack([orthonormal(one) for one in directions])
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
        directions: float32, in the residual stream, of any length, linearly independent: (k, d),
            or (L, k, d) with a set of its own for the writers of each layer (embeddings take
            layer 0's).
        strength: α; 1 removes the component, 0.5 half of it, negative values strengthen it.
        layers: the layers whose writers are edited; None for all of them.
        embedding: whether the embedding's rows are edited too. With tied embeddings this edits the
            output head as well.
        profile: for ``attention`` and ``mlp``, a factor of α for each layer; None for 1.
        norm: of `options.NORMS`. Keeping columns leaves a full removal full; keeping rows undoes
            part of it (DESIGN section 5).
        pin: (k,) what the embedding's rows hold of each (orthonormal) direction instead of nothing,
            in the embedding's own units; None for nothing. Affine editing: as nothing else writes
            along the directions any more, the stream holds it everywhere.
    """

    directions: mx.array
    strength: float = 1.0
    layers: frozenset[int] | None = None
    embedding: bool = True
    profile: Mapping[str, Sequence[float]] | None = None
    norm: str = "none"
    pin: mx.array | None = None

    @property
    def width(self) -> int:
        """d."""
        return int(self.directions.shape[-1])

    @property
    def is_plain(self) -> bool:
        """Whether it is the projection W − α U(UᵀW) with one α and U for every writer."""
        return (
            self.directions.ndim == 2
            and self.profile is None
            and self.norm == "none"
            and self.pin is None
        )

    def strength_of(self, writer: Writer) -> float:
        """α of one writer."""
        if self.profile is None or writer.component == "embedding":
            return self.strength
        return self.strength * float(self.profile[writer.component][writer.layer])

    def touches(self, writer: Writer) -> bool:
        """Whether this writer is edited."""
        if writer.kind == "embedding":
            return self.embedding
        if self.layers is not None and writer.layer not in self.layers:
            return False
        return self.profile is None or self.strength_of(writer) != 0

    def chosen(self, writers: Iterable[Writer]) -> list[Writer]:
        """The writers that are edited.

        Raises:
            UserError: when there are none, or the strength is 0: such an edit changes nothing.
        """
        writers = list(writers)
        self._check_layers(max((writer.layer for writer in writers), default=-1))
        chosen = [writer for writer in writers if self.touches(writer)]
        if not chosen or self.strength == 0:
            raise UserError(
                "this edit changes nothing: choose layers that the model has (--layers) and a "
                "--strength other than 0."
            )
        return chosen

    def _check_layers(self, deepest: int) -> None:
        """Refuse directions or strengths for fewer layers than the model has."""
        given = {"directions": len(self.directions)} if self.directions.ndim == 3 else {}
        if self.profile is not None:
            given["strengths"] = min(map(len, self.profile.values()))
        for what, count in given.items():
            if deepest >= count:
                raise UserError(
                    f"there are {what} for {count} layers, but the model has a layer {deepest}: "
                    "they were measured on another model."
                )

    def basis(self, writer: Writer) -> mx.array:
        """Orthonormal directions in the writer's own output: (k, d) float32.

        Behind a gain g the stream sees g ⊙ y, whose component along r is (g ⊙ r)·y.
        """
        directions = self.directions
        if directions.ndim == 3:
            directions = directions[max(0, writer.layer)]
        if writer.gain is None:
            return orthonormal(directions)
        return orthonormal(directions * writer.gain[None, :])

    def taken(self, writer: Writer, along: Any, axis: int) -> Any:
        """What the edit takes away, of the components that a writer's values have.

        Args:
            along: (k, n) or (…, k, n) with axis -2, (…, k) with axis -1; MLX or NumPy.
            axis: of the components.
        """
        if self.pin is not None and writer.kind == "embedding":
            held = self.pin if isinstance(along, mx.array) else numpy_of(self.pin)
            along = along - (held if axis == -1 else held[:, None])
        return self.strength_of(writer) * along


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
    values = values.astype(mx.float32)
    projected = _projected(edit, writer, values, axis)
    if edit.norm == "none" or parameter == "bias":
        return projected
    kept = axis if edit.norm == "columns" else -3 - axis
    return projected * (_lengths(values, kept) / mx.maximum(_lengths(projected, kept), 1e-30))


def _projected(edit: Edit, writer: Writer, values: mx.array, axis: int) -> mx.array:
    basis = edit.basis(writer)
    return values - _spread(basis, edit.taken(writer, _along(basis, values, axis), axis), axis)


def _lengths(values: mx.array, axis: int) -> mx.array:
    return mx.sqrt((values * values).sum(axis=axis, keepdims=True))


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
    wanted = target(edit, writer, parameter, source)
    difference = written - wanted
    # With rows kept, what that undoes of the removal is missing as well.
    aim = wanted if edit.norm != "rows" else _projected(edit, writer, source, axis)
    missing = _along(basis, written - aim, axis)
    taken = _taken(edit, writer, parameter, source, wanted)
    sums = [(part * part).sum() for part in (missing, taken, difference, wanted)]
    mx.eval(*sums)
    return Leak(*map(number, sums))


def _taken(
    edit: Edit, writer: Writer, parameter: str, source: mx.array, wanted: mx.array
) -> mx.array:
    """The components that the edit takes away, with one float32 rounding where that can be."""
    basis, axis = edit.basis(writer), stream_axis(writer.kind, parameter)
    if edit.norm == "columns" and parameter != "bias":
        return _along(basis, source - wanted, axis)
    return edit.taken(writer, _along(basis, source, axis), axis)


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
