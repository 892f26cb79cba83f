"""Directions made by other programs: a .npy array, a row of an SAE's decoder, a control vector."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from abl_mlx.support import numpy_files
from abl_mlx.support.arrays import number
from abl_mlx.support.numpy_files import MOST_NUMBERS
from convert.base.errors import UserError
from convert.base.suffixes import ends_in
from convert.gguf.file import GgufSource
from convert.mlx import safetensors_files

_PICKLED = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


def read(path: Path, *, layer: float | None = None, tensor: str | None = None) -> mx.array:
    """Read one or more directions from a .npy, .npz, .safetensors or control vector .gguf file.

    Args:
        path: the file.
        layer: for a control vector, the layer (counted from 0) after which the direction is added;
            needed if it has several.
        tensor: the tensor's name in a .npz or .safetensors file; needed if it has several.

    Returns:
        (k, d) float32, as they are in the file.

    Raises:
        UserError: when the file has another format; several tensors, and none was named; or a
            tensor that is neither (d,) nor (k, d), is not finite, or is zero.
    """
    if ends_in(path, *_PICKLED):
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened: save the tensor from "
            "PyTorch as .safetensors or .npy and give that."
        )
    if ends_in(path, ".gguf"):
        if tensor is not None:
            raise UserError(f"--tensor {tensor}: of {path} choose a direction with --layer.")
        return checked(_control_vector(path, layer), str(path))
    if layer is not None:
        raise UserError(f"--layer {layer:g}: {path} is no control vector; leave it out.")
    if ends_in(path, ".npy"):
        if tensor is not None:
            raise UserError(f"--tensor {tensor}: {path} holds one array alone; leave it out.")
        return checked(numpy_files.read_npy(path), str(path))
    if ends_in(path, ".npz"):
        with numpy_files.Archive(path) as archive:
            name = _one_of(archive.names, tensor, path)
            return checked(archive.read(name), f"{path}: {name}")
    if ends_in(path, ".safetensors"):
        tensors, _ = safetensors(path)
        name = _one_of(list(tensors), tensor, path)
        return checked(tensors[name], f"{path}: {name}")
    raise UserError(
        f"{path}: a direction is a .safetensors, .npy or .npz file, or a control vector (.gguf)."
    )


def safetensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file.

    Raises:
        UserError: when the file is damaged.
    """
    return safetensors_files.load(path)


def checked(values: mx.array, where: str, most: int = 2) -> mx.array:
    """Directions as float32 (k, d), or (L, k, d) if ``most`` is 3.

    Args:
        values: (d,), (k, d) or (L, k, d).
        where: the file and tensor, for messages.
        most: the largest number of dimensions.

    Raises:
        UserError: when the shape is another, a number is not finite, or a direction is zero.
    """
    fits = 1 <= values.ndim <= most and 0 < values.size <= MOST_NUMBERS
    if fits:
        values = values.astype(mx.float32)
    if not fits or not mx.isfinite(values).all().item():
        forms = "(d,), (k, d) or (L, k, d)" if most == 3 else "(d,) or (k, d)"
        raise UserError(
            f"{where} must be finite numbers of the shape {forms}, not {tuple(values.shape)}."
        )
    if values.ndim == 1:
        values = values[None]
    if number(mx.abs(values).max(axis=-1).min()) == 0:
        raise UserError(f"{where} holds a direction that is zero: it points nowhere.")
    return values


def _one_of(names: list[str], wanted: str | None, path: Path) -> str:
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        return str(wanted)
    listed = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
    if wanted is None:
        raise UserError(f"{path} holds several tensors ({listed}): choose one with --tensor NAME.")
    raise UserError(f"{path} holds no tensor named {wanted!r} (found: {listed}).")


def _control_vector(path: Path, layer: float | None) -> mx.array:
    """The tensor ``direction.N`` of a control vector, which llama.cpp adds after layer N."""
    with GgufSource(path) as file:
        matches = (re.fullmatch(r"direction\.(\d{1,6})", name, re.ASCII) for name in file.tensors)
        found = {int(match[1]): match[0] for match in matches if match}
        return mx.array(file.values(found[_layer(path, sorted(found), layer)]))


def _layer(path: Path, found: Sequence[int], layer: float | None) -> int:
    """The layer to read from a control vector with directions for the layers ``found``."""
    if not found:
        raise UserError(
            f"{path} is no control vector: it has no tensor direction.N. A model's own GGUF is not "
            "a direction."
        )
    if layer is None and len(found) == 1:
        return found[0]
    if layer is None or layer not in found:
        which = "" if layer is None else f"has none for --layer {layer:g}; it "
        raise UserError(
            f"{path} {which}holds directions for the layers {found[0]} to {found[-1]}: choose "
            "one with --layer."
        )
    return int(layer)
