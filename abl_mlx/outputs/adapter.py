"""The edit as an adapter: the low-rank change that a LoRA adds to an unchanged weight.

W − α U(UᵀW) is W plus a change of rank k. Its factors are computed from the very weights to which
it will be added, dequantized, and only these factors are rounded, to float32. A LoRA cannot change
a bias: the component that a bias writes along the direction stays, and counts as leak.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf.constants import GGML_QUANT_SIZES

from abl_mlx.edits import projection
from abl_mlx.edits.edit import Leak
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.models.hooks import Around, around
from abl_mlx.models.module_weights import Parts
from abl_mlx.models.writers import Writer
from abl_mlx.outputs.gguf_plan import TensorPlan, read, slabs, values_of
from abl_mlx.support.arrays import numpy_of
from convert.adapters import LowRank
from convert.base.errors import UserError
from convert.gguf.file import GgufSource


@dataclass(frozen=True)
class Components:
    """A weight's components along an edit's basis, and its squared norm.

    Attributes:
        along: float32: for lines of axis -2 UᵀW, (k, n) or (E, k, n) for experts; of axis -1, as
            embeddings and readers have, W Uᵀ, (V, k), (n, k) or (E, n, k).
        square: ‖W‖².
    """

    along: np.ndarray
    square: float


def components(
    edit: WeightEdit, writer: Writer, shape: tuple[int, ...], parts: Parts
) -> Components:
    """Compute a weight's components and norm, reading it once, part by part.

    Args:
        edit: the edit.
        writer: the writer whose weight it is.
        shape: the weight's shape: (d, n), (E, d, n) or (V, d).
        parts: together they cover the weight; every index has a slice for each axis.

    Raises:
        UserError: when a value is not finite.
    """
    basis = numpy_of(edit.basis(writer))
    k = len(basis)
    across = edit.axis(writer, "weight") == -1
    out = np.zeros((*shape[:-1], k) if across else (*shape[:-2], k, shape[-1]), np.float32)
    square = 0.0
    for index, values in parts:
        here = numpy_of(values)
        if across:
            along = projection.along(basis, here, -1)
            where: tuple[Any, ...] = index[:-1]
        else:
            along = projection.along(basis[:, index[-2]], here, -2)
            where = (*index[:-2], slice(None), index[-1])
        out[where] += along
        square += projection.square(here)
    if not np.isfinite(out).all():
        raise UserError(f"{writer.path} holds NaN or infinity: the file is damaged.")
    return Components(out, square)


def change(edit: WeightEdit, writer: Writer, along: np.ndarray) -> LowRank:
    """The change of a weight for an adapter whose scale is the edit's strength."""
    if edit.norm != "none":
        raise UserError(
            f"--norm {edit.norm} changes every weight, which no adapter of a small rank can: write "
            "an edited model instead."
        )
    return LowRank(low_rank_kind(writer), *edit.low_rank(writer, along))


def low_rank_kind(writer: Writer) -> str:
    """The kind of a writer's or reader's change in an adapter, as in `LowRank`."""
    return {"reader": "linear", "expert-readers": "experts"}.get(writer.kind, writer.kind)


def leak_of(
    edit: WeightEdit, writer: Writer, found: Components, scale: float, one: LowRank
) -> Leak:
    """The leak when ``scale · one`` is added to the weight.

    The difference to the exact edit, scale · left @ right + α U(UᵀW), has rank 2k, so its norm is
    computed from its factors.
    """
    basis = np.asarray(edit.basis(writer).astype(mx.float32)).astype(np.float64)
    along, axis = found.along.astype(np.float64), edit.axis(writer, "weight")
    taken = edit.taken(writer, along, axis)
    left, right = one.left.astype(np.float64), one.right.astype(np.float64)
    if axis == -1:
        missing = scale * left @ (right @ basis.T) + taken
        whole = np.broadcast_to(basis, (*right.shape[:-2], *basis.shape))
        factors = np.concatenate([scale * left, taken], -1), np.concatenate([right, whole], -2)
    else:
        missing = scale * (basis @ left) @ right + taken
        whole = np.broadcast_to(basis.T, left.shape)
        factors = (
            np.concatenate([scale * left, whole], -1),
            np.concatenate([right, taken], -2),
        )
    first, second = factors
    grams = first.swapaxes(-1, -2) @ first, second @ second.swapaxes(-1, -2)
    error2 = float((grams[0] * grams[1]).sum())  # both are symmetric
    wanted = float((taken * taken).sum())
    target2 = found.square - 2 * float((taken * along).sum()) + wanted
    return Leak(float((missing**2).sum()), wanted, max(error2, 0.0), target2)


