"""A GGUF as a chat model in MLX, and its residual writers as modules of that model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from abl_mlx.gguf_edit import writer_of
from abl_mlx.models import ChatModel, load_tokenizer, progress
from abl_mlx.writers import Writer
from convert.errors import UserError
from convert.gguf_file import GgufSource
from convert.gguf_to_mlx import Layout
from convert.gguf_to_mlx import load as load_weights
from convert.gguf_to_tokenizer import write_tokenizer
from convert.gguf_writers import GgufWriter
from convert.scratch import scratch


def load(gguf: GgufSource) -> tuple[ChatModel, Layout]:
    """The model of an open GGUF, with its tokenizer; everything comes from the file.

    Raises:
        UserError: an architecture or a tokenizer that MLX cannot run, a file without a chat
            template, damaged values.
    """
    size = sum(entry.nbytes for entry in gguf.tensors.values())
    with progress(size, "load", "B") as bar:
        found = load_weights(gguf, progress=bar.update)
    config = dict(found.config)
    wrapper = tokenizer(gguf, config)
    return ChatModel(gguf.parts[0], found.model, wrapper, config), found.layout


def tokenizer(gguf: GgufSource, config: dict[str, Any]) -> Any:
    """mlx-lm's TokenizerWrapper made from the file's metadata.

    Args:
        config: config.json; gets the tokenizer's ids.
    """
    with scratch() as folder:
        # Without a config.json beside it transformers takes the tokenizer as it is; for some
        # architectures it would build another in its stead.
        config |= write_tokenizer(gguf.metadata, folder)
        return load_tokenizer(folder, config, gguf.parts[0])


def find_writers(
    chat: ChatModel, layout: Layout, gguf: GgufSource, named: Sequence[GgufWriter]
) -> list[Writer]:
    """The writers that are edited in the GGUF, as the modules that run in MLX.

    Args:
        named: the file's writers.

    Raises:
        UserError: when a tensor is no module of its own in MLX.
    """
    places = layout.places()
    modules = dict(chat.model.named_modules())
    writers = []
    for one in named:
        paths = places.get(one.name, [])
        module = modules.get(paths[0].removesuffix(".weight")) if len(paths) == 1 else None
        if module is None:
            raise UserError(
                f"{one.name} in {gguf.parts[0]} writes to the residual stream, but is no module of "
                f"its own in mlx-lm's model for {gguf.architecture}: measure on the MLX or Hugging "
                "Face model, and give this file with --gguf."
            )
        path = paths[0].removesuffix(".weight")
        writers.append(replace(writer_of(gguf, one), path=path, module=module))
    return writers
