"""Load a GGUF as a model in memory that computes in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType
from mlx.utils import tree_flatten, tree_unflatten

from convert.architectures.weights import Weight
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.gguf_to_mlx.parameters import Layout, layout, shape_of
from convert.gguf_to_mlx.values import can_move, joined, moved_slabs, raw_slabs, type_of, values_of
from convert.mlx import on_cpu as on_cpu_functions
from convert.mlx import packed_forms, types

_Q = GGMLQuantizationType

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Loaded:
    """A GGUF loaded as a model in memory.

    Attributes:
        model: mlx-lm's model, with evaluated weights.
        config: what config.json would hold.
        layout: which parameter is made from which tensors.
        parts: makes parameters of the model again, as long as the GGUF is open.
    """

    model: nn.Module
    config: dict[str, Any]
    layout: Layout
    parts: Parts


def load(
    source: GgufSource,
    *,
    widen: bool | None = None,
    native: bool | None = None,
    progress: Progress | None = None,
    instead: Callable[[mx.array], mx.array] | None = None,
) -> Loaded:
    """The model of a GGUF, computing in float32.

    Args:
        source: an open GGUF; it may be closed afterwards.
        widen: unpack all weights to float32 when loading. The default is to do so on a CPU if that
            takes little more memory than the file.
        native: use MLX's own quantized modules where there are any. The default is to do so on a
            GPU.
        progress: called with the number of bytes of the GGUF that were loaded.
        instead: gives what the model gets in the place of a matrix, which is dropped when it was
            loaded and checked; for a model whose layers are in memory one at a time.

    Raises:
        UserError: as `layout` does, and when values are damaged or not finite.
    """
    found = layout(source)
    on_cpu = bool(mx.default_device() == mx.Device(mx.cpu))
    if native is None:
        native = not on_cpu
    if widen is None:
        size = sum(entry.nbytes for entry in source.tensors.values())
        weights = sum(int(np.prod(entry.shape)) for entry in source.tensors.values())
        widen = on_cpu and 4 * weights <= size + _AFFORDABLE
    parts = Parts(source, found, widen, native)
    replaced: dict[str, nn.Module] = {}
    values: list[tuple[str, mx.array]] = []
    for path, weight in found.weights.items():
        new, named = parts.of(path)
        if instead is not None:
            for name, value in named:
                _check_finite(name, value, source)
            named = [(name, instead(one) if one.ndim > 1 else one) for name, one in named]
        if new is not None:
            replaced[path.rpartition(".")[0]] = new
            for name, value in named:
                new[name.rpartition(".")[2]] = value
        values += named
        if progress:
            progress(sum(source.tensor(piece.tensor).nbytes for piece in weight.pieces))
    if replaced:
        found.model.update_modules(_tree(replaced))
    found.model.load_weights(values, strict=True)
    found.model.eval()
    if on_cpu:
        on_cpu_functions.install()
        if widen:
            from convert.mlx.packed_modules import hold  # lazily: it brings mlx-lm

            hold(found.model)
    if instead is None:
        for name, value in parameters_of(found.model):
            _check_finite(name, value, source)
    return Loaded(found.model, found.config, found, parts)


class Parts:
    """Makes the parameters of a GGUF's model, one tensor after another."""

    def __init__(self, source: GgufSource, found: Layout, widen: bool, native: bool) -> None:
        self._source, self._found, self._native = source, found, native
        self._packs = not widen

    def of(self, path: str) -> tuple[nn.Module | None, list[tuple[str, mx.array]]]:
        """The evaluated parameters of a weight, with their paths.

        For a packed weight also the module that takes the place of the model's own; its bias, a
        weight of its own, is left out of the parameters.
        """
        source, found = self._source, self._found
        weight = found.weights[path]
        module_path, _, name = path.rpartition(".")
        module = found.modules.get(module_path)
        kind, new = type_of(source, weight), None
        if name == "weight" and module is not None and kind is not None and self._packs:
            new = _module(source, found, weight, kind, module, self._native)
        if new is None:
            named = [(path, mx.array(values_of(source, weight)))]
        else:
            named = [(f"{module_path}.{key}", one) for key, one in parameters_of(new)
                     if key != "bias"]  # fmt: skip
        mx.eval([value for _, value in named])
        for piece in weight.pieces:
            source.release(piece.tensor)
        return new, named

    def again(self, paths: Sequence[str]) -> dict[str, mx.array]:
        """Parameters of the loaded model, by their paths, read from the file again."""
        made: dict[str, mx.array] = {}
        for path in paths:
            if path not in made:
                whole = path in self._found.weights
                made |= self.of(path if whole else f"{path.rpartition('.')[0]}.weight")[1]
        return {path: made[path] for path in paths}


