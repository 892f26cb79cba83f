"""Loads a GGUF as a chat model in MLX, and finds its residual writers in that model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abl_mlx.models import readers, sweeps
from abl_mlx.models.chat_model import ChatModel, load_tokenizer
from abl_mlx.models.stages import Stages, absent
from abl_mlx.models.writers import Writer, with_heads
from abl_mlx.support import ranks
from abl_mlx.support.console import progress
from convert.architectures.gguf_writers import GgufWriter
from convert.base.errors import UserError, of
from convert.base.scratch import scratch
from convert.gguf.file import GgufSource
from convert.gguf_to_mlx import Layout
from convert.gguf_to_mlx import load as load_weights
from convert.gguf_to_mlx.parameters import shape_of
from convert.gguf_to_mlx.values import values_of
from convert.tokenizers.from_gguf import write_tokenizer


def load(gguf: GgufSource, *, streamed: bool = False) -> tuple[ChatModel, Layout]:
    """The model and tokenizer of an open GGUF, made from this file alone.

    Args:
        gguf: the open file.
        streamed: whether matrices stay in the file, which must then stay open, and are read layer
            by layer when the model runs.

    Raises:
        UserError: when MLX cannot run the architecture or the tokenizer, the file has no chat
            template, or values are damaged.
    """
    if ranks.lockstep():
        raise UserError(
            f"{gguf.parts[0].name}: --split-model splits MLX and Hugging Face folders: convert the "
            "GGUF first (`abl-mlx convert`), or leave the flag out."
        )
    size = sum(entry.nbytes for entry in gguf.tensors.values())
    with progress(size, "load", "B") as bar:
        if streamed:
            found = load_weights(gguf, widen=False, progress=bar.update, instead=absent)
            sweeps.stream(
                found.model, Stages(found.model, list(found.model.layers), found.parts.again)
            )
        else:
            found = load_weights(gguf, progress=bar.update)
    config = dict(found.config)
    wrapper = tokenizer(gguf, config)
    return ChatModel(gguf.parts[0], found.model, wrapper, config), found.layout


def tokenizer(gguf: GgufSource, config: dict[str, Any]) -> Any:
    """mlx-lm's TokenizerWrapper, made from the file's metadata.

    Args:
        gguf: the open file.
        config: the contents of config.json; the tokenizer's special ids are added to it.
    """
    with scratch() as folder:
        # No config.json is written beside it: for some architectures transformers would then build
        # another tokenizer instead of using these files as they are.
        with of(gguf.parts[0]):
            config |= write_tokenizer(gguf.metadata, folder)
        return load_tokenizer(folder, config, gguf.parts[0])


def find_writers(
    chat: ChatModel, layout: Layout, gguf: GgufSource, named: Sequence[GgufWriter]
) -> list[Writer]:
    """The residual writers of a GGUF, as modules of the MLX model.

    Args:
        chat: the model.
        layout: which of its parameters are made from which tensors.
        gguf: the open file.
        named: the file's writers.

    Raises:
        UserError: when no module of the model is made from exactly one writer.
    """
    places = layout.places()
    modules = dict(chat.model.named_modules())
    writers = []
    for one in named:
        paths = places.get(one.name, [])
        module = modules.get(paths[0].removesuffix(".weight")) if len(paths) == 1 else None
        if module is None:
            raise UserError(
                f"{one.name} in {gguf.parts[0]} writes to the residual stream, but is not a single "
                f"module in mlx-lm's model for {gguf.architecture}: measure on the MLX or Hugging "
                "Face model, and give this file with --gguf."
            )
        path = paths[0].removesuffix(".weight")
        writers.append(replace(writer_of(gguf, one), path=path, module=module))
    return writers


def find_readers(gguf: GgufSource, layout: Layout) -> list[Writer]:
    """The tensors of a GGUF that read the residual stream, as `Writer` for edits of the file.

    They are found in mlx-lm's model, of which only vectors are read. Their modules are empty.

    Args:
        gguf: the open file.
        layout: which parameters are made from which tensors; its model gets the file's norms.

    Raises:
        UserError: when the model's readers cannot be edited, or are not whole tensors.
    """
    vectors = [
        (path, mx.array(values_of(gguf, weight)))
        for path, weight in layout.weights.items()
        if len(shape_of(gguf, weight)) == 1
    ]
    layout.model.load_weights(vectors, strict=False)
    chat = ChatModel(gguf.parts[0], layout.model, None, layout.config)
    by_path = {f"{one.path}.weight": one for one in readers.find_readers(chat)}
    found: dict[str, Writer] = {}
    for name, paths in layout.places().items():
        reading = [by_path[path] for path in paths if path in by_path]
        if not reading:
            continue
        weights = [layout.weights[path] for path in paths]
        whole = all(
            weight.change is None and all(piece.columns is None for piece in weight.pieces)
            for weight in weights
        )
        if not whole or len(reading) < len(paths) or not _alike(reading):
            raise UserError(
                f"--edit readers: {name} in {gguf.parts[0]} does not read the residual stream with "
                "all of its rows: edit the writers."
            )
        kind = "expert-readers" if len(gguf.tensors[name].shape) == 3 else "reader"
        kind = "embedding" if reading[0].tied else kind
        found[name] = replace(reading[0], path=name, kind=kind, module=nn.Module())
    return list(found.values())


def _alike(found: Sequence[Writer]) -> bool:
    """Whether readers have the same gain, as the parts of one tensor must."""
    first = found[0]
    return all(
        one.centered == first.centered
        and (one.gain is None) == (first.gain is None)
        and (
            one.gain is None
            or first.gain is None
            or mx.allclose(one.gain, first.gain, rtol=1e-3, atol=1e-4).item()
        )
        for one in found
    )


def writer_of(source: GgufSource, one: GgufWriter) -> Writer:
    """A GGUF's writer as a `Writer` for edits of the file; its module is empty."""
    gain = None
    if one.gains:
        product = np.prod([source.values(name) for name in one.gains], axis=0)
        gain = mx.array(product.astype(np.float32))
    # The copy of the embedding in a block for multi-token prediction is edited as the embedding is.
    path = "token_embd.weight" if one.name.endswith("nextn.embed_tokens.weight") else one.name
    found = Writer(path, one.kind, one.layer, gain, one.bias is not None, nn.Module(), one.tied)
    shape = source.tensors[one.name].shape
    if one.kind == "experts":
        return replace(found, parts=shape[0])
    heads = source.metadata.get(f"{source.architecture}.attention.head_count")
    if isinstance(heads, list):
        heads = heads[one.layer] if 0 <= one.layer < len(heads) else None
    return with_heads(found, shape[-1], heads)
