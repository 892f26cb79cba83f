"""Checks that an edited model is free of the direction after every layer; else names the cause."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from abl_mlx.edits.edit import Edit, orthonormal
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import around
from abl_mlx.models.writers import Writer, find_writers
from abl_mlx.support.arrays import number
from convert.base.errors import UserError

#: The largest |r·h| / |h| that a complete edit of float weights leaves.
LIMIT = 1e-4

# bfloat16 has 8 bits: rounded as well as may be, it leaves 6e-4 in a model 64 wide and 1e-4 in one
# of 2048. A writer that was missed leaves ten times as much.
_BFLOAT16_LIMIT = 1e-3


def is_complete(edit: Edit) -> bool:
    """Whether the edit removes the whole direction, so that no component should be left."""
    return edit.strength == 1 and edit.layers is None and edit.embedding and edit.is_plain


def limit_for(types: Iterable[str]) -> float | None:
    """What a complete edit of weights of these types may leave at most; None for quantized ones.

    Args:
        types: as files name them: F32, F16, BF16, Q8_0, ...
    """
    limits = {"F32": LIMIT, "F16": LIMIT, "BF16": _BFLOAT16_LIMIT}
    kinds = set(types)
    return max(limits[kind] for kind in kinds) if kinds and kinds <= set(limits) else None


def matrix_types(types: Iterable[tuple[str, tuple[int, ...]]]) -> set[str]:
    """The types of the tensors, given as (type, shape), that have at least two dimensions."""
    return {kind for kind, shape in types if len(shape) > 1}


def moved(writers: Iterable[Writer], chat: ChatModel) -> list[Writer]:
    """The same writers in another model of the same architecture, such as one with an adapter."""
    modules = dict(chat.model.named_modules())
    return [replace(writer, module=modules[writer.path]) for writer in writers]


def by_layer(
    chat: ChatModel,
    writers: Sequence[Writer],
    sequences: Sequence[Sequence[int]],
    directions: mx.array,
) -> tuple[list[float], dict[str, float]]:
    """The largest |r·h| / |h| after every layer, and |u·y| / |y| of every writer's output y.

    Runs in float32 whatever the weights are stored in: embeddings are widened, and everything
    that meets them follows. A writer's u is where its output must have nothing, behind its gain.

    Args:
        sequences: encoded prompts, run one by one.
        directions: (k, d).
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
    edit: Edit,
    sequences: Sequence[Sequence[int]],
    *,
    limit: float = LIMIT,
    writers: Sequence[Writer] | None = None,
) -> list[float] | None:
    """Raise when a complete edit left a component of the direction in the residual stream.

    Args:
        chat: the edited model, as it was written.
        sequences: encoded prompts; a few are enough: what is looked at holds at every token.
        limit: from `limit_for`.
        writers: of the model, where they are known; a model with an adapter cannot be probed.

    Returns:
        the largest |r·h| / |h| after every layer; None for an edit that is not complete.

    Raises:
        UserError: with the first layer above ``limit`` and the module that writes most of it.
    """
    if not is_complete(edit):
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
        "edited weights in a finer type, and if they are finer already, please report it."
    )
