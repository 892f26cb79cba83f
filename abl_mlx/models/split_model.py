"""A model split among the ranks: each has a part of every matrix, or some of the layers.

mlx-lm splits the matrices of most architectures (tensor parallel): after each attention and each
MLP the ranks add up what they have. Those of which it can only share out the layers (pipeline
parallel) are run in `stages`. Either way every rank has the whole residual stream after each layer,
and all of them run every prompt together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from abl_mlx.models.layer_stages import in_stages
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
    """Leave this rank its part of every matrix, or its layers where mlx-lm has stages only.

    Raises:
        UserError: when mlx-lm cannot split this architecture, or not into so many parts.
    """
    kind, count = config["model_type"], ranks.everyone()
    whole = sum(value.nbytes for _, value in parameters(model))
    if hasattr(model, "shard"):
        _check_divisible(config.get("text_config") or config, count)
        model.shard(mx.distributed.init())
    elif hasattr(getattr(model, "model", None), "pipeline"):
        in_stages(model, mx.distributed.init())
    else:
        raise UserError(
            f"mlx-lm cannot split a {kind} model among several processes: leave --split-model out."
        )
    part = sum(value.nbytes for _, value in parameters(model))
    say(f"  each of {count} processes holds {in_bytes(part)} of the model's {in_bytes(whole)}")


def by_layers(config: dict[str, Any]) -> bool:
    """Whether models of this configuration are split by layers."""
    from mlx_lm.utils import _get_classes

    return not hasattr(_get_classes(config)[0], "shard")


def _check_divisible(sizes: dict[str, Any], count: int) -> None:
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if isinstance(sizes.get(key), int) and sizes[key] % count:
            raise UserError(
                f"a model with {key} {sizes[key]} cannot be split among {count} processes: start "
                "a number of them that divides it."
            )


def found_in(writers: Sequence[Writer], model: nn.Module) -> list[Writer]:
    """Writers of the whole model as those of its part: with the part's modules.

    Those of other ranks' layers keep the whole model's modules, which nobody calls.
    """
    modules = dict(model.named_modules())
    return [replace(one, module=modules.get(one.path, one.module)) for one in writers]
