"""A stored copy of a tied output head: ``lm_head.weight`` beside the embedding it equals.

Some folders have one (Granite 4.1, and Gemma 3 as some tools save it). mlx-lm drops it for most
architectures, but for Gemma 3 it uses it as the head, as other programs may. So the copy is edited
like the embedding, and all programs that read the edited folder get the same model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.nn as nn

from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.writers import Writer
from convert.base.hf_config import is_tied
from convert.mlx.safetensors_files import TensorFiles

_HEAD = re.compile(
    r"(?:(?:model|language_model|text_model|transformer|backbone)\.)*(?:lm_head|embed_out)\.weight"
)


def find(files: TensorFiles, config: Mapping[str, Any], writers: Sequence[Writer]) -> list[str]:
    """Names of the tensors that are copies of a tied head; none if the head is not tied.

    Args:
        files: the folder's tensors.
        config: the contents of config.json.
        writers: the model's writers.
    """
    embedding = next(writer for writer in writers if writer.kind == "embedding")
    if not (embedding.tied or is_tied(config)):
        return []
    return [name for name in files.names if _HEAD.fullmatch(name)]


def as_writer(name: str, embedding: Writer, chat: ChatModel) -> Writer:
    """The copy as a writer, which is edited like the embedding.

    Args:
        name: the name of the copy's tensor.
        embedding: the embedding.
        chat: the model, which may have a module for the copy.
    """
    path = name.removesuffix(".weight")
    modules = dict(chat.model.named_modules())
    return replace(embedding, path=path, module=modules.get(path, nn.Module()))
