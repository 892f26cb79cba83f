"""Undoes the edit of a folder, by writing the folder again or by writing an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from abl_mlx.edits.edit import Edit
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.inputs.sources import Source
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.readers import with_edited
from abl_mlx.models.writers import find_writers
from abl_mlx.outputs import staging
from abl_mlx.outputs.edit_label import Label
from abl_mlx.outputs.folder_plan import Plan
from abl_mlx.outputs.folder_plan import plan as plan_folder
from abl_mlx.outputs.undo_file import Taken
from abl_mlx.outputs.undo_weights import (
    ADAPTER_NAME,
    low_rank,
    missing_share,
    quantized,
    refuse_biases,
    refuse_readers,
    stacked,
)
from convert import adapters
from convert.adapters import Adapter
from convert.base.atomic import new_folder
from convert.base.hf_config import stored_config
from convert.mlx.folder import rewrite_folder
from convert.mlx.safetensors_files import TensorFiles


def plan(
    source: Source, chat: ChatModel, files: TensorFiles, edit: WeightEdit, *, mtp: bool
) -> Plan:
    """The plan of an edit of the folder's float tensors; no weight is read.

    Args:
        source: the folder.
        chat: the model, with its weights still in the files.
        files: the folder's tensors.
        edit: the edit.
        mtp: whether blocks for multi-token prediction were edited.

    Raises:
        UserError: when a tensor that the edit changes is quantized.
    """
    writers = with_edited(chat, find_writers(chat), edit.places)
    found = plan_folder(chat, files, edit, writers, mtp=mtp)
    if found.matrices:
        raise quantized(next(iter(found.matrices)), source)
    return found


def write(source: Source, files: TensorFiles, path: Path, found: Mapping[str, Taken]) -> float:
    """Write the folder as it was before its edit.

    Args:
        source: the edited folder.
        files: its tensors.
        path: where it is written.
        found: tensor name -> the components that the edit removed.

    Returns:
        The share of the removed components that is missing from the written weights.
    """
    config = {key: value for key, value in stored_config(source.path).items() if key != "abl_mlx"}
    with new_folder(path) as staged:
        rewrite_folder(
            source.path,
            files,
            staged,
            {name: one.put_back for name, one in found.items()},
            config=config,
            skip=(*staging.COMPANIONS, "README.source.md"),
        )
        card = source.path / "README.source.md"
        if card.is_file():
            (staged / "README.md").write_bytes(card.read_bytes())
        with TensorFiles(staged) as after:
            return missing_share(
                found, lambda name: _values(files, name), lambda name: _values(after, name)
            )


def write_adapter(
    source: Source,
    chat: ChatModel,
    files: TensorFiles,
    path: Path,
    found: Mapping[str, Taken],
    label: Label,
) -> None:
    """Write an adapter for mlx-lm that adds what the edit removed.

    Args:
        source: the edited folder.
        chat: the model, with its weights still in the files.
        files: the folder's tensors.
        path: where the adapter is written.
        found: tensor name -> the components that the edit removed.
        label: the edited model's label.

    Raises:
        UserError: when the edit changed biases.
    """
    refuse_readers(path, label)
    # Any direction will do, because only the places of the tensors are needed.
    edit = Edit(mx.ones((1, chat.width)), 1.0, label.layers, label.embedding, places=label.edit)
    planned = plan(source, chat, files, edit, mtp=label.mtp)
    changes: dict[str, Any] = {}
    for parameter, stored in planned.places.items():
        refuse_biases(path, [parameter])
        parts = [low_rank(found[name], _values(files, name)) for name in stored.tensors]
        changes[parameter.removesuffix(".weight")] = stacked(parts)
    for name in planned.copies:
        if "weight" in planned.edits[name].writer.module:  # mlx-lm uses it as the head
            one = low_rank(found[name], _values(files, name))
            changes[planned.edits[name].writer.path] = replace(one, kind="linear")
    with new_folder(path) as staged:
        adapters.write_mlx(staged, Adapter(1.0, changes), {"edited": ADAPTER_NAME})


def _values(files: TensorFiles, name: str) -> mx.array:
    return files.read(name).astype(mx.float32)
