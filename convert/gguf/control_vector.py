"""Control vector files: vectors that llama.cpp adds to the residual stream (activation addition).

Such a file is a GGUF of general.architecture "controlvector" with one float32 tensor
``direction.N`` for each steered layer. llama.cpp adds it to the output of layer N, counted from 0
(common/common.cpp, common_control_vector_load; src/llama-adapter.cpp). Layer 0 cannot be steered:
N is at least 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from convert.base.errors import OPTION, UserError
from convert.base.suffixes import ends_in
from convert.gguf.file import GgufSource
from convert.gguf.values import value_type

ARCHITECTURE = "controlvector"
"""The general.architecture of a control vector file."""

SUFFIX = ".cvec.gguf"
"""The suffix that this project gives the names of control vector files."""


def is_control_vector(path: Path) -> bool:
    """Whether a path is named like a control vector file; the file need not exist."""
    return ends_in(path, SUFFIX)


@dataclass(frozen=True)
class ControlVector:
    """The contents of a control vector file.

    Attributes:
        layers: layer N, at least 1 -> the float32 (d,) vector that is added to its output.
        model_hint: general.architecture of the models that it fits; llama.cpp ignores it.
        layer_count: the number of layers of these models, where it is known.
        metadata: every other key of the file's metadata, with its value.
    """

    layers: dict[int, np.ndarray]
    model_hint: str = ""
    layer_count: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def write(path: Path, vector: ControlVector) -> None:
    """Write a control vector; ``path`` must not exist.

    Raises:
        UserError: when there are no layers, or there is a layer 0, or the vectors have different
            widths or numbers that are not finite.
    """
    _check(path, vector.layers)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_string(f"{ARCHITECTURE}.model_hint", vector.model_hint)
        # repeng and llama.cpp's own generator write the number of vectors under this key.
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", vector.layer_count or len(vector.layers))
        for key, value in vector.metadata.items():
            kind, inner = value_type(key, value)
            writer.add_key_value(key, value, kind, sub_type=inner)
        for layer in sorted(vector.layers):
            values = np.ascontiguousarray(vector.layers[layer], dtype=np.float32)
            writer.add_tensor(f"direction.{layer}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _check(path: Path, layers: Mapping[int, np.ndarray]) -> None:
    if not layers:
        raise UserError(f"{path} would hold no vector: a control vector steers at least one layer.")
    for layer, values in layers.items():
        if layer < 1:
            raise UserError(
                f"{path}: llama.cpp adds no control vector after layer {layer}: choose a "
                f"{OPTION} of 1 or more.",
                option="layer",
            )
        if values.ndim != 1 or not np.isfinite(values).all():
            raise UserError(f"{path}: the vector of layer {layer} is not of finite numbers (d,).")
    if len({len(values) for values in layers.values()}) > 1:
        raise UserError(f"{path}: its vectors have different widths, so they fit no model.")


def read(path: Path) -> ControlVector:
    """Read a control vector file, made by this project or any other program.

    Raises:
        UserError: when the file is no GGUF, no control vector, or one that llama.cpp would refuse.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file: give the path of a control vector, NAME{SUFFIX}.")
    with GgufSource(path) as file:
        # Like llama.cpp, go by the tensors' names: some programs set no architecture.
        names = {name: re.fullmatch(r"direction\.(\d+)", name) for name in file.tensors}
        found = {int(match[1]): name for name, match in names.items() if match}
        if not found:
            raise UserError(f"{path} is no control vector: it holds no tensor direction.N.")
        layers = {}
        for layer in sorted(found):
            entry = file.tensors[found[layer]]
            if entry.type != gguf.GGMLQuantizationType.F32 or len(entry.shape) != 1:
                raise UserError(
                    f"{path}: {entry.name} is {entry.type.name} {entry.shape}, but must be F32 "
                    "and of one dimension."
                )
            layers[layer] = np.array(file.values(found[layer]), dtype=np.float32)
        _check(path, layers)
        keys = file.metadata
        count = keys.get(f"{ARCHITECTURE}.layer_count")
        return ControlVector(
            layers,
            str(keys.get(f"{ARCHITECTURE}.model_hint", "")),
            None if count is None else int(count),
            {
                key: value
                for key, value in keys.items()
                if not key.startswith((f"{ARCHITECTURE}.", "GGUF."))
                and key != "general.architecture"
            },
        )
