"""An edited folder as it was: what its edit took, written back or made an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from abl_mlx.edits.edit import Edit
from abl_mlx.inputs.sources import Source
from abl_mlx.models.chat_model import ChatModel
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
    stacked,
)
from convert import adapters
from convert.adapters import Adapter
from convert.base.atomic import new_folder
from convert.base.hf_config import stored_config
from convert.mlx.folder import rewrite_folder
from convert.mlx.safetensors_files import TensorFiles


def plan(source: Source, chat: ChatModel, files: TensorFiles, edit: Edit, *, mtp: bool) -> Plan:
    """What an edit changes in the folder's float tensors; no weight is read.

    Args:
        chat: the model, its weights still in the files.

    Raises:
        UserError: when one of them is quantized.
    """
    found = plan_folder(chat, files, edit, find_writers(chat), mtp=mtp)
    if found.matrices:
        raise quantized(next(iter(found.matrices)), source)
    return found


def write(source: Source, files: TensorFiles, path: Path, found: Mapping[str, Taken]) -> float:
    """Write the folder as it was before its edit.

    Args:
        found: tensor -> what the edit took out of it.

    Returns:
        The share of what was taken that is not back in the written weights.
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
    """Write an adapter for mlx-lm that adds what the edit took.

    Args:
        chat: the model, its weights still in the files.
        found: tensor -> what the edit took out of it.

    Raises:
        UserError: when the edit changed biases.
    """
    # Only the tensors' places are asked for, which no direction changes.
    edit = Edit(mx.ones((1, chat.width)), 1.0, label.layers, label.embedding)
    planned = plan(source, chat, files, edit, mtp=label.mtp)
    changes: dict[str, Any] = {}
    for parameter, stored in planned.places.items():
        refuse_biases(path, [parameter])
        parts = [low_rank(found[name], _values(files, name)) for name in stored.tensors]
        changes[parameter.removesuffix(".weight")] = stacked(parts)
    for name in planned.copies:
        if "weight" in planned.edits[name].writer.module:  # mlx-lm takes it for the head
            one = low_rank(found[name], _values(files, name))
            changes[planned.edits[name].writer.path] = replace(one, kind="linear")
    with new_folder(path) as staged:
        adapters.write_mlx(staged, Adapter(1.0, changes), {"edited": ADAPTER_NAME})


def _values(files: TensorFiles, name: str) -> mx.array:
    return files.read(name).astype(mx.float32)
