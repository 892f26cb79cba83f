"""A model split among the ranks by mlx-lm, each with a part of every matrix (tensor parallel).

After each attention and each MLP the ranks add up what they have, so every rank has the whole
residual stream, and all of them run every prompt together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from abl_mlx.support import ranks
from abl_mlx.support.arrays import parameters
from abl_mlx.support.console import say
from abl_mlx.support.units import in_bytes
from convert.base.errors import UserError

if TYPE_CHECKING:
    from abl_mlx.models.writers import Writer


def begin() -> None:
    """Split every model that is loaded from now on.

    Raises:
        UserError: when there is only one rank.
    """
    if ranks.size() == 1:
        raise UserError(
            "--split-model splits a model among the processes of mlx.launch, and there is one "
            "only: start several, or leave the flag out."
        )
    ranks.in_lockstep()


def split(model: nn.Module, config: dict[str, Any]) -> None:
    """Leave this rank its part of every matrix.

    Raises:
        UserError: when mlx-lm cannot split this architecture, or not into so many parts.
    """
    kind, count = config["model_type"], ranks.everyone()
    if not hasattr(model, "shard"):
        raise UserError(
            f"mlx-lm cannot split a {kind} model among several processes: leave --split-model out."
        )
    text = config.get("text_config") or config
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if isinstance(text.get(key), int) and text[key] % count:
            raise UserError(
                f"a model with {key} {text[key]} cannot be split among {count} processes: start "
                "a number of them that divides it."
            )
    whole = sum(value.nbytes for _, value in parameters(model))
    model.shard(mx.distributed.init())
    part = sum(value.nbytes for _, value in parameters(model))
    say(f"  each of {count} processes holds {in_bytes(part)} of the model's {in_bytes(whole)}")


def found_in(writers: Sequence[Writer], model: nn.Module) -> list[Writer]:
    """Writers of the whole model as those of its part: with the part's modules."""
    modules = dict(model.named_modules())
    return [replace(one, module=modules[one.path]) for one in writers]
