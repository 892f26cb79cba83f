"""Directions of other origin: someone's .npy, a SAE decoder's row, a control vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.arrays import number
from convert.errors import UserError
from convert.suffixes import ends_in

_PICKLED = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


def read(path: Path, *, layer: float | None = None, tensor: str | None = None) -> mx.array:
    """One or more directions from a .npy, .npz, .safetensors or control-vector .gguf file.

    Args:
        layer: of a control vector, the direction added after this layer, counted from 0; needed
            where it has several.
        tensor: its name in a .npz or .safetensors file; needed where there are several.

    Returns:
        (k, d) float32, as they are in the file.

    Raises:
        UserError: a file of another form, more than one tensor and none named, a tensor that is
            neither (d,) nor (k, d), numbers that are not finite, or nothing but zeros.
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
        array = _numpy(path)
        return checked(mx.array(array.astype(np.float32)), str(path))
    if ends_in(path, ".npz"):
        with _archive(path) as archive:
            name = _one_of(list(archive.files), tensor, path)
            return checked(mx.array(archive[name].astype(np.float32)), f"{path}: {name}")
    if ends_in(path, ".safetensors"):
        tensors, _ = safetensors(path)
        name = _one_of(list(tensors), tensor, path)
        return checked(tensors[name], f"{path}: {name}")
    raise UserError(
        f"{path}: a direction is a .safetensors, .npy or .npz file, or a control vector (.gguf)."
    )


def safetensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """A .safetensors file's tensors and metadata.

    Raises:
        UserError: when it is damaged.
    """
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        mx.eval(loaded[0])
    except (RuntimeError, ValueError) as error:
        raise _unreadable(path, error) from None
    return dict(loaded[0]), dict(loaded[1])


def checked(values: mx.array, where: str, most: int = 2) -> mx.array:
    """Directions as (k, d) float32, or up to ``most`` axes.

    Raises:
        UserError: of another shape, with numbers that are not finite, or of length zero.
    """
    values = values.astype(mx.float32)
    if values.ndim == 1:
        values = values[None]
    if not 2 <= values.ndim <= most or values.size == 0 or not mx.isfinite(values).all().item():
        forms = "(d,), (k, d) or (L, k, d)" if most == 3 else "(d,) or (k, d)"
        raise UserError(
            f"{where} must be finite numbers of the shape {forms}, not {tuple(values.shape)}."
        )
    if number(mx.abs(values).max(axis=-1).min()) == 0:
        raise UserError(f"{where} holds a direction that is zero: it points nowhere.")
    return values


def _numpy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from None
    return _numeric(array, path)


def _numeric(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype.kind not in "fiu":
        raise UserError(f"{path} holds {array.dtype} values, and a direction is made of numbers.")
    return array


def _archive(path: Path) -> np.lib.npyio.NpzFile:
    try:
        archive = np.load(path, allow_pickle=False)
    except Exception as error:  # zipfile's own errors among others
        raise _unreadable(path, error) from None
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{path} is no .npz archive.")
    return archive


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
    """``direction.N`` of a control vector: llama.cpp adds it after layer N, counted from 0."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except Exception as error:  # whatever gguf-py raises for bytes that are no GGUF
        raise _unreadable(path, error) from None
    found = {
        int(one.name.split(".")[1]): one
        for one in reader.tensors
        if one.name.startswith("direction.") and one.name.split(".")[1].isdigit()
    }
    if not found:
        raise UserError(
            f"{path} is no control vector: it has no tensor direction.N. A model's own GGUF is not "
            "a direction."
        )
    if layer is None and len(found) == 1:
        return mx.array(np.array(next(iter(found.values())).data, np.float32))
    if layer is None or int(layer) != layer or int(layer) not in found:
        which = "" if layer is None else f"has none for --layer {layer:g}; it "
        raise UserError(
            f"{path} {which}holds directions for the layers {min(found)} to {max(found)}: choose "
            "one with --layer."
        )
    return mx.array(np.array(found[int(layer)].data, np.float32))


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:150]
    return UserError(f"{path} could not be read as a direction file: {reason}")
