"""Control vectors of llama.cpp's: vectors that it adds to the residual stream.

A GGUF of general.architecture "controlvector" with one float32 tensor ``direction.N`` for each
layer that is steered; llama.cpp adds it to what leaves layer N, counted from 0 (common/common.cpp,
common_control_vector_load; src/llama-adapter.cpp). It has none for layer 0: N is at least 1.
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
"""Its general.architecture."""

SUFFIX = ".cvec.gguf"
"""How the names of control vectors end here."""


def is_control_vector(path: Path) -> bool:
    """Whether a name is that of a control vector."""
    return ends_in(path, SUFFIX)


@dataclass(frozen=True)
class ControlVector:
    """What a control vector file holds.

    Attributes:
        layers: layer N, at least 1 -> the float32 (d,) vector that is added after it.
        model_hint: general.architecture of the models it is for; llama.cpp does not look at it.
        layer_count: the number of layers of these models, where it is known.
        metadata: every other key.
    """

    layers: dict[int, np.ndarray]
    model_hint: str = ""
    layer_count: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def write(path: Path, vector: ControlVector) -> None:
    """Write a control vector; ``path`` must not exist.

    Raises:
        UserError: without layers, for layer 0, for vectors of several widths or not finite.
    """
    _check(path, vector.layers)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_string(f"{ARCHITECTURE}.model_hint", vector.model_hint)
        # repeng and llama.cpp's own generator write the number of vectors here.
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
        raise UserError(f"{path}: its vectors are of several widths, which fit no one model.")


def read(path: Path) -> ControlVector:
    """Read a control vector, whoever made it.

    Raises:
        UserError: when the file is no GGUF, no control vector, or one that llama.cpp would refuse.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file: give the path of a control vector, NAME{SUFFIX}.")
    with GgufSource(path) as file:
        # llama.cpp looks at the tensors' names alone, and some makers set no architecture.
        names = {name: re.fullmatch(r"direction\.(\d+)", name) for name in file.tensors}
        found = {int(match[1]): name for name, match in names.items() if match}
        if not found:
            raise UserError(f"{path} is no control vector: it holds no tensor direction.N.")
        layers = {}
        for layer in sorted(found):
            entry = file.tensors[found[layer]]
            if entry.type != gguf.GGMLQuantizationType.F32 or len(entry.shape) != 1:
                raise UserError(
                    f"{path}: {entry.name} is {entry.type.name} {entry.shape}, and has to be F32 "
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
