"""A model whose layers are shared out among the ranks (pipeline parallel).

In mlx-lm's own pipelines the layers of other ranks are missing, and a rank sees the stream behind
its own layers only. Here each layer that a rank does not have keeps its place: called, it returns
what the rank that has it computes, and only counts the tokens in its cache. So whatever looks at
layers or changes the stream behind them does the same on every rank. The states are exchanged after
every layer; tensor parallelism does so twice in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abl_mlx.models.hooks import Around, around
from abl_mlx.support.arrays import parameters
from convert.base.errors import UserError

_NAME = "_abl_stages"


def in_stages(model: nn.Module, group: mx.distributed.Group) -> None:
    """Leave this rank its layers: the first ranks have the first ones, and about as many each.

    Args:
        model: one with ``layers``, which take the states first and return states.
        group: all ranks.

    Raises:
        UserError: when there are more ranks than layers.
    """
    layers, count = list(model.layers), group.size()
    if len(layers) < count:
        raise UserError(
            f"a model of {len(layers)} layers cannot be split among {count} processes, each of "
            f"which needs one: start at most {len(layers)}."
        )
    widening = _widening(model, layers)
    for index, layer in enumerate(layers):
        mine = index * count // len(layers) == group.rank()
        if not mine:
            layer.clear()  # parameters and modules; what the model asks of a layer stays
        kind: type = type(layer)
        layer.__class__ = _staged(kind, mine, index in widening)
    object.__setattr__(model, _NAME, True)


def has_stages(model: nn.Module) -> bool:
    """Whether the model's layers are shared out.

    Then the rank that has a layer alone knows derivatives with respect to what changes inside it.
    """
    return _NAME in vars(model)


def _widening(model: nn.Module, layers: Sequence[nn.Module]) -> set[int]:
    """Numbers of the layers whose output is float32 though the model has weights of 16 bits, too.

    The ranks without a layer have to know the type that they get. A pass is looked at, and not
    evaluated.
    """
    kinds = {value.dtype for _, value in parameters(model)}
    if len({kind for kind in kinds if mx.issubdtype(kind, mx.floating)}) == 1:
        return set()
    found: set[int] = set()

    def look(index: int) -> Around:
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            if output.dtype == mx.float32:
                found.add(index)
            return output

        return wrapper

    with around([(layer, look(index)) for index, layer in enumerate(layers)]):
        model(mx.array([[1, 1]], mx.int32))
    return found


@cache
def _staged(kind: type, mine: bool, widens: bool) -> type:
    """The class of a layer that all ranks get the output of.

    Args:
        kind: the layer's own class.
        mine: whether it runs on this rank.
        widens: whether it puts out float32, whatever it is given.
    """

    def __call__(self: nn.Module, states: Any, *args: Any, **kwargs: Any) -> mx.array:
        states = _shared(states)
        if mine:
            return _added(kind.__call__(self, states, *args, **kwargs))
        for one in (*args, *kwargs.values()):
            _count_tokens(one, states)
        return _added((states * 0).astype(mx.float32 if widens else states.dtype))

    return type(kind.__name__, (kind,), {"__call__": __call__})


@mx.custom_function
def _shared(states: mx.array) -> mx.array:
    """The same states, whose gradients the ranks add up: only one has that of a layer."""
    return states


@_shared.vjp
def _gradient(_primals: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
    return _added(cotangent)


# The last sum that was asked for.
_last: mx.array | None = None


def _added(part: mx.array) -> mx.array:
    """The sum of all ranks' parts.

    MLX computes what does not depend on each other in an order that differs between ranks, because
    their graphs do. So each sum waits for the one before.
    """
    global _last
    _last = mx.distributed.all_sum(part if _last is None else mx.depends(part, _last))
    return _last


def _count_tokens(cache: Any, states: mx.array) -> None:
    """Let a layer's cache know of tokens (B, T, d) as if the layer had run.

    Masks and positions follow from the first caches of a model, whichever rank has these layers.
    What is put in depends on the states, so that all ranks exchange the same when caches are
    evaluated.
    """
    from mlx_lm.models.cache import ArraysCache

    nothing = states[:, None, :, :1] * 0
    if isinstance(cache, ArraysCache):
        for place in range(len(cache.cache)):
            cache[place] = nothing[:, :, -1]
        cache.advance(states.shape[1])
    elif hasattr(cache, "update_and_fetch"):
        cache.update_and_fetch(nothing, nothing)
