"""Residual-stream states at chosen token positions, batched and streamed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx import heads
from abl_mlx.arrays import numpy_of
from abl_mlx.hooks import around
from abl_mlx.models import ChatModel, progress
from abl_mlx.prefix import shared
from abl_mlx.units import in_bytes
from convert.errors import UserError

#: Tokens in one batch, padding included. Bounds the activations held at once, not the result.
TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Batch:
    """Prompts of like length, right-padded.

    Attributes:
        indices: which prompts of the input these are.
        tokens: (B, T) int32.
        lengths: (B,) real tokens in each row.
    """

    indices: list[int]
    tokens: mx.array
    lengths: mx.array


def batches(sequences: Sequence[Sequence[int]], tokens: int = TOKENS_PER_BATCH) -> Iterator[Batch]:
    """Batches of at most ``tokens`` tokens (or one sequence), sorted by length to pad little.

    Padding stands on the right: a causal model's states at a real position do not see it, so no
    mask is needed (DESIGN section 7).
    """
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and len(sequences[order[stop]]) * (stop + 1 - start) <= tokens:
            stop += 1
        chosen = order[start:stop]
        longest = len(sequences[chosen[-1]])
        rows = [
            list(sequences[index]) + [0] * (longest - len(sequences[index])) for index in chosen
        ]
        yield Batch(
            chosen, mx.array(rows, mx.int32), mx.array([len(sequences[index]) for index in chosen])
        )
        start = stop


def residual(output: Any, layer: int, width: int) -> mx.array:
    """The residual stream in a layer's output: (B, T, d), the first where it is a tuple.

    Raises:
        UserError: where the layer's output is of another form.
    """
    states = output[0] if isinstance(output, tuple | list) else output
    if isinstance(states, mx.array) and states.ndim == 4 and states.shape[-1] == width:
        count = states.size // max(1, width * states.shape[0] * states.shape[1])
        raise UserError(
            f"this model runs {count} residual streams side by side (layer {layer} puts out the "
            f"form {tuple(states.shape)}), and a direction is measured on one: no direction can be "
            "found on it, but one that is given can be removed: `abl-mlx apply DIRECTION MODEL`."
        )
    if not isinstance(states, mx.array) or states.ndim != 3 or states.shape[-1] != width:
        form = states.shape if isinstance(states, mx.array) else type(states).__name__
        raise UserError(
            f"the output of layer {layer} has the form {form} instead of (batch, tokens, {width}): "
            "this architecture has no single residual stream to read."
        )
    return states


def check_stream(chat: ChatModel) -> None:
    """Refuse, before any long work, a model whose layers put out no single stream.

    Shapes are looked at; nothing is computed.

    Raises:
        UserError: as `residual`.
    """
    with Recorder(chat), heads.unseen(chat.model):
        chat.model(mx.array([[1, 1]], mx.int32))


class Recorder:
    """Collects the residual stream after every layer while the model runs.

    Use as a context manager; after a call of the model inside it, `take` returns the states.
    """

    def __init__(self, chat: ChatModel):
        self._chat = chat
        self._states: list[mx.array | None] = [None] * len(chat.layers)
        self._around: Any = None

    def __enter__(self) -> Recorder:
        self._around = around(
            [(layer, self._keep(index)) for index, layer in enumerate(self._chat.layers)]
        )
        self._around.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._around.__exit__(*error)

    def _keep(self, index: int) -> Any:
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            self._states[index] = residual(output, index, self._chat.width)
            return output

        return wrapper

    def take(self, lengths: mx.array, offsets: Sequence[int]) -> mx.array:
        """The states at ``length + offset``, offsets being negative: (B, L, P, d) float32.

        Nothing is evaluated yet.
        """
        rows = mx.arange(lengths.size)[:, None]
        columns = lengths[:, None] + mx.array(list(offsets))[None, :]
        taken = []
        for index, states in enumerate(self._states):
            if states is None:
                raise UserError(f"layer {index} was not called when the model ran.")
            taken.append(states[rows, columns].astype(mx.float32))
            self._states[index] = None
        return mx.stack(taken, axis=1)


def check_offsets(sequences: Sequence[Sequence[int]], offsets: Sequence[int]) -> None:
    """Refuse offsets that are not negative or reach before the shortest sequence's beginning."""
    shortest = min(len(sequence) for sequence in sequences)
    for offset in offsets:
        if not -shortest <= offset <= -1:
            raise UserError(
                f"the token position {offset} is outside the shortest prompt, which has {shortest} "
                f"tokens: positions run from -{shortest} to -1 (the last)."
            )


