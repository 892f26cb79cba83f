"""``--mtp``: finds the residual writers in blocks for multi-token prediction (MTP) of a folder.

mlx-lm does not run these blocks, so they cannot be probed. But the layer in an MTP block is like
the model's own layers, so its writers have the names of the writers in those. In front of it there
is a projection, whose name depends on the form of MTP (`convert.architectures.mtp.INPUTS`). Every
other tensor of a block must be known not to write, or the block is refused. An edit treats an MTP
block like the last layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from abl_mlx.models.writers import Writer
from abl_mlx.records.edits import Drafting
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
        writer: the writer to which it belongs; its module is empty.
        parameter: ``weight`` or ``bias``.
        name: the tensor's name.
        transposed: whether its last two axes are swapped in the file.
        row: the number of weights in a row.
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


def record(names: Sequence[str], edited: Iterable[str]) -> Drafting | None:
    """The record's entry ``mtp`` about MTP tensors; None if there are none.

    Args:
        names: the names of all MTP tensors.
        edited: the names of all tensors that were edited.
    """
    if not names:
        return None
    touched = set(names) & set(edited)
    return Drafting(tensors=len(names), edited=[name for name in names if name in touched])


def find_parts(
    files: TensorFiles,
    config: Mapping[str, Any],
    layers: int,
    width: int,
    writers: Sequence[Writer],
    places: Mapping[str, Stored],
) -> list[Part]:
    """The residual writers in the MTP blocks of a folder.

    Args:
        files: the folder's tensors.
        config: the contents of config.json.
        layers: the number of the model's layers, without MTP blocks.
        width: d.
        writers: the writers in the model's own layers.
        places: parameter of these writers -> where it is stored.

    Raises:
        UserError: when there is no MTP block, or the role of one of its tensors is not known.
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
    """The roles of the tensors in the model's own layers.

    Returns:
        The roles that write, those that do not, and (role, number of dimensions) -> whether the
        last two axes are swapped in the file.
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
        # It has the embedding's path, so that the copy is edited exactly like the embedding.
        writer = Writer(embedding.path, "embedding", -1, None, False, nn.Module())
        swapped, fits = False, len(whole) == 2 and whole[-1] == width
    else:
        kind = "experts" if len(shape) == (2 if one.part == "bias" else 3) else "linear"
        writer = Writer(one.module, kind, layers - 1, None, one.part == "bias", nn.Module())
        known = transposed.get((one.role, len(shape)))
        swapped = bool(known) if known is not None else False
        if one.part == "bias":
            swapped, fits = False, whole[-1] == width
        elif known is None and len(shape) == 3:  # the model's own experts are separate tensors
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
    """The number of weights in a row of a tensor, unpacked."""
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
