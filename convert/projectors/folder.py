"""The projector of a model folder: found from the files' headers, and written as a GGUF."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType

from convert.architectures.hf_to_gguf import is_vision
from convert.architectures.model_card import card_keys
from convert.base import json_text
from convert.base.errors import UserError
from convert.base.hf_config import read_config
from convert.gguf.file_types import FILE_TYPES
from convert.gguf.values import value_type
from convert.mlx.folder_weights import FLOATS, FolderWeights
from convert.mlx.safetensors_files import TensorFiles
from convert.mlx_to_gguf import encode
from convert.projectors.table import family, missing
from convert.projectors.tower import Family, Part, Shape, Tower

_Q = GGMLQuantizationType

TYPES = ("F32", "F16", "BF16")
"""The file types that a projector is written in."""


class Unwritable(UserError):
    """A vision tower that cannot be written exactly. The message is the reason, without full stop.

    Attributes:
        tensors: the folder's tensors of the tower.
    """

    def __init__(self, why: str, tensors: tuple[str, ...]) -> None:
        super().__init__(why)
        self.tensors = tensors


@dataclass(frozen=True)
class _Target:
    """A tensor of the file, and the folder's tensor that it is made from."""

    part: Part
    source: str
    shape: Shape


@dataclass(frozen=True)
class Projector:
    """The projector that a folder's vision tower becomes.

    Attributes:
        folder: the model's folder.
        family: the tower's family.
        targets: the file's tensors.
        keys: the file's metadata, without those that depend on its type.
        sources: the folder's tensors that it holds.
    """

    folder: Path
    family: Family
    targets: tuple[_Target, ...]
    keys: Mapping[str, Any]
    sources: tuple[str, ...]

    @property
    def size(self) -> int:
        """The bytes of its tensors in F32, which no file exceeds by much."""
        return sum(4 * int(np.prod(one.shape, dtype=np.int64)) for one in self.targets)

    def write(self, out: Path, file_type: str = "F16", name: str | None = None) -> None:
        """Write the projector to ``out``; one tensor is in memory at a time.

        Args:
            out: must not exist.
            file_type: one of `TYPES`.
            name: the value of general.name.

        Raises:
            Unwritable: when values of a tensor are not finite or do not fit the type. Nothing is
                left under the name ``out``.
        """
        try:
            self._write(out, file_type, name)
        except UserError as error:
            out.unlink(missing_ok=True)
            raise Unwritable(str(error).rstrip("."), self.sources) from None

    def _write(self, out: Path, file_type: str, name: str | None) -> None:
        types = {one.part.name: self._type(one, file_type) for one in self.targets}
        metadata = {
            "general.type": "mmproj",
            "general.name": name or self.folder.absolute().name,
            **card_keys(self.folder),
            "general.file_type": int(FILE_TYPES[file_type][0]),
            "general.quantization_version": gguf.GGML_QUANT_VERSION,
            **self.keys,
        }
        with TensorFiles(self.folder) as files:
            weights = FolderWeights(files, read_config(self.folder))
            writer = gguf.GGUFWriter(out, "clip")
            try:
                for key, value in metadata.items():
                    kind, inner = value_type(key, value)
                    writer.add_key_value(key, value, kind, sub_type=inner)
                for one in self.targets:
                    count = int(np.prod(one.shape, dtype=np.int64))
                    kind_of = types[one.part.name]
                    size = count * (4 if kind_of == _Q.F32 else 2)
                    writer.add_tensor_info(
                        one.part.name, one.shape, np.dtype(np.float32), size, kind_of
                    )
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for one in self.targets:
                    values = _values(one, weights)
                    writer.write_tensor_data(encode(values, types[one.part.name], one.source))
                    files.release(one.source)
            finally:
                writer.close()

    def _type(self, target: _Target, file_type: str) -> GGMLQuantizationType:
        """The type of a tensor, as llama.cpp's converter chooses it."""
        name, chosen = target.part.name, FILE_TYPES[file_type][1]
        if len(target.shape) < 2 or name.endswith("_norm.weight"):
            return _Q.F32
        for pattern, kind in self.family.types.items():
            if re.fullmatch(pattern, name):
                return kind
        if ".patch_embd.weight" in name or ".patch_merger.weight" in name:
            # llama.cpp has no convolution with kernels in BF16.
            return _Q.F16 if chosen == _Q.F16 else _Q.F32
        if name == "v.position_embd.weight" or not name.endswith(".weight"):
            return _Q.F32
        return chosen