def bias_leak(edit: WeightEdit, writer: Writer, bias: mx.array) -> Leak:
    """The leak of a bias that is left unchanged: its whole share of the edit is missing."""
    basis = np.asarray(edit.basis(writer).astype(mx.float32)).astype(np.float64)
    values = np.asarray(bias.astype(mx.float32)).astype(np.float64)
    along = edit.taken(writer, values @ basis.T, -1)
    missing = float((along * along).sum())
    target = values - along @ basis
    return Leak(missing, missing, missing, float((target * target).sum()))


def untouched_leak(edit: WeightEdit, writer: Writer, found: Components) -> Leak:
    """The leak of a weight that is left unchanged: its whole share of the edit is missing."""
    along = found.along.astype(np.float64)
    taken = edit.taken(writer, along, edit.axis(writer, "weight"))
    missing = float((taken * taken).sum())
    target2 = found.square - 2 * float((taken * along).sum()) + missing
    return Leak(missing, missing, missing, target2)


# --- weights -----------------------------------------------------------------------------------


def tensor_parts(gguf: GgufSource, one: TensorPlan) -> Parts:
    """A tensor of a GGUF in float32, a slab at a time."""
    shape, axis = gguf.tensors[one.name].shape, one.axis
    raw = gguf.raw(one.name)
    for slab in slabs(shape, axis, GGML_QUANT_SIZES[one.old][0]):
        values = mx.array(values_of(read(raw, one.old, slab)))
        gguf.release(one.name)
        if len(shape) == 3:
            expert, first = divmod(slab.rows.start, shape[1])
            rows = slice(first, first + slab.rows.stop - slab.rows.start)
            yield (expert, rows, slab.columns), values
        else:
            yield (slab.rows, slab.columns), values


# --- at runtime --------------------------------------------------------------------------------


@contextmanager
def attached(pairs: Iterable[tuple[nn.Module, LowRank]], scale: float) -> Iterator[None]:
    """Context manager in which each module adds its change to its output, as llama.cpp does.

    For models with modules for which mlx-lm has no LoRA (those of a GGUF, which are packed). It is
    not for a tied embedding, whose change would also have to be added in the output head.
    """
    with around([(module, _adding(one, scale)) for module, one in pairs]):
        yield


def _adding(one: LowRank, scale: float) -> Around:
    left, right = mx.array(one.left), mx.array(one.right)

    def wrapper(call: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        output = call(x, *args, **kwargs)
        if one.kind == "embedding":
            more = left[x] @ right
        elif one.kind == "linear":
            more = (x.astype(mx.float32) @ right.T) @ left.T
        else:
            chosen = args[0] if args else kwargs["indices"]
            more = x.astype(mx.float32)
            for factor in (right, left):
                more = mx.gather_mm(more, factor.swapaxes(-1, -2), rhs_indices=chosen)
        return output + (scale * more).astype(output.dtype)

    return wrapper


def check_module(writer: Writer) -> None:
    """Check that mlx-lm has a LoRA for the writer's kind of module.

    Raises:
        UserError: naming the module, when it has none.
    """
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = {
        "linear": (nn.Linear, nn.QuantizedLinear),
        "experts": (SwitchLinear, QuantizedSwitchLinear),
        "embedding": (nn.Embedding, nn.QuantizedEmbedding),
    }
    if not isinstance(writer.module, kinds[low_rank_kind(writer)]):
        raise UserError(
            f"{writer.path} is a {type(writer.module).__name__}, for which mlx-lm has no LoRA: "
            "write an edited model instead of an adapter."
        )
