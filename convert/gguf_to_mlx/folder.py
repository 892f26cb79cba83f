"""Write a GGUF as a folder that mlx-lm loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType

from convert.architectures.keys import Keys
from convert.architectures.moves import put, row_count, rows_of
from convert.architectures.weights import Weight
from convert.base import escape, json_text
from convert.base.atomic import check_new, new_folder
from convert.base.errors import OPTION, UserError, of
from convert.gguf.file import GgufSource
from convert.gguf_to_mlx.parameters import Layout, layout, shape_of
from convert.gguf_to_mlx.values import (
    FLOATS,
    can_move,
    float_slabs,
    moved_slabs,
    type_of,
    values_of,
)
from convert.mlx import types
from convert.mlx.safetensors_files import TensorFiles
from convert.mlx.shards import Shards
from convert.tokenizers.from_gguf import write_tokenizer

_Q = GGMLQuantizationType

Progress = Callable[[int], object]


@dataclass(frozen=True)
class FolderReport:
    """What was written.

    Attributes:
        path: the folder.
        forms: format -> number of matrices in it, such as {"affine 4-bit": 14, "bfloat16": 2}.
        bytes: total size of the safetensors files.
        left_out: names of the tensors for multi-token prediction, which mlx-lm's models lack.
        config: the contents of its config.json.
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
    """Write a GGUF as a folder that mlx-lm loads; the folder appears complete or not at all.

    Types that MLX has as well are repacked without requantizing; plain floats keep their type; any
    other type becomes bfloat16, or with ``bits`` is quantized by MLX. Only a part (slab) of one
    tensor is in memory at a time.

    Args:
        source: an open GGUF.
        out: must not exist.
        bits: 2, 3, 4, 5, 6 or 8: quantize matrices of types that MLX does not have.
        group_size: 32, 64 or 128 weights per scale, used with ``bits``.
        dtype: float16, bfloat16 or float32 for all floats, scales included, instead of exact ones.
            mlx-lm computes in float32 where types mix, which is exact, but slower.
        label: a description of an edit of the model, kept under ``abl_mlx`` in config.json.
        tags: further tags of the model card.
        progress: called with the number of bytes of the GGUF that were converted.

    Returns:
        What was written.

    Raises:
        UserError: as `layout` does; when the tokenizer cannot be written or the output exists.
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
    """Do what `write_folder` does, in an existing folder and without a model card.

    Args:
        source: an open GGUF.
        found: its `layout`.
        folder: an existing, empty folder.
        bits, group_size, dtype, progress: as for `write_folder`.
        extra: further keys of config.json.
    """
    cast = None if dtype is None else _CASTS[dtype]
    forms: dict[str, int] = {}
    settings: dict[str, Any] = {}
    with of(source.parts[0]):
        config = found.config | write_tokenizer(source.metadata, folder)
    writer = Shards(folder, len(found.weights) * 3)
    for path, weight in found.weights.items():
        module = path.removesuffix(".weight")
        form = _write_weight(source, found, path, weight, writer, bits, group_size, cast)
        if form.quantization is not None:
            settings[module] = form.quantization
        if len(shape_of(source, weight)) > 1:
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
    """Names of the tensors for multi-token prediction, which mlx-lm's folders do not hold."""
    patterns = Keys(source).drafting
    return tuple(n for n in source.tensors if any(re.search(pattern, n) for pattern in patterns))


_CASTS = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}

DTYPES = tuple(_CASTS)
"""The accepted values of `write_folder`'s ``dtype``."""


def read_back(
    found: Layout,
    folder: Path,
    files: TensorFiles,
    tensor: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> mx.array:
    """A GGUF tensor's values as a written folder holds them: float32, in the GGUF's shape.

    Args:
        found: the layout of the GGUF from which the folder was written.
        folder: the written folder.
        files: its tensors.
        tensor: the name of a GGUF tensor.
        shapes: the shape of every GGUF tensor, in NumPy's order.
    """
    values = np.empty(shapes[tensor], dtype=np.float32)
    for path in found.places()[tensor]:
        one = np.array(_parameter(folder, files, path).astype(mx.float32))
        put(found.weights[path], one, tensor, rows_of(values), row_count(shapes))
    return mx.array(values)


def _parameter(folder: Path, files: TensorFiles, path: str) -> mx.array:
    """A parameter's values, dequantized if it is quantized."""
    module = path.removesuffix(".weight")
    values = files.read(path)
    if f"{module}.scales" in files:
        settings = json_text.read(folder / "config.json")["quantization"][module]
        scales = files.read(f"{module}.scales")
        biases = files.read(f"{module}.biases") if f"{module}.biases" in files else None
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        values = mx.dequantize(values, scales, biases, **settings, dtype=mx.float32)
    return values


@dataclass(frozen=True)
class _Form:
    name: str
    quantization: dict[str, Any] | None = None


def _write_weight(
    source: GgufSource,
    found: Layout,
    path: str,
    weight: Weight,
    writer: Shards,
    bits: int | None,
    group_size: int,
    cast: mx.Dtype | None,
) -> _Form:
    shape = shape_of(source, weight)
    kind = type_of(source, weight)
    module = found.modules.get(path.removesuffix(".weight"))
    quantizable = module is not None and hasattr(module, "to_quantized")
    if kind is None or len(shape) < 2 or not can_move(weight, kind):
        values = mx.array(values_of(source, weight))
        to = cast or FLOATS.get(kind or _Q.F32, mx.bfloat16)
        if kind is None and weight.change is None:
            to = cast or mx.bfloat16
        writer.add(path, [_checked(values.astype(to), path, source)])
        return _Form(str(to).removeprefix("mlx.core."))
    lead = shape[:-1]
    if quantizable and types.is_repacked(kind):
        return _write_moved(source, path, weight, kind, writer, lead, cast)
    if quantizable and bits and kind not in (_Q.F32, _Q.F64) and shape[-1] % group_size == 0:
        return _write_quantized(source, path, weight, writer, lead, bits, group_size, cast)
    to = cast or FLOATS.get(kind, mx.bfloat16)
    writer.add(
        path,
        (_checked(values.astype(to), path, source) for values in float_slabs(source, weight)),
        shape,
    )
    return _Form(str(to).removeprefix("mlx.core."))


def _write_moved(
    source: GgufSource,
    path: str,
    weight: Weight,
    kind: GGMLQuantizationType,
    writer: Shards,
    lead: tuple[int, ...],
    cast: mx.Dtype | None,
) -> _Form:
    rest: list[types.MlxQuantized] = []

    def codes() -> Iterator[mx.array]:
        for slab in moved_slabs(
            source, weight, kind, exact=cast is not None and cast == mx.float32
        ):
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
    writer: Shards,
    lead: tuple[int, ...],
    bits: int,
    group_size: int,
    cast: mx.Dtype | None,
) -> _Form:
    rest: list[tuple[mx.array, mx.array]] = []

    def codes() -> Iterator[mx.array]:
        for values in float_slabs(source, weight):
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
