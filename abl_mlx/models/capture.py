"""Recording the residual stream's states at chosen token positions, batch by batch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.models import heads, input_squares, sweeps
from abl_mlx.models.batches import Batch
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import around
from abl_mlx.models.plain import runs_again
from abl_mlx.models.prefix import Prefix
from abl_mlx.models.residuals import residual
from abl_mlx.models.shortcuts import Shortcuts, begun, trusted
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


#: ``take(indices, layer, states)`` is given the states of the prompts ``indices`` of a batch after
#: a layer, (B, P, d) float32.
Take = Callable[[list[int], int, mx.array], None]


class Recorder:
    """Collects the residual stream after every layer while the model runs.

    Use as a context manager: `keep` says at which positions, and after a call of the model `take`
    returns the states there. Before `keep` only the shapes of the layers' outputs are checked.
    """

    def __init__(self, chat: ChatModel, given: Callable[[int, mx.array], None] | None = None):
        """
        Args:
            chat: the model.
            given: called after every layer with its number and the states, (B, P, d) float32,
                which are then not kept.
        """
        self._chat, self._given = chat, given
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
                kept = states[self._places].astype(mx.float32)
                # Computed now, so that the layer's whole output need not stay in memory.
                mx.async_eval(kept)
                if self._given is None:
                    self._states[index] = kept
                else:
                    self._given(index, kept)
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
    final norm) at ``offsets[p]`` tokens from the prompt's end. With a streamed model all are
    yielded at the end of a sweep; `visit` gives them layer by layer.

    Raises:
        UserError: when an offset lies outside the shortest prompt, or a layer does not return a
            residual stream.
    """
    running = _own(chat, sequences, offsets, None, label)
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


def visit(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    offsets: Sequence[int],
    take: Take,
    *,
    label: str = "capture",
) -> None:
    """Run prompts, and give their states to ``take``, layer by layer in each batch.

    Raises:
        UserError: as `iterate` does, and when there are no prompts.
    """
    if not sequences:
        raise UserError("there are no prompts to run.")
    if ranks.size() > 1:
        for indices, states in iterate(chat, sequences, offsets, label=label):
            _give(take, indices, states)
        return
    for _ in _own(chat, sequences, offsets, take, label):
        pass


def _give(take: Take, indices: list[int], states: mx.array) -> None:
    """Give the states of a batch, (B, L, P, d), to ``take``, layer by layer."""
    for layer in range(states.shape[1]):
        take(indices, layer, states[:, layer])


def _own(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    offsets: Sequence[int],
    take: Take | None,
    label: str,
) -> Iterator[tuple[list[int], mx.array]]:
    check_offsets(sequences, offsets)
    mine = ranks.shares([len(one) for one in sequences])[ranks.rank()]
    squares = input_squares.of(chat)
    inputs: AbstractContextManager[None] = nullcontext()

    def begin(how: Shortcuts) -> Prefix:
        with heads.unseen(chat.model), Recorder(chat):  # checks the form of the stream
            return how.shared(chat, sequences, -min(offsets))

    if squares is not None and squares.are_new(sequences):
        how = squares.shortcuts(trusted(chat, sequences))
        prefix = begin(how)
        inputs = squares.recording(lambda: sum(len(sequences[index]) for index in mine))
    else:
        how, prefix = begun(chat, sequences, begin)
    with heads.unseen(chat.model), inputs, progress(len(mine), label) as bar:
        # A layer that runs again in the same pass gives its states at the end.
        early = take is not None and sweeps.of(chat.model) is not None and not runs_again(chat)

        def run(batch: Batch) -> tuple[list[int], mx.array]:
            indices = [mine[index] for index in batch.indices]
            given = partial(take, indices) if take is not None and early else None
            with Recorder(chat, given) as recorder:
                recorder.keep(batch.lengths, offsets)
                prefix(batch.tokens)
                states = mx.zeros(0) if given else recorder.take()
                mx.eval(states)
            if take is not None and not early:
                _give(take, indices, states)
                states = mx.zeros(0)
            bar.update(len(indices))
            return indices, states

        rest = prefix.rest(sequences)
        yield from sweeps.each(chat.model, run, how.batches([rest[index] for index in mine]))


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
    total = np.zeros((len(chat.layers), len(offsets), chat.width), np.float32)

    def take(indices: list[int], layer: int, states: mx.array) -> None:
        total[layer] += numpy_of(states.sum(axis=0))

    for _ in _own(chat, sequences, offsets, take, label):
        pass
    # Added up in the order of the ranks, so that every rank has the same sum, bit for bit.
    sums = ranks.arrays(f"{label}: sums", total)
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
    """Every prompt's states after one layer, in the order given: (N, P, d) float32.

    A negative ``layer`` counts from the last one, which is -1.
    """
    found = np.empty((len(sequences), len(offsets), chat.width), np.float32)
    layer = range(len(chat.layers))[layer]

    def take(indices: list[int], index: int, states: mx.array) -> None:
        if index == layer:
            found[indices] = numpy_of(states)

    visit(chat, sequences, offsets, take, label=label)
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
    with stored_each(chat, {label: sequences}, offsets) as (kept,):
        yield kept


@contextmanager
def stored_each(
    chat: ChatModel, sets: Mapping[str, Sequence[Sequence[int]]], offsets: Sequence[int]
) -> Iterator[Sequence[np.ndarray]]:
    """Context manager with the states of several sets of prompts, each as of `stored`.

    Args:
        chat: the model.
        sets: label -> encoded prompts.
        offsets: as of `iterate`.

    Raises:
        UserError: as `stored` does.
    """
    if not all(sets.values()):
        raise UserError("there are no prompts to run.")
    shapes = [(len(chat.layers), len(offsets), len(one), chat.width) for one in sets.values()]
    needed = 4 * sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {in_bytes(free)} free, but the states of all prompts take "
            f"{in_bytes(needed)}: free some space, set TMPDIR to a larger disk, take fewer "
            "prompts (--limit), or choose --method difference-of-means, which keeps none."
        )
    with scratch.scratch() as temporary:
        every = [
            scratch.array(temporary / f"states{index}.f32", shape)
            for index, shape in enumerate(shapes)
        ]

        def run(one: tuple[np.ndarray, str]) -> None:
            kept, label = one
            visit(chat, sets[label], offsets, partial(_keep, kept), label=label)

        for _ in sweeps.each(chat.model, run, list(zip(every, sets, strict=True))):
            pass
        yield every
        every.clear()


def _keep(kept: np.ndarray, indices: list[int], layer: int, states: mx.array) -> None:
    """Write the states of a batch after a layer, (B, P, d), to their place in (L, P, N, d)."""
    kept[layer][:, indices] = numpy_of(states).swapaxes(0, 1)
