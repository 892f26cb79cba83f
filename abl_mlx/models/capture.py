"""Recording the residual stream's states at chosen token positions, batch by batch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.models import heads, input_squares
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import around
from abl_mlx.models.residuals import residual
from abl_mlx.models.shortcuts import trusted
from abl_mlx.support import ranks
from abl_mlx.support.arrays import numpy_of
from abl_mlx.support.console import progress
from abl_mlx.support.units import in_bytes
from convert.base import scratch
from convert.base.errors import UserError


def check_stream(chat: ChatModel) -> None:
    """Check, before any long work, that the model's layers return one residual stream.

    Only shapes are inspected; nothing is computed.

    Raises:
        UserError: as `residual` does.
    """
    with Recorder(chat), heads.unseen(chat.model):
        chat.model(mx.array([[1, 1]], mx.int32))


class Recorder:
    """Collects the residual stream after every layer while the model runs.

    Use as a context manager: `keep` says at which positions, and after a call of the model `take`
    returns the states there. Before `keep` only the shapes of the layers' outputs are checked.
    """

    def __init__(self, chat: ChatModel):
        self._chat = chat
        self._states: list[mx.array | None] = [None] * len(chat.layers)
        self._places: tuple[mx.array, mx.array] | None = None
        self._around: Any = None

    def __enter__(self) -> Recorder:
        self._around = around(
            [(layer, self._kept(index)) for index, layer in enumerate(self._chat.layers)]
        )
        self._around.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._around.__exit__(*error)

    def _kept(self, index: int) -> Any:
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            states = residual(output, index, self._chat.width)
            if self._places is not None:
                self._states[index] = states[self._places].astype(mx.float32)
                # Computed now, so that the layer's whole output need not stay in memory.
                mx.async_eval(self._states[index])
            return output

        return wrapper

    def keep(self, lengths: mx.array, offsets: Sequence[int]) -> None:
        """Keep the states at the positions ``length + offset`` in the calls that follow.

        Args:
            lengths: the number of real tokens of each sequence, (B,).
            offsets: P negative numbers.
        """
        rows = mx.arange(lengths.size)[:, None]
        self._places = rows, lengths[:, None] + mx.array(list(offsets))[None, :]

    def take(self) -> mx.array:
        """The states kept in the last call: (B, L, P, d) float32, not evaluated."""
        taken = []
        for index, states in enumerate(self._states):
            if states is None:
                raise UserError(f"layer {index} was not called when the model ran.")
            taken.append(states)
            self._states[index] = None
        return mx.stack(taken, axis=1)


def check_offsets(sequences: Sequence[Sequence[int]], offsets: Sequence[int]) -> None:
    """Check that offsets are negative and lie within the shortest sequence.

    Raises:
        UserError: when one does not.
    """
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
        UserError: when an offset lies outside the shortest prompt, or a layer does not return a
            residual stream.
    """
    running = _own(chat, sequences, offsets, label)
    if ranks.size() == 1:
        yield from running
        return
    form = 0, len(chat.layers), len(offsets), chat.width
    while True:
        indices, states = next(running, ([], mx.zeros(form)))
        every = ranks.gathered(f"{label}: prompts", indices)
        if not any(every):
            return
        found = ranks.arrays(f"{label}: states", numpy_of(states))
        yield [index for one in every for index in one], mx.array(np.concatenate(found))


def _own(
    chat: ChatModel, sequences: Sequence[Sequence[int]], offsets: Sequence[int], label: str
) -> Iterator[tuple[list[int], mx.array]]:
    """The result of `iterate` for the prompts that this rank runs (`ranks.shares`)."""
    check_offsets(sequences, offsets)
    how, unseen = trusted(chat, sequences), heads.unseen(chat.model)
    mine = ranks.shares([len(one) for one in sequences])[ranks.rank()]
    squares = input_squares.of(chat)
    inputs: AbstractContextManager[None] = nullcontext()
    if squares is not None and squares.are_new(sequences):
        how = squares.shortcuts(how)
        inputs = squares.recording(lambda: sum(len(sequences[index]) for index in mine))
    with Recorder(chat) as recorder, unseen, inputs, progress(len(mine), label) as bar:
        prefix = how.shared(chat, sequences, -min(offsets))
        rest = prefix.rest(sequences)
        for batch in how.batches([rest[index] for index in mine]):
            recorder.keep(batch.lengths, offsets)
            prefix(batch.tokens)
            states = recorder.take()
            mx.eval(states)
            bar.update(len(batch.indices))
            yield [mine[index] for index in batch.indices], states


def mean(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    offsets: Sequence[int] = (-1,),
    *,
    label: str = "capture",
) -> mx.array:
    """Mean state over the prompts: (L, P, d) float32. Memory holds one batch and one sum."""
    if not sequences:
        raise UserError("there are no prompts to run.")
    total = mx.zeros((len(chat.layers), len(offsets), chat.width))
    for _, states in _own(chat, sequences, offsets, label):
        total = total + states.sum(axis=0)
        mx.eval(total)
    # Added up in the order of the ranks, so that every rank has the same sum, bit for bit.
    sums = ranks.arrays(f"{label}: sums", numpy_of(total))
    return mx.array(sum(sums[1:], sums[0])) / len(sequences)


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


def after_layer(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    layer: int,
    offsets: Sequence[int] = (-1,),
    *,
    label: str = "capture",
) -> np.ndarray:
    """Every prompt's states after one layer, in the order given: (N, P, d) float32."""
    found = np.empty((len(sequences), len(offsets), chat.width), np.float32)
    for indices, states in iterate(chat, sequences, offsets, label=label):
        found[indices] = numpy_of(states[:, layer])
    return found


@contextmanager
def stored(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    offsets: Sequence[int] = (-1,),
    *,
    label: str = "capture",
) -> Iterator[np.ndarray]:
    """Context manager with every prompt's states in a temporary file: (L, P, N, d) float32.

    For estimators that need all states at once. The array is memory-mapped: memory holds one batch
    while the file is written, and (N, d) for one layer and position while it is read. The file is
    deleted after the block.

    Raises:
        UserError: when the disk has too little space, or there are no prompts.
    """
    if not sequences:
        raise UserError("there are no prompts to run.")
    shape = len(chat.layers), len(offsets), len(sequences), chat.width
    needed, folder = 4 * int(np.prod(shape, dtype=np.int64)), tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {in_bytes(free)} free, but the states of all prompts take "
            f"{in_bytes(needed)}: free some space, set TMPDIR to a larger disk, take fewer "
            "prompts (--limit), or choose --method difference-of-means, which keeps none."
        )
    with scratch.scratch() as temporary:
        kept = scratch.array(temporary / "states.f32", shape)
        for indices, states in iterate(chat, sequences, offsets, label=label):
            kept[:, :, indices] = numpy_of(states).transpose(1, 2, 0, 3)
        yield kept
        del kept
