"""Write an MLX or Hugging Face model folder as one GGUF file, tensor by tensor.

Each tensor gets the type that llama.cpp's quantizer would choose (`convert.gguf.mix`), encoded by
ggml; names and metadata are those of llama.cpp's converter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from convert.architectures import hf_to_gguf
from convert.architectures.folder_config import architecture, text_config
from convert.architectures.hf_metadata import extra_tensors
from convert.architectures.hf_to_gguf import Plan, Target
from convert.architectures.model_card import card_keys
from convert.architectures.moves import joined, put, row_count, rows_of
from convert.base.atomic import check_new, new_file
from convert.base.errors import UserError
from convert.base.hf_config import read_config
from convert.base.hf_counts import check_counts
from convert.gguf import file_types, ggml, mix
from convert.gguf.file import read_tensor
from convert.gguf.file_types import FILE_TYPES
from convert.gguf.imatrix import Imatrix
from convert.gguf.sampling import sampling_keys
from convert.gguf.values import Value, value_type
from convert.mlx.folder_weights import FLOATS, FolderWeights
from convert.mlx.other_quantization import refuse_foreign
from convert.mlx.safetensors_files import TensorFiles
from convert.tokenizers import phi3
from convert.tokenizers.to_gguf import Tokenizer, read_tokenizer

Edit = Callable[[mx.array], mx.array]

_Q = GGMLQuantizationType

#: Encodes an edited tensor: (source name, float32 values, type, importance of its input columns)
#: -> float16, or the type's bytes.
Quantizer = Callable[[str, np.ndarray, GGMLQuantizationType, np.ndarray | None], np.ndarray]

#: Edits a tensor that keeps its quantized type: (source name, the unedited blocks, uint8 (...,
#: bytes per row), type, importance of its input columns) -> the edited blocks.
BlockEditor = Quantizer


@dataclass(frozen=True)
class GgufReport:
    """What was written.

    Attributes:
        path: the file.
        tensors: source tensor name -> GGUF tensor name; every expert has the name of its stack.
        types: GGUF tensor name -> its type, such as "Q6_K".
        bytes: the file's size.
        left_out: source tensors that the GGUF does not hold: those of a vision tower.
        forms: GGUF tensor name -> how the quantized matrix that it comes from was written, such as
            "4-bit, groups of 64, kept as Q4_1" or "8-bit, groups of 64, rounded to F16".
        plan: which tensors of the folder became which of the file.
    """

    path: Path
    tensors: dict[str, str]
    types: dict[str, str]
    bytes: int
    left_out: tuple[str, ...] = ()
    forms: Mapping[str, str] = field(default_factory=dict)
    plan: Plan | None = None

    def reader(self) -> Callable[[str], np.ndarray]:
        """A function from a source tensor to its values in the file: float32, in its own shape."""
        assert self.plan is not None
        plan = self.plan
        paths: dict[str, list[str]] = {}
        for path, stored in plan.stored.items():
            for source in dict.fromkeys(piece.tensor for piece in stored.pieces):
                paths.setdefault(source, []).append(path)
        # A stack is decoded only once, because its experts are read one after the other.
        tensor = lru_cache(maxsize=1)(lambda name: read_tensor(self.path, name))
        count = row_count(plan.shapes)

        def read(source: str) -> np.ndarray:
            found = np.empty(plan.shapes[source], dtype=np.float32)
            for path in paths[source]:
                values = joined(plan.placed[path], tensor)
                put(plan.stored[path], values, source, rows_of(found), count)
            return found

        return read


def write_gguf(
    folder: Path,
    out: Path,
    *,
    file_type: str | None = None,
    edits: Mapping[str, Edit] | None = None,
    metadata: Mapping[str, Value] | None = None,
    pre: str | None = None,
    keep_types: bool = False,
    quantize: Quantizer | None = None,
    edit_blocks: BlockEditor | None = None,
    imatrix: Imatrix | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GgufReport:
    """Write the model in ``folder`` as the GGUF file ``out``.

    One tensor is in memory at a time. The file appears under its name complete or not at all.

    Args:
        folder: a folder with config.json, model*.safetensors in F32, F16 or BF16 or quantized by
            MLX, and a tokenizer.
        out: must not exist.
        file_type: a key of `convert.gguf.file_types.FILE_TYPES` or of its ``ALIASES``. None is F16,
            but matrices quantized by MLX keep their weights where a GGUF has a type for them
            (`FolderWeights.block_type`).
        edits: tensor name in the safetensors files -> function from the whole tensor, float32
            (out, in), to the edited one in the same shape. It is called before rows are permuted,
            experts stacked and values quantized.
        metadata: further GGUF keys, or other values for existing keys: str, bool, int (uint32, or
            int64 where it does not fit), float (float32), list of str.
        pre: the value of tokenizer.ggml.pre, where it cannot be found from the tokenizer.
        keep_types: with a ``file_type``: matrices quantized by MLX keep their weights all the same,
            where a GGUF has a type for them.
        quantize: used in place of `encode` for edited tensors of all types but F32: (source name,
            float32 values in GGUF's layout, type, importance) -> what `encode` would return.
        edit_blocks: edits the tensors that keep the weights of a quantized source. Without it
            these are encoded again when they are edited.
        imatrix: an importance matrix, which weights the errors of input columns.
        progress: called with (tensors written, tensors in all).

    Raises:
        UserError: when the architecture or tokenizer is not supported, the source is quantized in
            another form than MLX's, a tensor has no place in a GGUF or is not finite, an edit is of
            a missing tensor or changes the shape, a quantized type is asked for without ggml, or
            the output exists.
    """
    folder, out = Path(folder), Path(out)
    check_new(out)
    with TensorFiles(folder) as files:
        layout = _layout(folder, files, file_type, pre, imatrix, keep_types)
        plan, extras, types = layout.plan, layout.extras, layout.types
        targets = plan.targets
        edits = edits or {}
        _refuse_stray_edits(edits, targets, files)
        keys = _metadata(folder, layout)
        keys.update(imatrix.metadata() if imatrix else {})
        keys.update(metadata or {})
        keys["general.name"] = phi3.named(
            str(keys["general.name"]), phi3=bool(layout.tokenizer.rstrip)
        )
        with new_file(out) as partial:
            writer = gguf.GGUFWriter(partial, architecture(layout.config).gguf)
            try:
                _add_metadata(writer, keys)
                for target in targets:
                    _add_info(writer, target.name, target.shape, types[target.name])
                for name, values in extras.items():
                    _add_info(writer, name, values.shape, _Q.F32)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                arrays = _arrays(layout, edits, quantize, edit_blocks, imatrix)
                for done, array in enumerate(arrays, start=1):
                    writer.write_tensor_data(array)
                    if progress:
                        progress(done, len(targets) + len(extras))
            finally:
                writer.close()
            size = partial.stat().st_size
    return GgufReport(
        path=out,
        tensors=dict(hf_to_gguf.sources_of(targets)),
        types={name: kind.name for name, kind in types.items()},
        bytes=size,
        left_out=tuple(name for name in plan.left_out if hf_to_gguf.is_vision(name)),
        forms=_forms(layout),
        plan=plan,
    )


def check_convertible(
    folder: Path,
    file_type: str | None,
    *,
    pre: str | None = None,
    keep_types: bool = False,
    imatrix: Imatrix | None = None,
) -> None:
    """Check, before any long work, what `write_gguf` can check from the files' headers alone.

    Raises:
        UserError: as `write_gguf` does, except for reasons that lie in the tensors' values.
    """
    with TensorFiles(Path(folder)) as files:
        _layout(Path(folder), files, file_type, pre, imatrix, keep_types)


@dataclass(frozen=True)
class _Layout:
    """Everything about a file to be written except its values."""

    config: dict[str, Any]
    file_type: str
    plan: Plan
    extras: dict[str, np.ndarray]
    types: dict[str, GGMLQuantizationType]
    kept: frozenset[str]
    weights: FolderWeights
    tokenizer: Tokenizer


def _layout(
    folder: Path,
    files: TensorFiles,
    file_type: str | None,
    pre: str | None,
    imatrix: Imatrix | None,
    keep_types: bool,
) -> _Layout:
    keep, file_type = keep_types or file_type is None, file_types.file_type(file_type or "F16")
    config = read_config(folder)
    if not hf_to_gguf.is_gpt_oss(config):
        refuse_foreign(folder, config, files)
    check_counts(folder, config, {name: files.info(name).shape for name in files.names})
    weights = FolderWeights(files, config)
    _refuse_integers(weights)
    plan = hf_to_gguf.plan(config, weights.shapes, folder)
    targets = plan.targets
    rows = next(one.shape[0] for one in targets if one.name == "token_embd.weight")
    form = architecture(config).folder.tokenizer(text_config(config))
    tokenizer = read_tokenizer(folder, rows, pre=pre, form=form)
    extras = extra_tensors(config)
    facts = mix.Facts.of(plan.metadata, architecture(config).gguf)
    floats = {one.name: _float_type(one, file_type) for one in targets}
    shapes = {one.name: (_without_ones(one.shape), floats[one.name]) for one in targets}
    types = mix.types(file_type, shapes, facts, importance=imatrix is not None)
    if FILE_TYPES[file_type][1] in file_types.FLOATS:
        types = floats
    if imatrix is None:
        mix.check_importance(file_type, types)
    else:
        imatrix.check({one.name: one.shape for one in targets})
    types.update(dict.fromkeys(extras, _Q.F32))
    kept = {one.name: kind for one in targets if keep and (kind := _kept_type(one, weights))}
    types.update(kept)
    ggml.check(types.values())
    return _Layout(config, file_type, plan, extras, types, frozenset(kept), weights, tokenizer)


_FLOAT32 = re.compile(r"\.(ffn_gate_inp|ffn_gate_inp_shexp|ssm_conv1d|shortconv\.conv)\.")
"""Matrices that llama.cpp wants in float32."""


def _float_type(target: Target, file_type: str) -> GGMLQuantizationType:
    """The type of a tensor in a file of floats, which a tensor that is not quantized keeps."""
    small = len(target.shape) < 2 or not target.name.endswith(".weight") or "_norm." in target.name
    if small or _FLOAT32.search(target.name):
        return _Q.F32
    kind = FILE_TYPES[file_type][1]
    return kind if kind in file_types.FLOATS else _Q.F16


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as ggml counts its dimensions: one row is a vector."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _kept_type(target: Target, weights: FolderWeights) -> GGMLQuantizationType | None:
    """The type in which a tensor keeps the weights of a quantized source; None for a new type."""
    if not target.moves or _FLOAT32.search(target.name):
        return None
    if not all(weights.is_quantized(name) for name in target.sources):
        return None
    kinds = {weights.block_type(name) for name in target.sources}
    return kinds.pop() if len(kinds) == 1 else None


def _forms(layout: _Layout) -> dict[str, str]:
    found = {}
    for target in layout.plan.targets:
        quantized = [one for one in target.sources if layout.weights.is_quantized(one)]
        if quantized:
            how = "kept as" if target.name in layout.kept else "rounded to"
            kind = layout.types[target.name].name
            found[target.name] = f"{layout.weights.form(quantized[0])}, {how} {kind}"
    return found


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


def _refuse_integers(weights: FolderWeights) -> None:
    for name in weights.shapes:
        info = weights.files.info(name)
        stored = info.dtype in FLOATS or weights.is_quantized(name)
        if not stored and not hf_to_gguf.is_skipped(name):
            raise UserError(
                f"{name} in {info.file} is stored as {info.dtype}: take the float model it was "
                "made from."
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


def _values(target: Target, layout: _Layout, edits: Mapping[str, Edit]) -> np.ndarray:
    """A tensor's values, float32."""
    plan = layout.plan

    def read(source: str) -> np.ndarray:
        return _source_values(source, layout.weights, edits)

    one, piece = target.weights[0], target.weights[0].pieces[0]
    alone = target.moves and len(target.weights) == len(one.pieces) == 1
    if alone and piece.rows is None and piece.columns is None:
        return joined(plan.stored[one.path], read).reshape(target.shape)
    found = np.empty(target.shape, dtype=np.float32)
    shapes = {one.name: one.shape for one in plan.targets}
    for weight in target.weights:
        values = joined(plan.stored[weight.path], read)
        put(weight, values, target.name, rows_of(found), row_count(shapes))
    return found * np.float32(target.scale) if target.scale != 1.0 else found


def _kept_blocks(target: Target, layout: _Layout) -> np.ndarray:
    """A tensor's blocks, bytes moved from a quantized source."""
    plan, kind = layout.plan, layout.types[target.name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = int(np.prod(target.shape[:-1], dtype=np.int64))
    found = np.empty((rows, target.shape[-1] // block * size), dtype=np.uint8)
    shapes = {one.name: one.shape for one in plan.targets}
    for weight in target.weights:
        stored = plan.stored[weight.path]
        values = joined(stored, lambda name: layout.weights.blocks(name, kind), raw=True)
        put(weight, values, target.name, found, row_count(shapes), raw=True)
    return found.reshape(*target.shape[:-1], -1)


def _arrays(
    layout: _Layout,
    edits: Mapping[str, Edit],
    quantize: Quantizer | None,
    edit_blocks: BlockEditor | None,
    imatrix: Imatrix | None,
) -> Iterator[np.ndarray]:
    """Yield every tensor as it is to be written, one after the other."""
    for target in layout.plan.targets:
        kind, source = layout.types[target.name], target.sources[0]
        edited = source in edits and kind != _Q.F32
        importance = imatrix.weights(target.name, target.shape) if imatrix else None
        if target.name in layout.kept and (edit_blocks or not edited):
            blocks = _kept_blocks(target, layout)
            if edited and edit_blocks:
                blocks = edit_blocks(source, blocks, kind, importance)
            yield blocks
            continue
        values = _values(target, layout, edits)
        yield (
            quantize(source, values, kind, importance)
            if edited and quantize
            else encode(values, kind, target.name, importance)
        )
    yield from layout.extras.values()


def _source_values(name: str, weights: FolderWeights, edits: Mapping[str, Edit]) -> np.ndarray:
    array = weights.values(name)
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
        **card_keys(folder),
        **sampling_keys(folder),
        "general.file_type": int(FILE_TYPES[_mostly(layout)][0]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    keys.update(layout.plan.metadata)
    keys.update(layout.tokenizer.metadata())
    return keys


def _mostly(layout: _Layout) -> str:
    """The file type: that of most weights where a quantized source keeps them."""
    sizes: Counter[str] = Counter()
    for target in layout.plan.targets:
        kind = layout.types[target.name].name if target.name in layout.kept else layout.file_type
        sizes[kind] += int(np.prod(target.shape, dtype=np.int64))
    (kind, _), *_ = sizes.most_common()
    return "MXFP4_MOE" if kind == "MXFP4" else kind


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