def find(folder: Path) -> Projector | None:
    """The projector of a folder, planned from its files' headers.

    Returns:
        None where the folder holds no vision tower.

    Raises:
        Unwritable: when the tower cannot be written exactly as llama.cpp reads it.
        UserError: when the folder's files cannot be read.
    """
    config = read_config(folder)
    with TensorFiles(folder) as files:
        tower = tuple(name for name in files.names if is_vision(name))
        if not tower:
            return None
        try:
            return _planned(folder, config, files)
        except UserError as error:
            raise Unwritable(str(error).rstrip("."), tower) from None


def _planned(folder: Path, config: Mapping[str, Any], files: TensorFiles) -> Projector:
    known = family(config)
    if known is None:
        raise UserError(missing(config))
    weights = FolderWeights(files, config)
    of = {
        known.published(name): name
        for name in weights.shapes
        if is_vision(name) or re.fullmatch(known.borrowed, known.published(name))
    }
    shapes = {published: weights.shapes[name] for published, name in of.items()}
    tower = Tower(folder, config, known.vision(config), _processor(folder), shapes)
    keys = {**_usual(tower), known.type_key: known.kind, **known.keys(tower)}
    targets = []
    for published, name in of.items():
        parts = known.parts(tower, published)
        info = files.info(name)
        if parts and info.dtype not in FLOATS and not weights.is_quantized(name):
            raise UserError(f"{name} is stored as {info.dtype}")
        targets += [_Target(one, name, _shape(one, shapes[published])) for one in parts]
    ordered = sorted(targets, key=lambda one: _file_order(one.part.name))
    _check_blocks([one.part.name for one in targets], int(keys["clip.vision.block_count"]))
    sources = tuple(name for name in of.values() if is_vision(name))
    return Projector(folder, known, tuple(ordered), keys, sources)


def _check_blocks(names: list[str], count: int) -> None:
    """Check that every block of the tower is there, each with the same tensors.

    Raises:
        UserError: when one is not.
    """
    blocks: dict[str, list[int]] = {}
    for name in names:
        if found := re.match(r"v\.blk\.(\d+)\.(.*)", name):
            blocks.setdefault(found[2], []).append(int(found[1]))
    if not blocks or any(sorted(layers) != list(range(count)) for layers in blocks.values()):
        raise UserError(f"the tower has not all tensors of the {count} blocks of its config.json")


def _usual(tower: Tower) -> dict[str, Any]:
    """The metadata of every vision tower."""
    width = tower.text.get("hidden_size")
    if not isinstance(width, int):
        raise UserError("config.json has no hidden_size of the language model")
    vision = "clip.vision."
    return {
        "clip.has_vision_encoder": True,
        f"{vision}projection_dim": width,
        f"{vision}image_size": tower.count("image_size"),
        f"{vision}patch_size": tower.count("patch_size"),
        f"{vision}embedding_length": tower.count("hidden_size"),
        f"{vision}feed_forward_length": tower.count("intermediate_size"),
        f"{vision}block_count": tower.count("num_hidden_layers", "depth"),
        f"{vision}attention.head_count": tower.count("num_attention_heads", "num_heads"),
        f"{vision}image_mean": tower.numbers("image_mean", 3),
        f"{vision}image_std": tower.numbers("image_std", 3),
    }


def _processor(folder: Path) -> dict[str, Any]:
    """The settings by which pictures are prepared; the later file of the two counts."""
    found: dict[str, Any] = {}
    for name, inside in (
        ("preprocessor_config.json", "media_proc_cfg"),
        ("processor_config.json", "image_processor"),
    ):
        if (folder / name).is_file():
            settings = json_text.read(folder / name)
            if isinstance(settings, dict):
                inner = settings.get(inside)
                found |= settings | (inner if isinstance(inner, dict) else {})
    return found


def _shape(part: Part, shape: Shape) -> Shape:
    return part.change(np.broadcast_to(np.float32(0), shape)).shape


def _file_order(name: str) -> tuple[str, int, str]:
    found = re.match(r"(v\.blk)\.(\d+)\.(.*)", name)
    return (found[1], int(found[2]), found[3]) if found else (name, 0, "")


def _values(target: _Target, weights: FolderWeights) -> np.ndarray:
    array = weights.values(target.source)
    if not mx.all(mx.isfinite(array)).item():
        raise UserError(f"{target.source} holds values that are not finite")
    values: np.ndarray = np.asarray(array.astype(mx.float32))  # as they are: float32
    return np.ascontiguousarray(target.part.change(values), np.float32)