def iterate(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    offsets: Sequence[int] = (-1,),
    *,
    label: str = "capture",
) -> Iterator[tuple[list[int], mx.array]]:
    """Yield (indices, states) batch by batch; states are (B, L, P, d) float32, evaluated.

    ``states[b, l, p]`` is the residual stream of prompt ``indices[b]`` after layer l (before the
    final norm) at ``offsets[p]`` tokens from the prompt's end.

    Raises:
        UserError: an offset outside the shortest prompt; a layer without a residual stream.
    """
    check_offsets(sequences, offsets)
    unseen = heads.unseen(chat.model)
    with Recorder(chat) as recorder, unseen, progress(len(sequences), label) as bar:
        prefix = shared(chat, sequences, keep=-min(offsets))
        for batch in batches(prefix.rest(sequences)):
            prefix(batch.tokens)
            states = recorder.take(batch.lengths, offsets)
            mx.eval(states)
            bar.update(len(batch.indices))
            yield batch.indices, states


def mean(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    offsets: Sequence[int] = (-1,),
    *,
    label: str = "capture",
) -> mx.array:
    """Mean state over the prompts: (L, P, d) float32. Holds one batch and one sum at a time."""
    total: mx.array | None = None
    for _, states in iterate(chat, sequences, offsets, label=label):
        part = states.sum(axis=0)
        total = part if total is None else total + part
        mx.eval(total)
    if total is None:
        raise UserError("there are no prompts to run.")
    return total / len(sequences)


def full(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    offsets: Sequence[int] = (-1,),
    *,
    label: str = "capture",
) -> mx.array:
    """Every prompt's states, in the order given: (N, L, P, d) float32, N·L·P·d·4 bytes."""
    parts: list[mx.array] = []
    order: list[int] = []
    for indices, states in iterate(chat, sequences, offsets, label=label):
        parts.append(states)
        order.extend(indices)
    if not parts:
        raise UserError("there are no prompts to run.")
    back = sorted(range(len(order)), key=order.__getitem__)
    return mx.concatenate(parts, axis=0)[mx.array(back)]


@contextmanager
def stored(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    offsets: Sequence[int] = (-1,),
    *,
    label: str = "capture",
) -> Iterator[np.ndarray]:
    """Every prompt's states in a temporary file: (L, P, N, d) float32, memory-mapped.

    For what cannot be summed as it streams by. In memory there is one batch, and of the file what
    is being read: (N, d) of one layer and position at a time. The file is gone after the block.

    Raises:
        UserError: where the disk has no room for it; no prompts.
    """
    if not sequences:
        raise UserError("there are no prompts to run.")
    shape = len(chat.layers), len(offsets), len(sequences), chat.width
    needed, folder = 4 * int(np.prod(shape, dtype=np.int64)), tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {in_bytes(free)} free, and the states of all prompts take "
            f"{in_bytes(needed)}: free some space, set TMPDIR to a larger disk, take fewer "
            "prompts (--limit), or choose --method difference-of-means, which keeps none."
        )
    with tempfile.TemporaryDirectory(prefix="abl-mlx-") as temporary:
        kept = np.memmap(Path(temporary) / "states.f32", np.float32, "w+", shape=shape)
        for indices, states in iterate(chat, sequences, offsets, label=label):
            kept[:, :, indices] = numpy_of(states).transpose(1, 2, 0, 3)
        yield kept
        del kept
