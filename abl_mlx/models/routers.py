"""Finds the biases by which the routers of a model choose experts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

import mlx.core as mx
import mlx.nn as nn

from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.writers import LOGIT_ROUTER, SCORE_ROUTER, Writer
from convert.base.errors import UserError
from convert.gguf.file import GgufSource

#: Names of biases in mlx-lm's models that are added to scores between 0 and 1, and to logits.
_SCORES = re.compile(r"(?:e_score_correction_bias|expert_bias)")
_LOGITS = re.compile(r"(?:.*\.)?(?:router|gate)\.bias")

_OF_GGUF = re.compile(r"blk\.(\d+)\.(exp_probs_b(?:\.bias)?|ffn_gate_inp\.bias)")


def refusal(architecture: str) -> UserError:
    """The error for a model without such biases."""
    return UserError(
        f"--edit routers: the routers of this model ({architecture}) have no bias that could be "
        "lowered; leave it out, so that --experts edits what the experts write."
    )


def find_routers(chat: ChatModel, writers: Sequence[Writer]) -> list[Writer]:
    """The routers with a bias, as `Writer`, layer by layer.

    Args:
        chat: the model, whose weights may still be in their files.
        writers: its residual writers.

    Raises:
        UserError: when no router has a bias.
    """
    modules = dict(chat.model.named_modules())
    found = []
    for one in (one for one in writers if one.kind == "experts"):
        # model.layers.1.mlp.switch_mlp.down_proj -> model.layers.1.mlp
        block = str(PurePosixPath(one.path.replace(".", "/")).parent.parent).replace("/", ".")
        inside = {path: module for path, module in modules.items()
                  if path == block or path.startswith(f"{block}.")}  # fmt: skip
        found += [_router(*place, one) for place in _biases(inside, block, one.parts)]
    if not found:
        raise refusal(chat.model_type)
    return found


def _biases(
    inside: dict[str, nn.Module], block: str, experts: int
) -> list[tuple[str, nn.Module, str, str]]:
    """(path of the module, module, name of the bias, kind) of each bias in a block."""
    found = []
    for path, module in inside.items():
        for name in module:
            value = module[name]
            if not isinstance(value, mx.array) or value.size != experts:
                continue
            full = f"{path}.{name}".removeprefix(f"{block}.")
            if _SCORES.fullmatch(name):
                found.append((path, module, name, SCORE_ROUTER))
            elif _LOGITS.fullmatch(full):
                found.append((path, module, name, LOGIT_ROUTER))
    return found


def _router(path: str, module: nn.Module, name: str, kind: str, experts: Writer) -> Writer:
    return Writer(path, kind, experts.layer, None, False, module, router=name, inputs=experts.parts)


def of_gguf(gguf: GgufSource) -> list[Writer]:
    """The biases of a GGUF's routers, as `Writer` for edits of the file; their modules are empty.

    Raises:
        UserError: when there are none.
    """
    found = []
    for name, entry in gguf.tensors.items():
        named = _OF_GGUF.fullmatch(name)
        if named is None:
            continue
        kind = LOGIT_ROUTER if named[2].startswith("ffn") else SCORE_ROUTER
        found.append(
            Writer(
                name, kind, int(named[1]), None, False, nn.Module(), router="bias",
                inputs=entry.shape[-1],
            )
        )  # fmt: skip
    if not found:
        raise refusal(gguf.architecture)
    return sorted(found, key=lambda one: one.layer)
