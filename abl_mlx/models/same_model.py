"""Checks that a GGUF is the same model as a loaded one, so that directions fit both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abl_mlx.models import from_gguf
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.support.arrays import number
from convert import gguf_to_mlx
from convert.architectures.gguf_writers import GgufWriter
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.mlx.packed import Packed

#: Texts on which both tokenizers must agree.
_TEXTS = (
    "How do I plan a garden? It's 1234 days.",
    "def add(a, b):\n    return a + b\n",
    "Le café est très chaud, et l'été est déjà là.",
    "你好,世界! Привет, мир!",
)

#: The number of writers whose values are compared, from the first, middle and last layers.
_COMPARED = 6


def check_same(chat: ChatModel, gguf: GgufSource, named: Sequence[GgufWriter]) -> None:
    """Compare sizes, vocabularies and a few weights of a GGUF with those of a loaded model.

    Args:
        chat: the model, loaded from a folder.
        gguf: the open GGUF.
        named: the GGUF's writers.

    Raises:
        UserError: naming the first difference.
    """
    found = gguf_to_mlx.layout(gguf)
    name = gguf.parts[0]
    sizes = {
        "layers": (len(chat.layers), found.config["num_hidden_layers"]),
        "dimensions": (chat.width, gguf.tensor("token_embd.weight").shape[-1]),
    }
    for what, (here, there) in sizes.items():
        if here != there:
            raise UserError(
                f"{name} has {there} {what} and {chat.folder} has {here}: --gguf takes a GGUF of "
                "the very model that is measured."
            )
    tokenizer = from_gguf.tokenizer(gguf, found.config)
    for text in _TEXTS:
        ours, theirs = (
            list(one.encode(text, add_special_tokens=False)) for one in (chat.tokenizer, tokenizer)
        )
        if ours != theirs:
            raise UserError(
                f"{name} and {chat.folder} tokenize {text[:24]!r} differently: --gguf takes a GGUF "
                "of the very model that is measured."
            )
    modules = {_plain(path): module for path, module in chat.model.named_modules()}
    places = found.places()
    matrices = [one for one in named if one.kind == "linear"] or list(named)
    for index in sorted({round(i) for i in np.linspace(0, len(matrices) - 1, _COMPARED)}):
        one = matrices[index]
        path = _plain(places[one.name][0].removesuffix(".weight"))
        if path not in modules:
            raise UserError(
                f"{chat.folder} has no {path}, which {one.name} in {name} would be: --gguf takes "
                "a GGUF of the very model that is measured."
            )
        entry = gguf.tensor(one.name)
        weights, bits = _values(modules[path])
        values = mx.array(gguf.values(one.name))
        gguf.release(one.name)
        columns = found.weights[places[one.name][0]].pieces[0].columns
        if columns is not None:
            values = values[..., mx.array(columns)]
        if weights.shape != values.shape:
            raise UserError(
                f"{one.name} has the shape {tuple(values.shape)} in {name} and "
                f"{tuple(weights.shape)} in {chat.folder}: --gguf takes a GGUF of the very model "
                "that is measured."
            )
        allowed = _allowed(bits) + _allowed(8 * entry.nbytes / values.size)
        error = _distance(weights, values)
        if not error <= allowed:
            raise UserError(
                f"{one.name} in {name} is {error:.0%} off the weights in {chat.folder}, more than "
                f"its type explains ({allowed:.0%}): --gguf takes a GGUF of the very model that is "
                "measured, before any edit or fine-tuning."
            )


def _plain(path: str) -> str:
    return path.removeprefix("language_model.")


def _values(module: nn.Module) -> tuple[mx.array, float]:
    """A module's weights in float32, and the number of bits in which each was stored."""
    if isinstance(module, Packed):
        rows = math.prod(module.shape[:-1])
        return module.rows(0, rows).reshape(module.shape), float(module.bits)
    weight = module["weight"]
    if "scales" not in module:
        return weight.astype(mx.float32), 16.0
    values = mx.dequantize(
        weight, module["scales"], module.get("biases"), group_size=module.group_size,
        bits=module.bits, mode=module.mode,
    )  # fmt: skip
    return values.astype(mx.float32), float(module.bits)


def _distance(ours: mx.array, theirs: mx.array) -> float:
    difference = ours - theirs
    return (number((difference * difference).sum()) / number((ours * ours).sum())) ** 0.5


def _allowed(bits: float) -> float:
    """The allowed relative difference: about three times the error of quantizing."""
    return 0.005 + 4.5 * 2.0**-bits
