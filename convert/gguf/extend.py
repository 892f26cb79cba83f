"""Write a GGUF again with tensors added; everything else in it stays the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from convert.base.errors import OPTION, UserError
from convert.gguf.file import GgufSource
from convert.gguf.values import value_type


def extend(
    source: GgufSource,
    out: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
) -> None:
    """Write ``source`` to ``out`` with float32 tensors added or replaced.

    Args:
        source: an open GGUF in one file; it is only read.
        out: must not exist.
        tensors: name -> values, of any shape; a tensor of that name is replaced.
        metadata: key -> its new value.

    Raises:
        UserError: when the source is a split model.
    """
    if len(source.parts) > 1:
        raise UserError(
            f"{source.parts[0].name} is one of {len(source.parts)} parts, to which no tensor can "
            f"be added: convert them into one file with {OPTION} first.",
            option="join",
        )
    reader = gguf.GGUFReader(source.parts[0])
    writer = gguf.GGUFWriter(out, source.architecture, endianess=reader.endianess)
    kind = gguf.GGUFValueType
    try:
        for key, field in reader.fields.items():
            if key == "general.architecture" or key.startswith("GGUF.") or key in metadata:
                continue
            value = field.contents()
            inner = field.types[-1] if field.types[0] == kind.ARRAY else None
            if inner is not None and not len(value):
                continue  # gguf-py writes no empty arrays
            if key == "general.alignment":
                writer.data_alignment = int(value)
            writer.add_key_value(key, value, field.types[0], sub_type=inner)
        for key, value in metadata.items():
            of, inner = value_type(key, value)
            writer.add_key_value(key, value, of, sub_type=inner)
        kept = [tensor for tensor in reader.tensors if tensor.name not in tensors]
        for tensor in kept:
            shape, dtype = tensor.data.shape, tensor.data.dtype
            writer.add_tensor_info(
                tensor.name, shape, dtype, tensor.data.nbytes, tensor.tensor_type
            )
        added = {name: np.ascontiguousarray(values, np.float32) for name, values in tensors.items()}
        for name, values in added.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in kept:
            writer.write_tensor_data(tensor.data)
        for values in added.values():
            writer.write_tensor_data(values)
    finally:
        writer.close()
