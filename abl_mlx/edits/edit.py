"""`Edit`: which directions are removed from which writers, and the exact edited weights.

The formulas are in docs/architecture.md, "Mathematics of the edit".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.edits import fitting, projection
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.models.writers import READERS, Writer
from abl_mlx.support.arrays import HALVES, numpy_of
from convert.base import halves
from convert.base.errors import UserError
from convert.base.grids import Grid


def orthonormal(directions: mx.array) -> mx.array:
    """An orthonormal basis of the span of ``directions``, float32 (k, d).

    Directions of shape (L, k, d) give one basis for each layer, (L, k, d). A single direction is
    only divided by its norm, so it keeps its sign.

    Raises:
        UserError: when a direction is zero, not finite, or depends on the others.
    """
    if directions.ndim == 3:
        return mx.stack([orthonormal(one) for one in directions])
    try:
        return mx.array(projection.orthonormal(numpy_of(directions)))
    except ValueError as error:
        if str(error) == "dependent":
            raise UserError(
                "the directions are linearly dependent: leave out the superfluous ones."
            ) from None
        raise UserError("a direction is zero or not finite: it points nowhere.") from None


#: Weights as an array of floats.
Values = mx.array | np.ndarray

#: (layer, number) of heads or experts.
Pairs = frozenset[tuple[int, int]]


@dataclass(frozen=True)
class Edit:
    """Removal of directions from residual writers. It does not depend on a file format.

    Attributes:
        directions: float32, in the residual stream, of any length, linearly independent: (k, d),
            or (L, k, d) with separate directions for the writers of each layer (embeddings use
            those of layer 0).
        strength: α; 1 removes the component, 0.5 half of it, negative values strengthen it.
        layers: the layers whose writers are edited; None for all layers.
        embedding: whether the embedding's rows are edited as well. With tied embeddings this also
            edits the output head. In an edit of readers it says whether the output head is edited,
            which with tied embeddings also edits the embedding.
        profile: for ``attention`` and ``mlp`` writers, a factor of α for each layer; None for 1.
        norm: one of `choices.NORMS`: which norms of the weights are kept. A full removal stays full
            if the norms of columns are kept, but not if those of rows are (docs/architecture.md,
            "Keeping norms").
        pin: (k,), the component along each (orthonormal) direction that every row of the embedding
            gets, in the embedding's units; None for 0. As no other writer writes along the
            directions after the edit, the stream has this component everywhere (affine editing).
        places: what is edited, one of `choices.PLACES`.
        heads: (layer, head) of the attention heads whose columns are edited, and no others; nothing
            but these and ``experts`` is edited then. None for all heads, if ``experts`` is None.
        experts: the same for experts, by (layer, expert).
        slab: the rows, counted through all experts, and the columns of the part of a tensor that
            functions are given; None if they are given whole tensors.
        expert: the number of the expert whose tensor functions are given; None if they are given
            the stack of all.
    """

    directions: mx.array
    strength: float = 1.0
    layers: frozenset[int] | None = None
    embedding: bool = True
    profile: Mapping[str, Sequence[float]] | None = None
    norm: str = "none"
    pin: mx.array | None = None
    places: str = "writers"
    heads: Pairs | None = None
    experts: Pairs | None = None
    slab: tuple[slice, slice] | None = None
    expert: int | None = None

    @property
    def width(self) -> int:
        """d."""
        return int(self.directions.shape[-1])

    @property
    def is_plain(self) -> bool:
        """Whether the edit is W − α U(UᵀW) with the same α and U for every writer."""
        return (
            self.directions.ndim == 2
            and self.profile is None
            and self.norm == "none"
            and self.pin is None
            and self.places == "writers"
            and not self.by_parts
        )

    @property
    def by_parts(self) -> bool:
        """Whether only some heads or experts are edited."""
        return self.heads is not None or self.experts is not None

    def parts_of(self, writer: Writer) -> frozenset[int]:
        """The numbers of a writer's heads or experts that are edited, for an edit `by_parts`."""
        pairs = self.experts if writer.kind == "experts" else self.heads if writer.parts else None
        return frozenset(part for layer, part in pairs or () if layer == writer.layer)

    def parameters(self, writer: Writer) -> tuple[str, ...]:
        """Which of ``weight`` and ``bias`` the edit changes, of those that the writer has.

        A bias behind attention heads belongs to none of them.
        """
        if self.heads is not None and writer.kind == "linear":
            return ("weight",)
        return ("weight", "bias") if writer.has_bias else ("weight",)

    def axis(self, writer: Writer, parameter: str) -> int:
        """The axis along which the lines of a parameter run: the residual stream's."""
        return stream_axis(writer.kind, parameter)

    def with_profile(self, profile: Mapping[str, Sequence[float]]) -> Edit:
        """The same edit with a factor of α for each layer."""
        return replace(self, profile=profile)

    def without_norms(self) -> Edit:
        """The same edit, keeping no norms."""
        return replace(self, norm="none")

    def of_slab(self, rows: slice, columns: slice) -> Edit:
        """The edit of a part of each tensor."""
        return replace(self, slab=(rows, columns)) if self.by_parts else self

    def of_expert(self, expert: int) -> Edit:
        """The edit of the tensor of one expert, if each has a tensor of its own."""
        return replace(self, expert=expert) if self.by_parts else self

    def low_rank(self, writer: Writer, along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Factors of the change of a weight at strength 1, (…, out, k) and (…, k, in), float32.

        Args:
            writer: the writer.
            along: the weight's components along the directions.
        """
        basis = numpy_of(self.basis(writer))
        along = self.taken(writer, along, self.axis(writer, "weight")) / np.float32(self.strength)
        if self.axis(writer, "weight") == -1:
            right = np.broadcast_to(-basis, (*along.shape[:-2], *basis.shape))
            return along, np.ascontiguousarray(right)
        left = np.broadcast_to(-basis.T, (*along.shape[:-2], *basis.T.shape))
        return np.ascontiguousarray(left), along

    def strength_of(self, writer: Writer) -> float:
        """The strength α for one writer."""
        if self.profile is None or writer.component == "embedding":
            return self.strength
        return self.strength * float(self.profile[writer.component][writer.layer])

    def touches(self, writer: Writer) -> bool:
        """Whether this writer, or reader, is edited."""
        if writer.reads != (self.places == "readers"):
            return False
        if self.by_parts and not self.parts_of(writer):
            return False
        if writer.component == "embedding" and (writer.reads or writer.kind == "embedding"):
            return self.embedding
        if self.layers is not None and writer.layer not in self.layers:
            return False
        return self.profile is None or self.strength_of(writer) != 0

    def chosen(self, writers: Iterable[Writer]) -> list[Writer]:
        """The writers that are edited.

        Raises:
            UserError: when there are none, or the strength is 0: such an edit changes nothing. Also
                when the chosen layers have none of them, so that only an embedding is edited.
        """
        writers = list(writers)
        given = {"directions": len(self.directions)} if self.directions.ndim == 3 else {}
        if self.profile is not None:
            given["strengths"] = min(map(len, self.profile.values()))
        fitting.check_layers({writer.layer for writer in writers}, self.layers, given)
        fitting.check_parts(writers, "heads", self.heads)
        fitting.check_parts(writers, "experts", self.experts)
        chosen = [writer for writer in writers if self.touches(writer)]
        if not chosen or self.strength == 0:
            raise UserError(
                "this edit changes nothing: choose layers that the model has (--layers) and a "
                "--strength other than 0."
            )
        return chosen

    def basis(self, writer: Writer) -> mx.array:
        """The directions to remove from the writer's output: orthonormal, float32 (k, d).

        If the output y is multiplied by a gain g, the stream gets g ⊙ y, whose component along r is
        (g ⊙ r)·y; so g ⊙ r takes the place of r. A reader gets g ⊙ h, in which r has become g ⊙ r.
        """
        directions = self.directions
        if directions.ndim == 3:
            last = writer.reads and writer.layer < 0
            directions = directions[-1 if last else max(0, writer.layer)]
        if writer.centered:
            directions = directions - directions.mean(axis=-1, keepdims=True)
        if writer.gain is None:
            return orthonormal(directions)
        return orthonormal(directions * writer.gain[None, :])

    def taken(self, writer: Writer, along: Any, axis: int) -> Any:
        """The part of a writer's components along the directions that the edit removes.

        Args:
            writer: the writer.
            along: the components, (k, n) or (…, k, n) for axis -2, (…, k) for axis -1; MLX or
                NumPy.
            axis: the axis of length k.
        """
        if self.pin is not None and writer.kind == "embedding":
            held = self.pin if isinstance(along, mx.array) else numpy_of(self.pin)
            along = along - (held if axis == -1 else held[:, None])
        taken = self.strength_of(writer) * along
        if not self.by_parts:
            return taken
        share = self.share(writer, along.shape, axis).astype(np.float32)
        return taken * (mx.array(share) if isinstance(along, mx.array) else share)

    def share(self, writer: Writer, shape: tuple[int, ...], axis: int) -> np.ndarray:
        """1 for the components of heads and experts that are edited, 0 for others.

        Args:
            writer: the writer.
            shape: of the components, as for `taken`; the result broadcasts to it.
            axis: the axis of length k.
        """
        chosen = self.parts_of(writer)
        if writer.kind == "experts":
            one = self.expert
            if one is None and self.slab is not None:
                one = self.slab[0].start // self.width
            if one is not None:
                return np.full((), one in chosen)
            each = np.array([expert in chosen for expert in range(shape[0])])
            return each.reshape(-1, *[1] * (len(shape) - 1))
        found = np.repeat(
            [head in chosen for head in range(writer.parts)], writer.inputs // writer.parts
        )
        return found if self.slab is None else found[self.slab[1]]


def stream_axis(kind: str, parameter: str) -> int:
    """The axis of length d, the residual stream's, in a writer's ``weight`` or ``bias``."""
    return -1 if kind in ("embedding", *READERS) or parameter == "bias" else -2


def target(edit: WeightEdit, writer: Writer, parameter: str, values: mx.array) -> mx.array:
    """The exact edited values, in float32, of a writer's ``weight`` or ``bias``.

    Args:
        edit: the edit.
        writer: the writer.
        parameter: ``weight`` or ``bias``.
        values: the parameter in float32, in MLX's layout: (d, n), (E, d, n), (V, d), (d,), or
            (E, d) for the biases of experts.
    """
    return mx.array(exact(edit, writer, parameter, numpy_of(values)))


def exact(edit: WeightEdit, writer: Writer, parameter: str, values: np.ndarray) -> np.ndarray:
    """The exact edited values as by `target`, for a NumPy array; the same on every CPU."""
    axis = edit.axis(writer, parameter)
    projected = _projected(edit, writer, values, axis)
    if edit.norm == "none" or parameter == "bias":
        return projected
    kept = axis if edit.norm == "columns" else -3 - axis
    ratio = _lengths(values, kept) / np.maximum(_lengths(projected, kept), np.float32(1e-30))
    rescaled: np.ndarray = projected * ratio
    return rescaled


def _projected(edit: WeightEdit, writer: Writer, values: np.ndarray, axis: int) -> np.ndarray:
    basis = numpy_of(edit.basis(writer))
    taken = edit.taken(writer, projection.along(basis, values, axis), axis)
    return projection.without(basis, taken, values, axis)


def _lengths(values: np.ndarray, axis: int) -> np.ndarray:
    lengths = np.sqrt(projection.squares(values, axis)).astype(np.float32)
    return np.expand_dims(lengths, axis)


def rounded(
    edit: WeightEdit, writer: Writer, parameter: str, exact: mx.array, dtype: mx.Dtype
) -> mx.array:
    """Exact edited values rounded to a float dtype so that the edit's component is preserved.

    This is for floats what `rounding` is for quantized grids, and it is needed: in a wide bfloat16
    model a plain cast leaves 1% of the component. Each line of the weight is shifted along the
    directions before it is rounded; the shift is corrected a few times by the component that is
    left, and the best result is kept.

    Args:
        edit: the edit.
        writer: the writer.
        parameter: ``weight`` or ``bias``.
        exact: float32, the result of `target`.
        dtype: the float type to round to.
    """
    kind = HALVES.get(dtype)
    if kind is None:
        return exact.astype(dtype)  # float32 holds the edit
    basis, axis = numpy_of(edit.basis(writer)), edit.axis(writer, parameter)
    wanted = numpy_of(exact)
    bits = np.empty(wanted.shape, np.uint16)

    def lines(wanted: np.ndarray, best: np.ndarray) -> None:
        """Some lines, few enough for the CPU's cache."""

        def stored(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            kept = halves.narrowed(values, kind)
            left = projection.along(basis, halves.widened(kept, kind) - wanted, axis)
            return kept, left, np.square(left).sum(axis=axis, keepdims=True)

        wanted = np.ascontiguousarray(wanted)
        best[...], shift, least = stored(wanted)
        for _ in range(_FLOAT_ROUNDS):
            values, left, size = stored(projection.without(basis, shift, wanted, axis))
            np.copyto(best, values, where=size < least)
            least, shift = np.minimum(size, least), shift + left

    projection.in_lines(lines, axis, wanted, bits)
    return mx.array(bits).view(dtype)


# How often the shift is corrected; further corrections gain little.
_FLOAT_ROUNDS = 3


@dataclass(frozen=True)
class Leak:
    """Share of the edit that is missing from written weights (docs/architecture.md, "Leak").

    The sum of the leaks of several tensors, or parts of one, is the leak of all of them together.

    Attributes:
        missing: ‖uᵀ(W_written − W_target)‖².
        wanted: ‖uᵀ(W_source − W_target)‖².
        error2: ‖W_written − W_target‖², the squared error of the weights.
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
        """The share of the intended change that is missing: 0 none, 1 all of it."""
        return float((self.missing / self.wanted) ** 0.5) if self.wanted else 0.0

    @property
    def error(self) -> float:
        """The error of the weights relative to the exactly edited ones, ‖W_written − W_target‖ /
        ‖W_target‖."""
        return float((self.error2 / self.target2) ** 0.5) if self.target2 else 0.0


def leak(edit: WeightEdit, writer: Writer, parameter: str, source: Values, written: Values) -> Leak:
    """The leak of one parameter.

    Args:
        edit, writer, parameter: as for `target`.
        source: its values before the edit.
        written: its values as read back from the output.
    """
    before, after = (numpy_of(one) if isinstance(one, mx.array) else one
                     for one in (source, written))  # fmt: skip
    basis, axis = numpy_of(edit.basis(writer)), edit.axis(writer, parameter)
    if edit.norm == "none" or parameter == "bias":
        return _removal_leak(edit, writer, axis, projection.compare(basis, before, after, axis))
    wanted = exact(edit, writer, parameter, before)
    # Keeping the norms of rows undoes a part of the removal; that part counts as missing.
    aim = wanted if edit.norm != "rows" else _projected(edit, writer, before, axis)
    missing = projection.along(basis, after - aim, axis)
    taken = _taken(edit, writer, parameter, before, wanted)
    return Leak(*map(projection.square, (missing, taken, after - wanted, wanted)))


def leak_read(
    edit: WeightEdit, writer: Writer, parameter: str, pair: projection.Pair, shape: tuple[int, int]
) -> Leak:
    """The leak of a matrix that is read in pieces.

    Args:
        edit, writer, parameter: as for `target`.
        pair: reads some rows and columns before the edit and from the output; see
            `projection.compare_read`.
        shape: (R, n).
    """
    if edit.norm == "none":
        basis, axis = numpy_of(edit.basis(writer)), edit.axis(writer, parameter)
        return _removal_leak(edit, writer, axis, projection.compare_read(basis, pair, shape, axis))
    both = pair(slice(0, shape[0]), slice(0, shape[1]))
    before, after = (one.values() if isinstance(one, Grid) else one for one in both)
    return leak(edit, writer, parameter, before, after)


def _removal_leak(edit: WeightEdit, writer: Writer, axis: int, found: projection.Compared) -> Leak:
    """The leak of a removal that keeps no norms, from one comparison.

    With c the components that the edit removes and D = written − source, the error of the written
    weights is D + u c, and ‖D + u c‖² = ‖D‖² + 2 c·(u D) + ‖c‖².
    """
    before, after = found.before.astype(np.float64), found.after.astype(np.float64)
    taken = edit.taken(writer, before, axis)
    wanted = float(np.sum(taken * taken))
    error = found.moved + 2 * float(np.sum(taken * (after - before))) + wanted
    squares = found.squares - 2 * float(np.sum(taken * before)) + wanted
    left = after - (before - taken)
    return Leak(float(np.sum(left * left)), wanted, max(error, 0.0), max(squares, 0.0))


def _taken(
    edit: WeightEdit, writer: Writer, parameter: str, source: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """The components that the edit removes, rounded to float32 only once where possible."""
    basis, axis = numpy_of(edit.basis(writer)), edit.axis(writer, parameter)
    if edit.norm == "columns" and parameter != "bias":
        return projection.along(basis, source - wanted, axis)
    taken: np.ndarray = edit.taken(writer, projection.along(basis, source, axis), axis)
    return taken


def total_leak(leaks: Sequence[Leak]) -> float:
    """The leak of all edited parameters together.

    Raises:
        UserError: when the source has no component along the direction, so nothing was edited.
    """
    wanted = sum(leak.wanted for leak in leaks)
    if wanted == 0:
        raise UserError(
            "the weights had no component along the direction before the edit, so it changed "
            "nothing: is the model already edited along this direction?"
        )
    return float((sum(leak.missing for leak in leaks) / wanted) ** 0.5)
