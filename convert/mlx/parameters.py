"""Which tensors of the files a parameter of mlx-lm's model is made of.

mlx-lm renames, stacks and transposes what it reads (each model's ``sanitize``). Instead of keeping
a list of those rules, this runs the model's own ``sanitize`` on the lazily loaded files and sees
where each array went: most come out as the very objects that went in; stacked experts are matched
by their values and then compared whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from convert.base.errors import UserError
from convert.mlx.safetensors_files import TensorFiles


@dataclass(frozen=True)
class Stored:
    """A parameter's place in the files.

    Attributes:
        tensors: names of the tensors it is made of: one, or one for each expert, in order.
        transposed: whether the last two axes are swapped in the files.
    """

    tensors: tuple[str, ...]
    transposed: bool = False


def locate(model: Any, files: TensorFiles, parameters: Sequence[str]) -> dict[str, Stored]:
    """Find each of ``parameters`` (paths in the model, ``layers.0.mlp.down_proj.weight``).

    Args:
        model: a fresh model object of mlx-lm for that folder. Its ``sanitize`` is run, which may
            change the object (Gemma 3 drops its head there, once), so no model in use is given.

    Raises:
        UserError: naming the parameter, when it is not stored as such.
    """
    weights: dict[str, mx.array] = {}
    for file in files.files:
        weights.update(mx.load(str(file)))  # type: ignore[arg-type]
    origin = {id(array): name for name, array in weights.items()}
    sanitized = dict(weights)
    if hasattr(model, "sanitize"):
        sanitized = model.sanitize(sanitized)
    taken = {origin[id(array)] for array in sanitized.values() if id(array) in origin}
    found = {}
    for parameter in parameters:
        array = sanitized.get(parameter)
        if array is None:
            raise UserError(f"{files.folder} holds no tensor for the parameter {parameter}.")
        name = origin.get(id(array))
        found[parameter] = Stored((name,)) if name else _by_value(files, parameter, array, taken)
    return found


def _by_value(files: TensorFiles, parameter: str, array: mx.array, taken: set[str]) -> Stored:
    """Match a parameter that ``sanitize`` computed with the tensors it was computed from."""
    layer = re.search(r"\.(\d+)\.", parameter)
    nearby = [
        name
        for name in files.names
        if name not in taken and (layer is None or layer.group(0) in name)
    ]
    for transposed in (False, True):
        wanted = mx.swapaxes(array, -1, -2) if transposed and array.ndim > 1 else array
        whole = [name for name in nearby if files.info(name).shape == tuple(wanted.shape)]
        for name in whole:
            if _equal(files.read(name), wanted):
                return Stored((name,), transposed)
        if array.ndim > 1:
            names = _slices(files, nearby, wanted)
            if names:
                return Stored(names, transposed)
    raise UserError(
        f"{files.folder} does not store the parameter {parameter} as it is used, so it cannot be "
        "edited in place: convert the model first with `mlx_lm.convert`, then edit the result."
    )


def _slices(files: TensorFiles, nearby: Sequence[str], array: mx.array) -> tuple[str, ...]:
    fitting = {
        name: files.read(name)
        for name in nearby
        if files.info(name).shape == tuple(array.shape[1:])
    }
    names = []
    for index in range(array.shape[0]):
        name = next((n for n, tensor in fitting.items() if _equal(tensor, array[index])), None)
        if name is None:
            return ()
        names.append(name)
        del fitting[name]
    return tuple(names)


def _equal(first: mx.array, second: mx.array) -> bool:
    # The first row tells nearly all apart; only a match is compared whole.
    head = first.reshape(-1)[:64], second.reshape(-1)[:64]
    if not mx.array_equal(*head).item():
        return False
    return bool(mx.array_equal(first, second).item())
