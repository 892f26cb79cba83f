"""Rewrite a folder of safetensors shards: a few tensors changed, everything else as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.errors import UserError
from convert.safetensors_files import TensorFiles, TensorInfo

#: From a tensor's float32 values to the edited ones, same shape.
TensorEdit = Callable[[mx.array], mx.array]

#: Float types by the name that safetensors and GGUF share.
FLOAT_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}

# Weights in another format, or beside those that mlx-lm loads, would carry the unedited model on.
_OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".safetensors", ".h5", ".msgpack", ".npz",
)  # fmt: skip


def rewrite_folder(
    source: Path,
    files: TensorFiles,
    out: Path,
    edits: Mapping[str, TensorEdit],
    *,
    config: Mapping[str, Any],
    skip: tuple[str, ...] = ("README.md",),
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Write an edited copy of the model folder ``source`` into the existing folder ``out``.

    Shards keep their names and layout: each is copied as bytes, then the edited tensors are
    replaced one by one, in their own dtype and place. Peak memory is a few times the largest
    edited tensor, whatever the model's size.

    Args:
        files: the tensors of ``source``.
        edits: tensor name -> function of its float32 values.
        config: written as config.json.
        skip: top-level files that are not copied.
        progress: called with the number of bytes just written.

    Returns:
        Names of files left out because they hold weights in a form that was not edited.

    Raises:
        UserError: when an edited tensor is of no float type, or its edited values overflow it.
    """
    left_out = _copy_others(source, files, out, skip)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for shard in files.files:
        target = out / shard.name
        shutil.copyfile(shard, target)
        if progress:
            progress(target.stat().st_size)
    for name, edit in edits.items():
        info = files.info(name)
        with open(out / info.file.name, "r+b") as stream:
            stream.seek(info.offset)
            stream.write(edited_bytes(files, name, edit))
            stream.flush()
        if progress:
            progress(info.nbytes)
    for shard in files.files:
        with open(out / shard.name, "rb") as stream:
            os.fsync(stream.fileno())
    return left_out


def edited_bytes(files: TensorFiles, name: str, edit: TensorEdit) -> memoryview:
    """The bytes of an edited tensor in its own dtype."""
    info = files.info(name)
    dtype = float_dtype(info, name)
    values = edit(files.read(name).astype(mx.float32)).astype(dtype)
    if tuple(values.shape) != info.shape:
        raise UserError(f"the edit of {name} changed its shape, which it must not.")
    if not mx.isfinite(values).all().item():
        raise UserError(
            f"the edited {name} does not fit {info.dtype} (NaN or overflow): the source's values "
            "are damaged, or --strength is too large."
        )
    # Bytes are taken through an unsigned view: NumPy and memoryview know no bfloat16.
    bits = values.reshape(-1).view(mx.uint32 if info.dtype == "F32" else mx.uint16)
    mx.eval(bits)
    return memoryview(bits).cast("B")  # type: ignore[arg-type]


def float_dtype(info: TensorInfo, name: str = "a tensor to be edited") -> mx.Dtype:
    """The MLX dtype of a float tensor.

    Raises:
        UserError: when the tensor is stored in another type.
    """
    if info.dtype not in FLOAT_DTYPES:
        raise UserError(
            f"{name} in {info.file} is stored as {info.dtype}: only F32, F16 and BF16 can be "
            "edited in place; convert the model with `mlx_lm.convert --dtype bfloat16` first."
        )
    return FLOAT_DTYPES[info.dtype]


def _copy_others(source: Path, files: TensorFiles, out: Path, skip: tuple[str, ...]) -> list[str]:
    shards = {shard.name for shard in files.files}
    left_out = []
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(folder).relative_to(source)
        for name in sorted(names):
            relative = inside / name
            top = inside == Path(".")
            if name.startswith(".") or (top and (name in skip or name in shards)):
                continue
            if top and name == "config.json":
                continue
            if name.endswith(_OTHER_WEIGHTS):
                left_out.append(str(relative))
                continue
            (out / inside).mkdir(parents=True, exist_ok=True)
            # Follows links: a Hugging Face cache holds nothing else.
            shutil.copyfile(Path(folder) / name, out / relative)
    return left_out
