"""Ablation and addition of directions that logits can be differentiated with respect to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx

from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import Around, around, around_method
from abl_mlx.models.residuals import replaced, residual
from abl_mlx.models.writers import Writer


def orthonormal(rows: mx.array) -> mx.array:
    """Gram-Schmidt: orthonormal rows with the span of rows (k, d), and the first row's sign."""
    found: list[mx.array] = []
    for index in range(rows.shape[0]):
        row = rows[index]
        for one in found:
            row = row - (row * one).sum() * one
        found.append(row / mx.sqrt((row * row).sum()))
    return mx.stack(found)


@contextmanager
def ablated(writers: Sequence[Writer], rows: mx.array) -> Iterator[None]:
    """Context manager in which the writers' outputs lose their components along rows (k, d).

    The logits are those of `steering.ablation` with an edit of the same directions at strength 1.
    """
    with ExitStack() as stack:
        stack.enter_context(around([(one.module, _without(rows, one)) for one in writers]))
        for one in writers:
            if one.tied:
                stack.enter_context(around_method(one.module, "as_linear", _head(rows, one)))
        yield


@contextmanager
def added(chat: ChatModel, vector: mx.array, layer: int) -> Iterator[None]:
    """Context manager that adds a vector (d,) to the stream after a layer, at all tokens."""

    def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        states = residual(output, layer, chat.width)
        return replaced(output, states + vector.astype(states.dtype))

    with around([(chat.layers[layer], wrapper)]):
        yield


def _basis(rows: mx.array, writer: Writer) -> mx.array:
    return orthonormal(rows if writer.gain is None else rows * writer.gain[None, :])


def _without(rows: mx.array, writer: Writer) -> Around:
    basis = _basis(rows, writer)

    def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        unit = basis.astype(output.dtype)
        return output - (output @ unit.T) @ unit

    return wrapper


def _head(rows: mx.array, writer: Writer) -> Around:
    basis = _basis(rows, writer)

    def wrapper(call: Any, states: mx.array) -> Any:
        unit = basis.astype(states.dtype)
        return call(states - (states @ unit.T) @ unit)

    return wrapper