def parameters_of(module: nn.Module) -> list[tuple[str, mx.array]]:
    found: Any = tree_flatten(module.parameters())
    return list(found)


# Bytes of memory that an unpacked model may take beyond the size of its file.
_AFFORDABLE = 256 << 20


def _tree(modules: Mapping[str, nn.Module]) -> Any:
    return tree_unflatten(list(modules.items()))


def _module(
    source: GgufSource,
    found: Layout,
    weight: Weight,
    kind: GGMLQuantizationType,
    like: nn.Module,
    native: bool,
) -> nn.Module | None:
    """A module that keeps a quantized or half-precision matrix packed; None to unpack it."""
    shape = shape_of(source, weight)
    if not can_move(weight, kind) or not packed_forms.is_packed(kind):
        return None
    bias_path = weight.path.removesuffix("weight") + "bias"
    bias = None
    if bias_path in found.weights:
        bias = mx.zeros(shape_of(source, found.weights[bias_path]))
    n = shape[-1]
    if types.is_repacked(kind):
        moved = joined(list(moved_slabs(source, weight, kind)))
        if native and hasattr(like, "to_quantized"):
            return _native(like, moved, shape, bias)
        form, parts = packed_forms.from_mlx(moved, n)
    else:
        if any(piece.columns is not None for piece in weight.pieces):
            return None
        forms = [packed_forms.pack_rows(raw, n, kind)
                 for raw, _ in raw_slabs(source, weight)]  # fmt: skip
        form = forms[0][0]
        parts = {
            key: forms[0][1][key]
            if len(forms) == 1
            else np.concatenate([one[1][key] for one in forms])
            for key in forms[0][1]
        }
    arrays = {key: mx.array(value) for key, value in parts.items()}
    if kind == _Q.BF16:
        arrays["codes"] = arrays["codes"].view(mx.bfloat16)
    from convert.mlx.packed_modules import packed_module  # lazily: it brings mlx-lm

    return packed_module(like, form, arrays, shape, bias)


def _native(
    like: nn.Module, moved: types.MlxQuantized, shape: tuple[int, ...], bias: mx.array | None
) -> nn.Module:
    """MLX's own quantized counterpart of the module ``like``, with these arrays."""
    # MLX is lazy: the skeleton's own weights are replaced before they are ever quantized.
    quantized: nn.Module = like.to_quantized(
        group_size=types.GROUP, bits=moved.bits, mode=moved.mode
    )
    lead = shape[:-1]
    quantized.weight = mx.array(moved.weight).reshape(*lead, -1)
    quantized.scales = mx.array(moved.scales).reshape(*lead, -1)
    if moved.biases is not None:
        quantized.biases = mx.array(moved.biases).reshape(*lead, -1)
    if bias is not None:
        quantized.bias = bias
    return quantized


def _check_finite(path: str, value: mx.array, source: GgufSource) -> None:
    if mx.issubdtype(value.dtype, mx.floating) and not mx.isfinite(value).all().item():
        raise UserError(
            f"{source.parts[0]}: the values of {path} are not all finite: the file is damaged, "
            "get it again."
        )
