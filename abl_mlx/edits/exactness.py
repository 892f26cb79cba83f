"""Checks that nothing of the direction is left in an edited model's residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from abl_mlx.edits.edit import Edit, orthonormal
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import around
from abl_mlx.models.writers import Writer, find_writers
from abl_mlx.support.arrays import number
from convert.base.errors import UserError

#: The largest |r·h| / |h| that a complete edit of float32 or float16 weights may leave.
LIMIT = 1e-4

# The same for bfloat16, which has 8 bits of precision: the best rounding leaves 6e-4 in a model of
# width 64 and 1e-4 in one of width 2048. A writer that was not edited leaves ten times as much.
_BFLOAT16_LIMIT = 1e-3


def is_complete(edit: Edit) -> bool:
    """Whether the edit removes the whole direction everywhere, so that no component may be left."""
    return edit.strength == 1 and edit.layers is None and edit.embedding and edit.is_plain


def limit_for(types: Iterable[str]) -> float | None:
    """The largest |r·h| / |h| that a complete edit may leave in weights of these types.

    None if one of them is a quantized type.

    Args:
        types: names of types as in files: F32, F16, BF16, Q8_0, ...
    """
    limits = {"F32": LIMIT, "F16": LIMIT, "BF16": _BFLOAT16_LIMIT}
    kinds = set(types)
    return max(limits[kind] for kind in kinds) if kinds and kinds <= set(limits) else None


def matrix_types(types: Iterable[tuple[str, tuple[int, ...]]]) -> set[str]:
    """The types of those tensors, given as (type, shape), that have at least two dimensions."""
    return {kind for kind, shape in types if len(shape) > 1}


def moved(writers: Iterable[Writer], chat: ChatModel) -> list[Writer]:
    """The writers with the modules of another model of the same architecture.

    For instance the same model with an adapter.
    """
    modules = dict(chat.model.named_modules())
    return [replace(writer, module=modules[writer.path]) for writer in writers]


def by_layer(
    chat: ChatModel,
    writers: Sequence[Writer],
    sequences: Sequence[Sequence[int]],
    directions: mx.array,
) -> tuple[list[float], dict[str, float]]:
    """The largest |r·h| / |h| after each layer, and the largest |u·y| / |y| of each writer.

    h is a state of the residual stream, y a writer's output, and u the direction that the edit
    removes from y (r, or normalize(g ⊙ r) where a gain g follows). The model computes in float32
    whatever type its weights have, because the embeddings are turned into float32.

    Args:
        chat: the edited model.
        writers: its residual writers.
        sequences: encoded prompts, run one by one.
        directions: (k, d).

    Returns:
        One number for each layer, and writer's path -> number.
    """
    unit = orthonormal(directions)
    layers: list[mx.array | None] = [None] * len(chat.layers)
    outputs: dict[str, mx.array] = {}
    edit = Edit(directions)

    def watch_layer(index: int) -> Any:
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            states = output[0] if isinstance(output, tuple | list) else output
            layers[index] = _larger(layers[index], states, unit)
            return output

        return wrapper

    def watch_writer(writer: Writer) -> Any:
        basis = edit.basis(writer)

        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            if writer.kind == "embedding":
                output = output.astype(mx.float32)
            outputs[writer.path] = _larger(outputs.get(writer.path), output, basis)
            return output

        return wrapper

    pairs = [(layer, watch_layer(index)) for index, layer in enumerate(chat.layers)]
    pairs += [(writer.module, watch_writer(writer)) for writer in writers]
    with around(pairs):
        for sequence in sequences:
            chat.model(mx.array([list(sequence)], mx.int32))
            mx.eval([one for one in layers if one is not None], list(outputs.values()))
    return (
        [0.0 if one is None else number(one) for one in layers],
        {path: number(value) for path, value in outputs.items()},
    )


def _larger(before: mx.array | None, states: mx.array, basis: mx.array) -> mx.array:
    states = states.reshape(-1, states.shape[-1]).astype(mx.float32)
    along = mx.abs(states @ basis.T).max(axis=-1)
    share = (along / mx.maximum(mx.sqrt((states * states).sum(axis=-1)), 1e-30)).max()
    return share if before is None else mx.maximum(before, share)


def check(
    chat: ChatModel,
    edit: WeightEdit,
    sequences: Sequence[Sequence[int]],
    *,
    limit: float = LIMIT,
    writers: Sequence[Writer] | None = None,
) -> list[float] | None:
    """Check that a complete edit left no component of the direction in the residual stream.

    Args:
        chat: the edited model, as it was written.
        edit: the edit.
        sequences: encoded prompts. A few are enough, because every token is checked.
        limit: the result of `limit_for`.
        writers: the model's writers; None to find them, which fails for a model with an adapter.

    Returns:
        The largest |r·h| / |h| after each layer; None for an edit that is not complete.

    Raises:
        UserError: when it exceeds ``limit``; with the first such layer, and the module that writes
            most of it.
    """
    if not isinstance(edit, Edit) or not is_complete(edit):
        return None
    writers = find_writers(chat) if writers is None else writers
    layers, outputs = by_layer(chat, writers, sequences, edit.directions)
    worst = next((index for index, share in enumerate(layers) if not share <= limit), None)
    if worst is None:
        return layers
    blamed = {
        writer.path: outputs[writer.path]
        for writer in writers
        if writer.layer <= worst and not outputs.get(writer.path, 0.0) <= limit
    }
    if blamed:
        path = max(blamed, key=lambda path: blamed[path])
        who = f"most of it written by {path} ({blamed[path]:.1e} of its output)"
    else:
        who = "though every residual writer's output is free of it"
    raise UserError(
        f"the edited model still holds {layers[worst]:.1e} of the direction in its residual stream "
        f"after layer {worst}, {who}: more than {limit:g}, so the edit is not exact; write the "
        "edited weights in a more precise type, and if they are precise already, please report it."
    )
