"""``--mtp``: the residual writers of multi-token prediction blocks, which mlx-lm does not run.

They cannot be probed. But an MTP block's layer is one of the model's own, so what writes there has
the name of what was found to write in the model's layers; before it stands a projection that every
form of MTP has under a name of its own (`convert.architectures.mtp.INPUTS`). Every other tensor of
a block has to be known not to write, or the block is refused. Edits treat a block as they do the
last layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from abl_mlx.models.writers import Writer
from convert.architectures import mtp
from convert.architectures.mtp import Tensor, mtp_tensors
from convert.base.errors import UserError
from convert.mlx.parameters import Stored
from convert.mlx.safetensors_files import TensorFiles

_SHOWN = 6


@dataclass(frozen=True)
class Part:
    """A tensor of an MTP block that is edited.

    Attributes:
        writer: as which it is; its module is empty.
        parameter: ``weight`` or ``bias``.
        name: of the tensor.
        transposed: whether the file holds its last two axes swapped.
        row: how many weights a row of it has.
    """

    writer: Writer
    parameter: str
    name: str
    transposed: bool
    row: int


def tensors(files: TensorFiles, layers: int) -> list[str]:
    """Names of all tensors of MTP blocks in a folder.

    Args:
        layers: how many layers mlx-lm's model has.
    """
    return [one.name for one in mtp_tensors(files.names, layers)]


def record(names: Sequence[str], edited: Iterable[str]) -> dict[str, Any]:
    """What a record says of MTP tensors, under ``mtp``; nothing where there are none.

    Args:
        names: of all of them.
        edited: names of all tensors that were edited.
    """
    if not names:
        return {}
    touched = set(names) & set(edited)
    listed = [name for name in names if name in touched]
    return {"mtp": {"tensors": len(names), "edited": listed}}


def find_parts(
    files: TensorFiles,
    config: Mapping[str, Any],
    layers: int,
    width: int,
    writers: Sequence[Writer],
    places: Mapping[str, Stored],
) -> list[Part]:
    """What writes to the stream in the MTP blocks of a folder.

    Args:
        config: config.json.
        layers: of the model, without MTP.
        width: d.
        writers: all those of the model itself.
        places: parameter -> where it is stored, of all of these.

    Raises:
        UserError: no MTP block at all, or one with a tensor whose part in it is not known.
    """
    blocks = mtp_tensors(files.names, layers)
    if not blocks:
        raise UserError(
            f"--mtp: {files.folder} holds no tensors of multi-token prediction; leave the flag out."
        )
    written, read, transposed = _roles(files, layers, writers, places)
    embedding = next(one for one in writers if one.kind == "embedding")
    known = mtp.READS | mtp.INPUTS | mtp.EMBEDDINGS | (read - written) | (written - read)
    lost = [one.name for one in blocks if one.role not in known]
    if lost or not any(one.role in mtp.INPUTS for one in blocks):
        _refuse(lost or [one.name for one in blocks], files)
    if gained := [one.path for one in writers if one.gain is not None]:
        raise UserError(
            f"--mtp: {gained[0]} writes to the residual stream through a norm, and which one "
            "stands behind the same weight of an MTP block is not known; leave the flag out."
        )
    edited = written | mtp.INPUTS | mtp.EMBEDDINGS
    found = []
    for one in blocks:
        if one.role not in edited or one.part not in ("weight", "bias"):
            continue
        found.append(_part(one, files, config, layers, width, embedding, transposed))
    return found


def _refuse(names: Sequence[str], files: TensorFiles) -> None:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise UserError(
        f"--mtp: {files.folder} holds tensors of multi-token prediction in a form that is not "
        f"known: {', '.join(names[:_SHOWN])}{more}; leave the flag out to keep them as they are."
    )


def _roles(
    files: TensorFiles, layers: int, writers: Sequence[Writer], places: Mapping[str, Stored]
) -> tuple[set[str], set[str], dict[tuple[str, int], bool]]:
    """Of the model's own layers: what writes, what does not, and which weights lie transposed.

    Returns:
        roles, roles, and (role, number of axes) -> whether the file has the last two swapped.
    """
    written: dict[str, bool] = {}
    for writer in writers:
        for parameter in writer.parameters:
            stored = places[parameter]
            written.update(dict.fromkeys(stored.tensors, stored.transposed))
    own = mtp.layer_tensors(files.names, layers)
    modules = {one.module for one in own if one.name in written}
    transposed = {
        (one.role, len(files.info(one.name).shape)): written[one.name]
        for one in own
        if one.name in written and one.part == "weight"
    }
    return (
        {one.role for one in own if one.module in modules},
        {one.role for one in own if one.module not in modules},
        transposed,
    )


def _part(
    one: Tensor,
    files: TensorFiles,
    config: Mapping[str, Any],
    layers: int,
    width: int,
    embedding: Writer,
    transposed: Mapping[tuple[str, int], bool],
) -> Part:
    shape = files.info(one.name).shape
    row = _row(one, files, config)
    whole = (*shape[:-1], row)
    if one.role in mtp.EMBEDDINGS:
        # Under the embedding's path, so that the copy is what the embedding is after any edit.
        writer = Writer(embedding.path, "embedding", -1, None, False, nn.Module())
        swapped, fits = False, len(whole) == 2 and whole[-1] == width
    else:
        kind = "experts" if len(shape) == (2 if one.part == "bias" else 3) else "linear"
        writer = Writer(one.module, kind, layers - 1, None, one.part == "bias", nn.Module())
        known = transposed.get((one.role, len(shape)))
        swapped = bool(known) if known is not None else False
        if one.part == "bias":
            swapped, fits = False, whole[-1] == width
        elif known is None and len(shape) == 3:  # the model's own are one by one
            swapped = whole[-2] != width
            fits = whole[-1 if swapped else -2] == width and whole[-1] != whole[-2]
        else:
            fits = len(shape) in (2, 3) and whole[-1 if swapped else -2] == width
    if not fits:
        raise UserError(
            f"--mtp: {one.name} has the shape {whole}, of which it is not known how it writes to a "
            f"residual stream of {width} dimensions; leave the flag out."
        )
    return Part(writer, one.part, one.name, swapped, row)


def _row(one: Tensor, files: TensorFiles, config: Mapping[str, Any]) -> int:
    """How many weights a row of a tensor has, unpacked."""
    last = files.info(one.name).shape[-1]
    if one.part != "weight" or f"{one.module}.scales" not in files:
        return last
    settings = config.get("quantization") or config.get("quantization_config") or {}
    entry = settings.get(one.module, settings)
    bits = (entry if isinstance(entry, Mapping) else settings).get("bits")
    if not isinstance(bits, int):
        raise UserError(
            f"--mtp: {one.name} in {files.info(one.name).file} is quantized, but config.json does "
            "not say to how many bits; leave the flag out."
        )
    return last * 32 // bits
