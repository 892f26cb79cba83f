"""Finds every weight that reads the residual stream, by probing (`probe.Probe`).

A reader is a matrix whose input is the stream behind a norm, or the stream itself: the projections
to queries, keys and values, gate and up of an MLP and of experts, a router; and behind the layers
the output head. In a pass in which random numbers replace all products, only additions, constants
and norms lie between a layer's stream and the inputs of its matrices. So a shift v of the stream,
with norms held at the scale that they had, moves a reader's input by g ⊙ v (RMSNorm) or
g ⊙ (v − mean v) (LayerNorm), and all other inputs by nothing. The layer's own output must move by v
times a number: then nothing but the readers found here reads the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import mlx.core as mx

from abl_mlx.models import routers, split_model
from abl_mlx.models.chat_model import ChatModel, load_lazily
from abl_mlx.models.module_weights import module_shape
from abl_mlx.models.probe import Leaf, Probe
from abl_mlx.models.writers import Writer, first_run, pattern_of, root_mean_square, unless_plain
from abl_mlx.support import ranks
from abl_mlx.support.arrays import number
from convert.base.errors import UserError

# A response to a shift is a gain if every entry agrees within this share of the largest one.
_TOLERANCE = 1e-3

_NOT_HANDED = "does not get its stream as its first array (batch, tokens, width)"

# Smaller responses, relative to the shift, are rounding.
_NOTHING = 1e-5


def with_readers(chat: ChatModel, writers: Sequence[Writer], edit: str) -> list[Writer]:
    """The places that an edit may change: the writers, and with ``--edit readers`` the readers.

    With ``--edit routers`` these are the writers, on which directions are tried; that there are
    routers is checked here.

    Args:
        chat: the model.
        writers: its residual writers, perhaps with the readers already.
        edit: one of `choices.PLACES`.
    """
    if edit == "routers":
        routers.find_routers(chat, writers)
    if edit != "readers" or any(one.reads for one in writers):
        return list(writers)
    return [*writers, *find_readers(chat)]


def with_edited(chat: ChatModel, writers: Sequence[Writer], edit: str) -> list[Writer]:
    """The places that an edit may change, for planning it: as `with_readers`, and the routers."""
    if edit == "routers" and not any(one.router for one in writers):
        return [*writers, *routers.find_routers(chat, writers)]
    return with_readers(chat, writers, edit)


def find_readers(chat: ChatModel) -> list[Writer]:
    """All readers of the model's residual stream: the output head, then layer by layer.

    Raises:
        UserError: when something reads the stream of which an edit of weights cannot take one
            direction away, with the layer and the reason.
    """
    if ranks.lockstep():  # as in `writers.find_writers`
        return split_model.found_in(_all(load_lazily(chat.folder)), chat.model)
    return _all(chat)


def _all(chat: ChatModel) -> list[Writer]:
    with Probe(chat.model, chat.layers, chat.width) as probe:
        first_run(chat, probe)
        found = []
        for index in range(len(chat.layers)):
            found += _of_layer(chat, probe, index)
        if not found:
            raise _refused(chat, 0, _NOT_HANDED)
        return [*_behind(chat, probe), *found]


def _behind(chat: ChatModel, probe: Probe) -> list[Writer]:
    """The readers behind the layers: the output head."""
    shifts = _shifts(chat.width, len(chat.layers))
    inputs = probe.reads_behind()
    moved = []
    for shift in shifts:
        others = probe.reads_behind(shift)
        moved.append({which: others[which] - inputs[which] for which in inputs})
    return [
        _reader(probe.leaves[which], *how, chat.width)
        for which, how in _found(probe, inputs, shifts, moved).items()
    ]


def _of_layer(chat: ChatModel, probe: Probe, index: int) -> list[Writer]:
    width = chat.width
    shifts = _shifts(width, index)
    output, inputs = probe.reads(index)
    size = root_mean_square(output)
    moved = []
    for shift in shifts:
        after, others = probe.reads(index, shift * size)
        _check_output(chat, index, shift, (after - output) / size)
        if {which: one.shape for which, one in others.items()} != {
            which: one.shape for which, one in inputs.items()
        }:
            raise _refused(chat, index, "chooses by its stream which weights read it")
        moved.append({which: (others[which] - inputs[which]) / size for which in inputs})
    found = _found(probe, inputs, shifts, moved)
    found |= _not_called(probe, index, found)
    return [_reader(probe.leaves[which], *how, width) for which, how in sorted(found.items())]


def _shifts(width: int, seed: int) -> list[mx.array]:
    """±1, ones, and noise, (d,) each."""
    noise = mx.random.normal((width,), key=mx.random.key(20_000_003 + seed))
    return [mx.where(noise > 0, 1.0, -1.0), mx.ones((width,)), noise]


def _found(
    probe: Probe,
    inputs: Iterable[int],
    shifts: Sequence[mx.array],
    moved: Sequence[Mapping[int, mx.array]],
) -> dict[int, tuple[bool, mx.array]]:
    """Index of each leaf whose input moved -> whether it is centered, and its gain."""
    found = {}
    for which in inputs:
        by = [one[which] for one in moved]
        if max(number(mx.abs(one).max()) for one in by) >= _NOTHING:
            found[which] = _gain(probe.leaves[which], probe.width, shifts, by)
    return found


def _check_output(chat: ChatModel, index: int, shift: mx.array, moved: mx.array) -> None:
    """Check that a layer passes a shift of its stream on, times one number, and nothing else."""
    factor = number((moved @ shift).mean() / (shift @ shift))
    if abs(factor) < _TOLERANCE:
        raise _refused(chat, index, _NOT_HANDED)
    if number(mx.abs(moved - factor * shift).max()) > _TOLERANCE * max(abs(factor), 1.0):
        raise _refused(chat, index, "uses its stream by more than additions and linear weights")


def _refused(chat: ChatModel, index: int, reason: str) -> UserError:
    return UserError(
        f"--edit readers: layer {index} of {chat.model_type} {reason}, so an edit of its readers "
        "would not be exact: edit the writers."
    )


def _gain(
    leaf: Leaf, width: int, shifts: Sequence[mx.array], by: Sequence[mx.array]
) -> tuple[bool, mx.array]:
    """Whether the mean is taken off in front of a reader, and the gain (d,) up to a factor.

    Args:
        leaf: the reader.
        width: d.
        shifts: ±1, ones, and noise, (d,) each.
        by: how each of them moved the reader's input, (N, n) each.

    Raises:
        UserError: when it reads the stream through more than a norm.
    """
    if by[0].shape[-1] == width:
        most = int(number(mx.abs(by[0]).max(axis=-1).argmax()))
        for centered in (False, True):
            seen = [shift - shift.mean() if centered else shift for shift in shifts]
            gain = by[0][most] / seen[0]
            moves = gain * seen[0]
            # Tokens differ by a factor, the scale of their norm.
            factor = (by[0] @ moves)[:, None] / (moves @ moves)
            errors = [
                number(mx.abs(one - factor * gain * shift).max())
                for one, shift in zip(by, seen, strict=True)
            ]
            if max(errors) <= _TOLERANCE * number(mx.abs(by[0]).max()):
                return centered, gain / mx.abs(gain).max()
    raise UserError(
        f"--edit readers: {leaf.path} reads the residual stream through more than a norm, so "
        "taking one direction out of its weight would not be exact: edit the writers."
    )


def _not_called(
    probe: Probe, index: int, found: dict[int, tuple[bool, mx.array]]
) -> dict[int, tuple[bool, mx.array]]:
    """Readers of a layer that were not called: separate experts without a token."""
    known = {pattern_of(probe.leaves[which].path): how for which, how in found.items()}
    return {
        which: known[pattern_of(leaf.path)]
        for which, leaf in enumerate(probe.leaves)
        if leaf.layer == index and leaf.stub and not leaf.called and pattern_of(leaf.path) in known
    }


def _reader(leaf: Leaf, centered: bool, gain: mx.array, width: int) -> Writer:
    module = leaf.module
    matrix = "weight" in module and "conv" not in type(module).__name__.lower()
    shape = module_shape(module) if matrix else ()
    if len(shape) not in (2, 3) or shape[-1] != width:
        raise UserError(
            f"--edit readers: {leaf.path} ({type(module).__name__}) reads the residual stream, but "
            f"not by rows of {width} weights: edit the writers."
        )
    tied = hasattr(module, "as_linear")
    kind = "embedding" if tied else "reader" if len(shape) == 2 else "expert-readers"
    layer = -1 if leaf.layer is None else leaf.layer
    return Writer(leaf.path, kind, layer, unless_plain(gain), False, module, tied, True, centered)
