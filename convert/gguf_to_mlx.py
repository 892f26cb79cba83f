"""A GGUF as an MLX model: in memory, or as a folder that mlx-lm loads.

What an architecture's metadata and tensor names mean is said in `convert.architectures.families`;
here the values are moved. Quantized blocks become MLX's where MLX has the same
(`convert.mlx.types`); other types stay packed in memory (`convert.mlx.packed`), and in a folder
become bfloat16, or are quantized anew by MLX when asked.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType
from mlx.utils import tree_flatten

from convert.architectures.keys import Keys
from convert.architectures.table import IN_MLX
from convert.architectures.weights import ROPE_TABLES, Weight
from convert.base import escape, json_text
from convert.base.atomic import check_new, new_folder
from convert.base.errors import OPTION, UserError
from convert.base.grids import Grid
from convert.gguf.file import GgufSource
from convert.gguf.ggml_types import grid_codec
from convert.gguf.layout import TensorEntry
from convert.mlx import on_cpu as on_cpu_functions
from convert.mlx import packed, types
from convert.mlx.gemma2_window import give_window
from convert.mlx.safetensors_files import TensorFiles
from convert.tokenizers.from_gguf import write_tokenizer

_Q = GGMLQuantizationType

_FLOATS = {_Q.F32: mx.float32, _Q.F16: mx.float16, _Q.BF16: mx.bfloat16, _Q.F64: mx.float32}

SLAB = 1 << 25
"""Weights of a tensor that are looked at together."""

SHARD = 5_000_000_000
"""Bytes of a safetensors file in a written folder, as on the Hugging Face hub."""

Progress = Callable[[int], object]


# --------------------------------------------------------------------------------------------------
# What goes where


@dataclass(frozen=True)
class Layout:
    """A GGUF's tensors as parameters of mlx-lm's model.

    Attributes:
        config: config.json.
        weights: parameter path -> where its values are.
        model: mlx-lm's model, its parameters not yet evaluated.
        modules: module path -> module.
    """

    config: dict[str, Any]
    weights: dict[str, Weight]
    model: nn.Module
    modules: dict[str, nn.Module]

    def places(self) -> dict[str, list[str]]:
        """GGUF tensor -> the parameters that hold some of it."""
        found: dict[str, list[str]] = {}
        for path, weight in self.weights.items():
            for piece in weight.pieces:
                found.setdefault(piece.tensor, []).append(path)
        return found


def layout(source: GgufSource) -> Layout:
    """What a GGUF is in mlx-lm.

    Raises:
        UserError: an architecture that is not supported, a tensor without a place, a parameter
            without a tensor, metadata that are missing or that mlx-lm cannot follow.
    """
    name = source.parts[0]
    if source.architecture not in IN_MLX:
        raise UserError(
            f"{name} is of the architecture {source.architecture}, which cannot be run with MLX "
            f"from a GGUF; supported are {', '.join(sorted(IN_MLX))}."
        )
    family = IN_MLX[source.architecture]
    keys = Keys(source)
    config = family.config(keys)
    weights: dict[str, Weight] = {}
    for weight in family.weights(keys):
        if weight.path in weights:
            raise UserError(f"{name} holds {weight.path} twice: get the file again.")
        weights[weight.path] = weight
    model = _skeleton(config, name)
    give_window(model, config)
    parameters = dict(tree_flatten(model.parameters()))
    _check_complete(source, family.unused + keys.drafting, weights, parameters)
    return Layout(config, weights, model, dict(model.named_modules()))


def _skeleton(config: dict[str, Any], name: Path) -> nn.Module:
    from mlx_lm.utils import _get_classes

    try:
        model_class, arguments = _get_classes(config)
        model: nn.Module = model_class(arguments.from_dict(config))
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{name}: mlx-lm cannot make a model of its metadata "
            f"({' '.join(str(error).split())[:200]}): update mlx-lm, or get the file again."
        ) from None
    if config.get("tie_word_embeddings") and "lm_head" in model:
        # Some classes make a head and let their sanitize drop it, and remember that.
        model.pop("lm_head")
        if hasattr(model, "tie_word_embeddings"):
            model.tie_word_embeddings = True
    return model


def _check_complete(
    source: GgufSource,
    unused: tuple[str, ...],
    weights: Mapping[str, Weight],
    parameters: Mapping[str, mx.array],
) -> None:
    name = source.parts[0]
    missing = sorted(set(parameters) - set(weights))
    if missing:
        raise UserError(
            f"{name} lacks the tensor for {missing[0]} ({len(missing)} missing in all): it is "
            f"incomplete, or a variant of {source.architecture} that cannot be run with MLX."
        )
    stray = sorted(set(weights) - set(parameters))
    if stray:
        raise UserError(
            f"{name} holds {weights[stray[0]].pieces[0].tensor}, for which mlx-lm's model has no "
            f"{stray[0]}: this variant of {source.architecture} cannot be run with MLX."
        )
    used = {piece.tensor for weight in weights.values() for piece in weight.pieces}
    for tensor in source.tensors:
        known = tensor in used or tensor in ROPE_TABLES
        if not known and not any(re.search(pattern, tensor) for pattern in unused):
            raise UserError(
                f"{name} holds {tensor}, which has no place in mlx-lm's model for "
                f"{source.architecture}: this variant cannot be run with MLX."
            )
    for path, weight in weights.items():
        if weight.change is None:
            shape = _shape(source, weight)
            if shape != parameters[path].shape:
                raise UserError(
                    f"{name}: {weight.pieces[0].tensor} has the shape {shape}, but its metadata "
                    f"ask for {parameters[path].shape}: get the file again."
                )


def _shape(source: GgufSource, weight: Weight) -> tuple[int, ...]:
    if weight.shape is not None:
        return weight.shape
    entries = [source.tensor(piece.tensor) for piece in weight.pieces]
    if len(entries) == 1 and weight.pieces[0].rows is None:
        return entries[0].shape
    rows = sum(
        _row_count(entry) if piece.rows is None else len(piece.rows)
        for piece, entry in zip(weight.pieces, entries, strict=True)
    )
    return (rows,) if len(entries[0].shape) == 1 else (rows, entries[0].shape[-1])


def _row_count(entry: TensorEntry) -> int:
    return entry.shape[0] if len(entry.shape) == 1 else entry.rows


# --------------------------------------------------------------------------------------------------
# Values


def _type(source: GgufSource, weight: Weight) -> GGMLQuantizationType | None:
    """The one type of all its pieces; None when they differ or their columns move too finely."""
    kinds = {source.tensor(piece.tensor).type for piece in weight.pieces}
    if len(kinds) > 1 or weight.change is not None:
        return None
    return next(iter(kinds))


def _whole_groups(columns: np.ndarray, group: int) -> np.ndarray | None:
    """Where whole groups of columns go, as indices of groups; None when groups are torn apart."""
    if len(columns) % group:
        return None
    table = columns.reshape(-1, group)
    if (table[:, 0] % group).any() or (np.diff(table, axis=1) != 1).any():
        return None
    return table[:, 0] // group


def _can_move(weight: Weight, kind: GGMLQuantizationType) -> bool:
    """Whether the blocks can be moved without looking at values."""
    for piece in weight.pieces:
        if piece.columns is None or kind in _FLOATS:
            continue
        if kind not in types.AFFINE or _whole_groups(piece.columns, types.GROUP) is None:
            return False
    return True


def _raw_slabs(source: GgufSource, weight: Weight) -> Iterator[tuple[np.ndarray, int]]:
    """The raw rows of all pieces in order, contiguous, a slab at a time, with the piece's index."""
    for index, piece in enumerate(weight.pieces):
        entry = source.tensor(piece.tensor)
        raw = source.raw(piece.tensor)
        step = max(1, SLAB // entry.shape[-1])
        count = len(raw) if piece.rows is None else len(piece.rows)
        for first in range(0, count, step):
            part = slice(first, min(first + step, count))
            yield raw[part] if piece.rows is None else raw[piece.rows[part]], index
        source.release(piece.tensor)


def _values(source: GgufSource, weight: Weight) -> np.ndarray:
    """A parameter's values, float32 in its shape."""
    parts = []
    for piece in weight.pieces:
        entry = source.tensor(piece.tensor)
        values = source.values(piece.tensor)
        source.release(piece.tensor)
        if len(entry.shape) == 1:
            parts.append(values if piece.rows is None else values[piece.rows])
            continue
        if piece.rows is None and piece.columns is None and len(weight.pieces) == 1:
            parts.append(values)
            break
        values = values.reshape(-1, entry.shape[-1])
        if piece.rows is not None:
            values = values[piece.rows]
        if piece.columns is not None:
            values = values[:, piece.columns]
        parts.append(values)
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    whole = whole.reshape(_shape(source, weight))
    return whole if weight.change is None else np.asarray(weight.change(whole), dtype=np.float32)


def _float_slabs(source: GgufSource, weight: Weight) -> Iterator[mx.array]:
    """A matrix's values, float32 (rows, n) a slab at a time; for weights without a change."""
    for raw, index in _raw_slabs(source, weight):
        piece = weight.pieces[index]
        entry = source.tensor(piece.tensor)
        values = mx.array(_decode(raw, entry))
        yield values if piece.columns is None else values[:, mx.array(piece.columns)]


def _decode(raw: np.ndarray, entry: TensorEntry) -> np.ndarray:
    import gguf

    with np.errstate(all="ignore"):
        found = gguf.quants.dequantize(np.ascontiguousarray(raw), entry.type)
    return np.asarray(found, dtype=np.float32).reshape(len(raw), entry.shape[-1])


def _moved(
    source: GgufSource, weight: Weight, kind: GGMLQuantizationType, *, exact: bool = False
) -> Iterator[Any]:
    """MLX's arrays of a type that is repacked, a slab of rows at a time."""
    for raw, index in _raw_slabs(source, weight):
        piece = weight.pieces[index]
        n = source.tensor(piece.tensor).shape[-1]
        try:
            if piece.columns is None:
                yield types.repack(raw, n, kind, exact=exact)
                continue
            grid = grid_codec(kind).decode(raw, n)
            turned = _with_columns(grid, piece.columns)
            yield types.affine(turned, types.AFFINE[kind], exact=exact)
        except UserError as error:
            raise UserError(f"{piece.tensor} in {source.parts[0]}: {error}") from None


def _with_columns(grid: Grid, columns: np.ndarray) -> Grid:
    """The grid with its columns in another order, whole groups of 32 at a time."""
    groups = _whole_groups(columns, grid.group)
    assert groups is not None
    return Grid(
        codes=np.ascontiguousarray(grid.codes[:, columns]),
        levels=grid.levels,
        scales=np.ascontiguousarray(grid.scales[:, groups]),
        offsets=None if grid.offsets is None else np.ascontiguousarray(grid.offsets[:, groups]),
        group=grid.group,
    )


def _join(slabs: list[types.MlxQuantized]) -> types.MlxQuantized:
    if len(slabs) == 1:
        return slabs[0]
    first = slabs[0]
    return types.MlxQuantized(
        np.concatenate([slab.weight for slab in slabs]),
        # One slab in float32 makes all of them so.
        np.concatenate([slab.scales for slab in slabs]),
        None
        if first.biases is None
        else np.concatenate([slab.biases for slab in slabs if slab.biases is not None]),
        first.bits,
        first.mode,
    )


# --------------------------------------------------------------------------------------------------
# In memory


@dataclass(frozen=True)
class Loaded:
    """A GGUF as a model in memory.

    Attributes:
        model: mlx-lm's model, its weights evaluated.
        config: config.json.
        layout: which parameter is which tensor.
    """

    model: nn.Module
    config: dict[str, Any]
    layout: Layout


def load(
    source: GgufSource,
    *,
    widen: bool | None = None,
    native: bool | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """The model of a GGUF, computing in float32.

    Args:
        source: open; not needed afterwards.
        widen: unpack all weights to float32 at once. By default on a CPU where that takes little
            more memory than the file.
        native: use MLX's own quantized modules where there is one. By default on a GPU.
        progress: called with the bytes of the GGUF that were dealt with.

    Raises:
        UserError: as `layout`, and for damaged or infinite values.
    """
    found = layout(source)
    on_cpu = bool(mx.default_device() == mx.Device(mx.cpu))
    if native is None:
        native = not on_cpu
    if widen is None:
        size = sum(entry.nbytes for entry in source.tensors.values())
        weights = sum(int(np.prod(entry.shape)) for entry in source.tensors.values())
        widen = on_cpu and 4 * weights <= size + _AFFORDABLE
    replaced: dict[str, nn.Module] = {}
    values: list[tuple[str, mx.array]] = []
    for path, weight in found.weights.items():
        module_path, _, name = path.rpartition(".")
        module = found.modules.get(module_path)
        kind = _type(source, weight)
        new = None
        if name == "weight" and module is not None and kind is not None and not widen:
            new = _module(source, found, weight, kind, module, native)
        if new is not None:
            replaced[module_path] = new
            # A bias is a weight of its own, and comes by itself.
            values += [(f"{module_path}.{key}", one) for key, one in _parameters(new)
                       if key != "bias"]  # fmt: skip
        else:
            values.append((path, mx.array(_values(source, weight))))
        mx.eval(values[-1][1])
        if progress:
            progress(sum(source.tensor(piece.tensor).nbytes for piece in weight.pieces))
    if replaced:
        found.model.update_modules(_tree(replaced))
    found.model.load_weights(values, strict=True)
    found.model.eval()
    if on_cpu:
        on_cpu_functions.install()
        if widen:
            packed.hold(found.model)
    _check_finite(found.model, source)
    return Loaded(found.model, found.config, found)


def _parameters(module: nn.Module) -> list[tuple[str, mx.array]]:
    found: Any = tree_flatten(module.parameters())
    return list(found)


# What a small model may take more than its file.
_AFFORDABLE = 256 << 20


def _tree(modules: Mapping[str, nn.Module]) -> Any:
    from mlx.utils import tree_unflatten

    return tree_unflatten(list(modules.items()))


def _module(
    source: GgufSource,
    found: Layout,
    weight: Weight,
    kind: GGMLQuantizationType,
    like: nn.Module,
    native: bool,
) -> nn.Module | None:
    """A module that holds a quantized or half-precision matrix as it is; None to widen it."""
    shape = _shape(source, weight)
    if not _can_move(weight, kind) or not packed.is_packed(kind):
        return None
    bias_path = weight.path.removesuffix("weight") + "bias"
    bias = None
    if bias_path in found.weights:
        bias = mx.zeros(_shape(source, found.weights[bias_path]))
    n = shape[-1]
    if types.is_repacked(kind):
        moved = _join(list(_moved(source, weight, kind)))
        if native and hasattr(like, "to_quantized"):
            return _native(like, moved, shape, bias)
        form, parts = packed.from_mlx(moved, n)
    else:
        if any(piece.columns is not None for piece in weight.pieces):
            return None
        forms = [packed.pack_rows(raw, n, kind)
                 for raw, _ in _raw_slabs(source, weight)]  # fmt: skip
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
    return packed.packed_module(like, form, arrays, shape, bias)


def _native(
    like: nn.Module, moved: types.MlxQuantized, shape: tuple[int, ...], bias: mx.array | None
) -> nn.Module:
    """MLX's own quantized module of the kind of ``like``, holding these arrays."""
    # Lazily: what it makes of the skeleton's own weights is replaced before anyone looks.
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


def _check_finite(model: nn.Module, source: GgufSource) -> None:
    for path, value in _parameters(model):
        if mx.issubdtype(value.dtype, mx.floating) and not mx.isfinite(value).all().item():
            raise UserError(
                f"{source.parts[0]}: the values of {path} are not all finite: the file is damaged, "
                "get it again."
            )


# --------------------------------------------------------------------------------------------------
# As a folder


@dataclass(frozen=True)
class FolderReport:
    """What was written.

    Attributes:
        path: the folder.
        forms: how many matrices became what, such as {"affine 4-bit": 14, "bfloat16": 2}.
        bytes: of all safetensors files.
        left_out: tensors of multi-token prediction, for which mlx-lm's models have no place.
        config: its config.json.
    """

    path: Path
    forms: dict[str, int]
    bytes: int
    left_out: tuple[str, ...]
    config: Mapping[str, Any]


def write_folder(
    source: GgufSource,
    out: Path,
    *,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    label: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    progress: Progress | None = None,
) -> FolderReport:
    """Write a GGUF as a folder that mlx-lm loads; whole, or not at all.

    Types that MLX has too are moved without requantizing; plain floats stay in their type; any
    other type becomes bfloat16, or with ``bits`` is quantized by MLX. A slab of one tensor is in
    memory at a time.

    Args:
        out: must not exist.
        bits: 2, 3, 4, 5, 6 or 8, for matrices of types that MLX does not have.
        group_size: 32, 64 or 128, for the same.
        dtype: float16, bfloat16 or float32 for all floats, scales included, instead of exact ones.
            mlx-lm computes in float32 where types mix, which is exact, but slower.
        label: what the folder says of an edit of the model, under ``abl_mlx`` in its config.json.
        tags: more tags of its card.
        progress: called with the bytes of the GGUF that were dealt with.

    Raises:
        UserError: as `layout`, for a tokenizer that cannot be written, an output that exists.
    """
    out = Path(out)
    check_new(out)
    found = layout(source)
    with new_folder(out) as folder:
        report = fill_folder(
            source,
            found,
            folder,
            bits=bits,
            group_size=group_size,
            dtype=dtype,
            extra={"abl_mlx": dict(label)} if label else None,
            progress=progress,
        )
        card = _card(source, report.forms, label or {}, tags)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return replace(report, path=out)


def fill_folder(
    source: GgufSource,
    found: Layout,
    folder: Path,
    *,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    extra: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> FolderReport:
    """As `write_folder`, into a folder that is there, and without a card.

    Args:
        found: from `layout`.
        extra: further keys of config.json.
    """
    cast = None if dtype is None else _CASTS[dtype]
    forms: dict[str, int] = {}
    settings: dict[str, Any] = {}
    config = found.config | write_tokenizer(source.metadata, folder)
    writer = _Shards(folder, len(found.weights) * 3)
    for path, weight in found.weights.items():
        module = path.removesuffix(".weight")
        form = _write_weight(source, found, path, weight, writer, bits, group_size, cast)
        if form.quantization is not None:
            settings[module] = form.quantization
        if len(_shape(source, weight)) > 1:
            forms[form.name] = forms.get(form.name, 0) + 1
        if progress:
            progress(sum(source.tensor(piece.tensor).nbytes for piece in weight.pieces))
    size = writer.close()
    if settings:
        usual = max(settings.values(), key=list(settings.values()).count)
        config["quantization"] = {**usual, **settings}
        config["quantization_config"] = config["quantization"]
    config |= dict(extra or {})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return FolderReport(folder, forms, size, drafting(source), config)


def drafting(source: GgufSource) -> tuple[str, ...]:
    """Names of the tensors that only draft further tokens, which no folder of mlx-lm's holds."""
    patterns = Keys(source).drafting
    return tuple(n for n in source.tensors if any(re.search(pattern, n) for pattern in patterns))


_CASTS = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}

DTYPES = tuple(_CASTS)
"""What ``dtype`` of `write_folder` may be."""


def read_back(found: Layout, folder: Path, files: TensorFiles, tensor: str) -> mx.array:
    """A GGUF tensor's values as a written folder holds them: float32, in the GGUF's shape.

    Args:
        found: the layout of the GGUF the folder was written from.
        folder: where it is.
        files: its tensors.
        tensor: a matrix or vector that is one parameter, whole.
    """
    paths = found.places()[tensor]
    weight = found.weights[paths[0]]
    piece = weight.pieces[0]
    if len(paths) > 1 or len(weight.pieces) > 1 or piece.rows is not None or weight.change:
        raise ValueError(f"{tensor} is not one whole parameter")
    module = paths[0].removesuffix(".weight")
    values = files.read(paths[0])
    if f"{module}.scales" in files:
        settings = json_text.read(folder / "config.json")["quantization"][module]
        scales = files.read(f"{module}.scales")
        biases = files.read(f"{module}.biases") if f"{module}.biases" in files else None
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        values = mx.dequantize(values, scales, biases, **settings, dtype=mx.float32)
    values = values.astype(mx.float32)
    if piece.columns is None:
        return values
    return values[..., mx.array(np.argsort(piece.columns))]


@dataclass(frozen=True)
class _Form:
    name: str
    quantization: dict[str, Any] | None = None


def _write_weight(
    source: GgufSource,
    found: Layout,
    path: str,
    weight: Weight,
    writer: _Shards,
    bits: int | None,
    group_size: int,
    cast: mx.Dtype | None,
) -> _Form:
    shape = _shape(source, weight)
    kind = _type(source, weight)
    module = found.modules.get(path.removesuffix(".weight"))
    quantizable = module is not None and hasattr(module, "to_quantized")
    if kind is None or len(shape) < 2 or not _can_move(weight, kind):
        values = mx.array(_values(source, weight))
        to = cast or _FLOATS.get(kind or _Q.F32, mx.bfloat16)
        if kind is None and weight.change is None:
            to = cast or mx.bfloat16
        writer.add(path, [_checked(values.astype(to), path, source)])
        return _Form(str(to).removeprefix("mlx.core."))
    lead = shape[:-1]
    if quantizable and types.is_repacked(kind):
        return _write_moved(source, path, weight, kind, writer, lead, cast)
    if quantizable and bits and kind not in (_Q.F32, _Q.F64) and shape[-1] % group_size == 0:
        return _write_quantized(source, path, weight, writer, lead, bits, group_size, cast)
    to = cast or _FLOATS.get(kind, mx.bfloat16)
    writer.add(
        path,
        (_checked(values.astype(to), path, source) for values in _float_slabs(source, weight)),
        shape,
    )
    return _Form(str(to).removeprefix("mlx.core."))


def _write_moved(
    source: GgufSource,
    path: str,
    weight: Weight,
    kind: GGMLQuantizationType,
    writer: _Shards,
    lead: tuple[int, ...],
    cast: mx.Dtype | None,
) -> _Form:
    rest: list[types.MlxQuantized] = []

    def codes() -> Iterator[mx.array]:
        for slab in _moved(source, weight, kind, exact=cast is not None and cast == mx.float32):
            rest.append(slab)
            yield mx.array(slab.weight)

    module = path.removesuffix(".weight")
    writer.add(path, codes(), lead)
    mode, code_bits = rest[0].mode, rest[0].bits
    for name in ("scales", "biases"):
        parts = [getattr(slab, name) for slab in rest]
        if parts[0] is None:
            continue
        values = mx.array(np.concatenate(parts))
        if cast is not None and mode == "affine":
            values = _checked(values.astype(cast), path, source)
        writer.add(f"{module}.{name}", [values], lead)
    settings = {"group_size": types.GROUP, "bits": code_bits, "mode": mode}
    return _Form(f"{mode} {code_bits}-bit" if mode == "affine" else mode, settings)


def _write_quantized(
    source: GgufSource,
    path: str,
    weight: Weight,
    writer: _Shards,
    lead: tuple[int, ...],
    bits: int,
    group_size: int,
    cast: mx.Dtype | None,
) -> _Form:
    rest: list[tuple[mx.array, mx.array]] = []

    def codes() -> Iterator[mx.array]:
        for values in _float_slabs(source, weight):
            code, *others = mx.quantize(values, group_size=group_size, bits=bits)
            mx.eval(code, others)
            rest.append((others[0], others[1]))
            yield code

    module = path.removesuffix(".weight")
    writer.add(path, codes(), lead)
    for index, name in enumerate(("scales", "biases")):
        values = mx.concatenate([pair[index] for pair in rest])
        values = values.astype(cast or mx.bfloat16)
        writer.add(f"{module}.{name}", [_checked(values, path, source)], lead)
    settings = {"group_size": group_size, "bits": bits, "mode": "affine"}
    return _Form(f"quantized by MLX to {bits} bits", settings)


def _checked(values: mx.array, path: str, source: GgufSource) -> mx.array:
    if not mx.isfinite(values).all().item():
        raise UserError(
            f"{source.parts[0]}: the values of {path} are not all finite numbers of "
            f"{str(values.dtype).removeprefix('mlx.core.')}: the file is damaged, get it again (or "
            f"choose another {OPTION}).",
            option="dtype",
        )
    return values


_DTYPES = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8",
}  # fmt: skip


class _Shards:
    """Safetensors files written tensor by tensor, their headers last."""

    def __init__(self, folder: Path, tensors: int) -> None:
        self._folder = folder
        # A name, a type, a shape and two offsets, generously.
        self._room = 256 * (tensors + 4)
        self._files: list[tuple[Path, dict[str, Any]]] = []
        self._stream: Any = None
        self._at = 0

    def add(self, name: str, slabs: Any, shape: tuple[int, ...] | None = None) -> None:
        """Append a tensor.

        Args:
            slabs: arrays, joined along the first axis.
            shape: of the whole; its last dimension may be left out.
        """
        if self._stream is None or self._at > SHARD:
            self._finish()
            path = self._folder / f"part-{len(self._files):05d}"
            self._stream = open(path, "wb")  # noqa: SIM115 - closed in _finish
            self._stream.seek(8 + self._room)
            self._files.append((path, {"__metadata__": {"format": "mlx"}}))
            self._at = 0
        start, rows = self._at, 0
        width: tuple[int, ...] = ()
        dtype = mx.float32
        for slab in slabs:
            dtype = slab.dtype
            width = slab.shape[1:]
            rows += slab.shape[0]
            mx.eval(slab)
            data = np.array(slab.view(mx.uint8), copy=False).tobytes()
            self._stream.write(data)
            self._at += len(data)
        if shape is None:
            whole = (rows, *width)
        else:
            whole = shape if int(np.prod(shape)) == rows * int(np.prod(width)) else (*shape, *width)
        self._files[-1][1][name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(whole),
            "data_offsets": [start, self._at],
        }

    def close(self) -> int:
        """Write the headers, name the files, and return the bytes of all of them."""
        self._finish()
        count, size = len(self._files), 0
        index: dict[str, str] = {}
        for number, (path, header) in enumerate(self._files):
            name = (
                "model.safetensors"
                if count == 1
                else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            )
            path.rename(self._folder / name)
            size += (self._folder / name).stat().st_size
            index.update((key, name) for key in header if key != "__metadata__")
        if count > 1:
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
            (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        return size

    def _finish(self) -> None:
        if self._stream is None:
            return
        with self._stream as stream:
            header = json.dumps(self._files[-1][1], separators=(",", ":")).encode()
            assert len(header) <= self._room
            stream.seek(0)
            stream.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._stream = None


def _card(
    source: GgufSource, forms: Mapping[str, int], label: Mapping[str, Any], tags: Sequence[str]
) -> str:
    known = source.metadata
    title = known.get("general.name") or source.parts[0].stem
    lines = ["---", "library_name: mlx", "tags:", "- mlx", *(f"- {tag}" for tag in tags)]
    if isinstance(known.get("general.license"), str):
        lines.append(f"license: {escape.yaml(known['general.license'])}")
    made = ", ".join(f"{count} matrices {name}" for name, count in forms.items())
    lines += [
        "---",
        f"# {escape.markdown(str(title))}",
        "",
        f"Converted from {escape.code(source.parts[0].name)} by abl-mlx: {made}.",
        "",
    ]
    if label:
        edited = escape.markdown(str(label.get("edited", "see config.json")))
        lines += [f"**This is an edited model**: {edited}.", ""]
    return "\n".join(lines)
