"""Write an MLX or Hugging Face model folder as one GGUF file, tensor by tensor.

Each tensor gets the type that llama.cpp's quantizer would choose (`convert.gguf.mix`), encoded by
ggml; names and metadata are those of llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from convert.architectures import hf_to_gguf
from convert.architectures.hf_to_gguf import Target
from convert.base.atomic import check_new, new_file
from convert.base.errors import UserError
from convert.base.hf_config import read_config
from convert.base.hf_counts import check_counts
from convert.gguf import file_types, ggml, ggml_types, mix
from convert.gguf.file_types import FILE_TYPES
from convert.gguf.imatrix import Imatrix
from convert.gguf.values import Value, value_type
from convert.mlx.other_quantization import refuse_quantized
from convert.mlx.safetensors_files import TensorFiles
from convert.tokenizers import phi3
from convert.tokenizers.to_gguf import Tokenizer, read_tokenizer

Edit = Callable[[mx.array], mx.array]

_Q = GGMLQuantizationType

#: Encodes an edited tensor: (source name, float32 values, type, importance of its input columns)
#: -> float16, or the type's bytes.
Quantizer = Callable[[str, np.ndarray, GGMLQuantizationType, np.ndarray | None], np.ndarray]


@dataclass(frozen=True)
class GgufReport:
    """What was written.

    Attributes:
        path: the file.
        tensors: source tensor name -> GGUF tensor name; every expert has the name of its stack.
        types: GGUF tensor name -> its type, such as "Q6_K".
        bytes: the file's size.
        left_out: source tensors that the GGUF does not hold: those of a vision tower.
    """

    path: Path
    tensors: dict[str, str]
    types: dict[str, str]
    bytes: int
    left_out: tuple[str, ...] = ()


def write_gguf(
    folder: Path,
    out: Path,
    *,
    file_type: str = "F16",
    edits: Mapping[str, Edit] | None = None,
    metadata: Mapping[str, Value] | None = None,
    pre: str | None = None,
    quantize: Quantizer | None = None,
    imatrix: Imatrix | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GgufReport:
    """Write the model in ``folder`` as the GGUF file ``out``.

    One tensor is in memory at a time. The file appears under its name complete or not at all.

    Args:
        folder: a folder with config.json, model*.safetensors in F32, F16 or BF16, and a tokenizer.
        out: must not exist.
        file_type: a key of `convert.gguf.file_types.FILE_TYPES` or of its ``ALIASES``.
        edits: tensor name in the safetensors files -> function from the whole tensor, float32
            (out, in), to the edited one in the same shape. It is called before rows are permuted,
            experts stacked and values quantized.
        metadata: further GGUF keys, or other values for existing keys: str, bool, int (uint32, or
            int64 where it does not fit), float (float32), list of str.
        pre: the value of tokenizer.ggml.pre, where it cannot be found from the tokenizer.
        quantize: used in place of `encode` for edited tensors of all types but F32: (source name,
            float32 values in GGUF's layout, type, importance) -> what `encode` would return. Types
            without a codec are replaced by `convert.gguf.ggml_types.finer_type`.
        imatrix: an importance matrix, which weights the errors of input columns.
        progress: called with (tensors written, tensors in all).

    Raises:
        UserError: when the architecture or tokenizer is not supported, the source is quantized, a
            tensor has no place in a GGUF or is not finite, an edit is of a missing tensor or
            changes the shape, a quantized type is asked for without ggml, or the output exists.
    """
    folder, out = Path(folder), Path(out)
    check_new(out)
    with TensorFiles(folder) as files:
        layout = _layout(folder, files, file_type, pre, imatrix)
        targets, extras, types = layout.targets, layout.extras, layout.types
        edits = edits or {}
        for target in targets if quantize else ():
            if target.sources[0] in edits:
                types[target.name] = ggml_types.finer_type(types[target.name])
        left_out = tuple(name for name in files.names if hf_to_gguf.is_vision(name))
        _refuse_stray_edits(edits, targets, files)
        keys = _metadata(folder, layout)
        keys.update(imatrix.metadata() if imatrix else {})
        keys.update(metadata or {})
        keys["general.name"] = phi3.named(
            str(keys["general.name"]), phi3=bool(layout.tokenizer.rstrip)
        )
        with new_file(out) as partial:
            writer = gguf.GGUFWriter(partial, hf_to_gguf.architecture(layout.config).gguf)
            try:
                _add_metadata(writer, keys)
                for target in targets:
                    _add_info(writer, target.name, _shape(target, files), types[target.name])
                for name, values in extras.items():
                    _add_info(writer, name, values.shape, _Q.F32)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                arrays = _arrays(layout, files, edits, quantize, imatrix)
                for done, array in enumerate(arrays, start=1):
                    writer.write_tensor_data(array)
                    if progress:
                        progress(done, len(targets) + len(extras))
            finally:
                writer.close()
            size = partial.stat().st_size
    return GgufReport(
        path=out,
        tensors={source: target.name for target in targets for source in target.sources},
        types={name: kind.name for name, kind in types.items()},
        bytes=size,
        left_out=left_out,
    )


def check_convertible(
    folder: Path, file_type: str, *, pre: str | None = None, imatrix: Imatrix | None = None
) -> None:
    """Check, before any long work, what `write_gguf` can check from the files' headers alone.

    Raises:
        UserError: as `write_gguf` does, except for reasons that lie in the tensors' values.
    """
    with TensorFiles(Path(folder)) as files:
        _layout(Path(folder), files, file_type, pre, imatrix)


@dataclass(frozen=True)
class _Layout:
    """Everything about a file to be written except its values."""

    config: dict[str, Any]
    file_type: str
    targets: list[Target]
    extras: dict[str, np.ndarray]
    types: dict[str, GGMLQuantizationType]
    tokenizer: Tokenizer


def _layout(
    folder: Path,
    files: TensorFiles,
    file_type: str,
    pre: str | None,
    imatrix: Imatrix | None,
) -> _Layout:
    file_type = file_types.file_type(file_type)
    config = read_config(folder)
    refuse_quantized(folder, config, files)
    check_counts(folder, config, {name: files.info(name).shape for name in files.names})
    _refuse_integers(files)
    targets = hf_to_gguf.plan(config, files.names)
    rows = files.info(_source(targets, "token_embd.weight")).shape[0]
    tokenizer = read_tokenizer(folder, rows, pre=pre)
    _check_heads(targets, files)
    extras = hf_to_gguf.extra_tensors(config)
    facts = mix.Facts.of(hf_to_gguf.hyperparameters(config), hf_to_gguf.architecture(config).gguf)
    shapes = {target.name: (_shape(target, files), _Q.F32) for target in targets}
    types = mix.types(file_type, shapes, facts, importance=imatrix is not None)
    if imatrix is None:
        mix.check_importance(file_type, types)
    else:
        imatrix.check({name: shape for name, (shape, _) in shapes.items()})
    types.update(dict.fromkeys(extras, _Q.F32))
    ggml.check(types.values())
    return _Layout(config, file_type, targets, extras, types, tokenizer)


def encode(
    values: np.ndarray, to: GGMLQuantizationType, name: str, importance: np.ndarray | None = None
) -> np.ndarray:
    """Encode float32 values for a GGUF tensor: as float32, float16 or bytes of the type.

    Args:
        values: float32, (..., n).
        to: F32, F16, BF16, or a quantized type whose block divides n.
        name: the tensor's name, for messages.
        importance: weights of the columns' squared errors, as for `convert.gguf.ggml.quantize`.

    Raises:
        UserError: naming the tensor, when a value is too large for float16.
    """
    if to == _Q.F32:
        return np.ascontiguousarray(values, dtype=np.float32)
    if to == _Q.F16:
        if values.size and np.abs(values).max() > np.finfo(np.float16).max:
            raise UserError(f"{name} holds values too large for F16: write BF16 or Q8_0 instead.")
        return values.astype(np.float16)
    if to == _Q.BF16:
        return gguf.quants.quantize(values, to)
    return ggml.quantize(values, to, importance)


# --------------------------------------------------------------------------------------------------
# Checks


def _refuse_integers(files: TensorFiles) -> None:
    for name in files.names:
        info = files.info(name)
        if info.dtype not in ("F32", "F16", "BF16", "F64") and not hf_to_gguf.is_skipped(name):
            raise UserError(
                f"{name} in {info.file} is stored as {info.dtype}: take the float model it was "
                "made from."
            )


def _check_heads(targets: list[Target], files: TensorFiles) -> None:
    """Refuse a config.json whose number of heads does not divide the rows of a tensor."""
    for target in targets:
        rows = _shape(target, files)[0] if _shape(target, files) else 0
        if target.permute_heads and rows % (2 * target.permute_heads):
            raise UserError(
                f"{target.sources[0]} has {rows} rows, which are not {target.permute_heads} heads "
                "of an even size as config.json says: fetch config.json again."
            )


def _refuse_stray_edits(
    edits: Mapping[str, Edit], targets: list[Target], files: TensorFiles
) -> None:
    used = {source for target in targets for source in target.sources}
    for name in edits:
        if name not in used:
            where = "is not written to a GGUF file" if name in files else "does not exist"
            raise UserError(f"the tensor {name} is to be edited, but it {where}.")


# --------------------------------------------------------------------------------------------------
# Tensors


def _source(targets: list[Target], name: str) -> str:
    return next(target.sources[0] for target in targets if target.name == name)


def _shape(target: Target, files: TensorFiles) -> tuple[int, ...]:
    shape = files.info(target.sources[0]).shape
    return (len(target.sources), *shape) if target.stacked else shape


def _values(target: Target, files: TensorFiles, edits: Mapping[str, Edit]) -> np.ndarray:
    parts = [_source_values(source, files, edits) for source in target.sources]
    values = np.stack(parts) if target.stacked else parts[0]
    if target.permute_heads:
        values = interleave_rows(values, target.permute_heads)
    if target.offset:
        values = values + np.float32(target.offset)
    if target.scale != 1.0:
        values = values * np.float32(target.scale)
    return values


def _arrays(
    layout: _Layout,
    files: TensorFiles,
    edits: Mapping[str, Edit],
    quantize: Quantizer | None,
    imatrix: Imatrix | None,
) -> Iterator[np.ndarray]:
    """Yield every tensor as it is to be written, one after the other."""
    for target in layout.targets:
        values = _values(target, files, edits)
        kind = layout.types[target.name]
        edited = target.sources[0] in edits and kind != _Q.F32
        importance = imatrix.weights(target.name, values.shape) if imatrix else None
        yield (
            quantize(target.sources[0], values, kind, importance)
            if edited and quantize
            else encode(values, kind, target.name, importance)
        )
    yield from layout.extras.values()


def _source_values(name: str, files: TensorFiles, edits: Mapping[str, Edit]) -> np.ndarray:
    array = files.read(name).astype(mx.float32)
    _check_finite(array, name, "holds")
    if name in edits:
        edited = edits[name](array)
        if edited.shape != array.shape:
            raise UserError(
                f"the edit of {name} changes its shape from {array.shape} to {edited.shape}."
            )
        array = edited.astype(mx.float32)
        _check_finite(array, name, "after its edit holds")
    return np.asarray(array.astype(mx.float32))


def _check_finite(array: mx.array, name: str, how: str) -> None:
    if not mx.all(mx.isfinite(array)).item():
        raise UserError(
            f"{name} {how} NaN or infinite values: download the model again, or convert it from "
            f"bfloat16 instead of float16."
        )


def interleave_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from (first half, second half) to alternating order.

    MLX and Hugging Face rotate dimension i with i + d/2; llama.cpp's llama rotates 2i with 2i + 1.

    Args:
        values: (heads * d, ...), d even.
        heads: how many heads the rows belong to.
    """
    head = values.shape[0] // heads
    halves = values.reshape(heads, 2, head // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _add_info(
    writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType
) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape, dtype=np.int64))
    writer.add_tensor_info(name, shape, np.dtype(np.float32), count // block * size, kind)


# --------------------------------------------------------------------------------------------------
# Metadata


def _metadata(folder: Path, layout: _Layout) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "general.type": "model",
        "general.name": _general_name(folder),
        "general.file_type": int(FILE_TYPES[layout.file_type][0]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    keys.update(hf_to_gguf.hyperparameters(layout.config))
    keys.update(layout.tokenizer.metadata())
    return keys


def _general_name(folder: Path) -> str:
    parts = folder.absolute().parts
    # Hugging Face's cache keeps a model under models--owner--name/snapshots/hash.
    cached = next((part for part in reversed(parts) if part.startswith("models--")), None)
    return cached.split("--")[-1] if cached else folder.absolute().name


def _add_metadata(writer: gguf.GGUFWriter, keys: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        if key in ("general.architecture", "general.alignment"):
            raise UserError(f"{key} is fixed by the file and cannot be given as metadata.")
        kind, inner = value_type(key, value)
        if kind == GGUFValueType.ARRAY and not value:
            # gguf-py cannot write empty arrays.
            continue
        writer.add_key_value(key, value, kind, sub_type=inner)
