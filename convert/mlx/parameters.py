"""From which tensors in the files each parameter of mlx-lm's model is made.

mlx-lm renames, stacks and transposes the tensors that it reads (each model's ``sanitize``). This
module keeps no list of those rules: it runs the model's own ``sanitize`` on the lazily loaded files
and finds each array in the result. Most come out as the same Python objects; stacked experts are
found by comparing their values.
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
    """How a parameter is stored in the files.

    Attributes:
        tensors: names of the tensors from which it is made: one, or one for each expert, in order.
        transposed: whether the last two axes are swapped in the files.
    """

    tensors: tuple[str, ...]
    transposed: bool = False


def locate(model: Any, files: TensorFiles, parameters: Sequence[str]) -> dict[str, Stored]:
    """Find each of ``parameters`` (paths in the model, ``layers.0.mlp.down_proj.weight``).

    Args:
        model: a new model object of mlx-lm for that folder, used for nothing else: running its
            ``sanitize`` may change the object (Gemma 3 drops its head there).
        files: the folder's tensors.
        parameters: the parameters to find.

    Raises:
        UserError: naming the parameter that no tensor holds in the form in which it is used.
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
    """Find by their values the tensors from which ``sanitize`` computed a parameter."""
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
    # The first 64 values tell nearly all arrays apart; only if they match is the rest compared.
    head = first.reshape(-1)[:64], second.reshape(-1)[:64]
    if not mx.array_equal(*head).item():
        return False
    return bool(mx.array_equal(first, second).item())
