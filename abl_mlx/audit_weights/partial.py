"""The verdict on a model of which as little as possible is read.

An edit that matters is in most layers, and their attention outputs are small: 32 MB of 16 GB each
in a model of 8 billion weights. So some of them are read, from layers spread over the depth, and
some rows of the embedding; more are read until the verdict holds. docs/audit.md has its figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from abl_mlx.audit_weights import differences, spectrum, verdict
from abl_mlx.audit_weights.gram import threads
from abl_mlx.audit_weights.pairs import Pair, matched
from abl_mlx.audit_weights.verdict import CANNOT_TELL, EDITED, LIMITS, NOT_EDITED
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.outputs.remote_file import RemoteFile
from abl_mlx.outputs.stream_weights import StreamWeight, StreamWeights
from abl_mlx.records.looks import Weights

#: After how many writers there is a verdict for the first times; then after twice as many each.
_LOOKS = (6, 10)

#: Lines of an embedding that are read, in multiples of d.
_LINES = 2

#: At the first look "edited" holds if the gap is so many times the limit.
_CLEAR = 2.0

#: Rows of each tensor that tell whether it differs from the base's.
_ROWS = 16

Judged = tuple[Weights, np.ndarray | None]


def alone(model: StreamWeights) -> Judged:
    """As `verdict.alone`, from as few writers as the verdict needs."""
    order = in_turn(model.writers, model.layers)
    for count in _looks(len(order)):
        some = _some(model, {one.name for one in order[:count]})
        weights, found = verdict.alone(some)
        if _holds(weights, count):
            break
    return _with_evidence(weights, some, model), found


def with_base(model: ModelFile, base: ModelFile) -> Judged:
    """As `differences.compare`, from as few writers as the verdict needs.

    Raises:
        UserError, Unreachable: as `differences.compare`.
    """
    after, before = model.stream_weights(), base.stream_weights()
    pairs, left_out = matched(before, after, base.source.name, model.source.name)
    differing = {new.name: (old, new) for old, new in changed(model, base, pairs)}
    if not differing:
        same = f"the first {_ROWS} rows of every residual writer are the same as in the base"
        return Weights(verdict=NOT_EDITED, evidence=[same], layers=[], rank=0, writers={}), None
    others = replace(after, writers=[new for _, new in differing.values()])
    order = in_turn(others.writers, after.layers)
    for count in _looks(len(order)):
        some = _some(others, {one.name for one in order[:count]})
        chosen = [(differing[new.name][0], new) for new in some.writers]
        with threads(after.width):
            weights, found = differences.judge(chosen, left_out, after)
        if weights.verdict == EDITED or _holds(weights, count):
            break
    weights = _with_evidence(weights, some, after)
    if len(differing) < len(pairs):
        said = f"{len(pairs) - len(differing)} of {len(pairs)} residual writers are the base's own"
        weights = replace(weights, evidence=[*weights.evidence, said])
    return weights, found


def changed(model: ModelFile, base: ModelFile, pairs: Sequence[Pair]) -> list[Pair]:
    """The writers whose first rows differ from the base's, as stored; nothing else is read."""
    return [(old, new) for old, new in pairs if _differ(model, base, old, new)]


def to_learn(
    model: ModelFile, base: ModelFile, pairs: list[Pair]
) -> tuple[list[Pair], Sequence[Pair]]:
    """The writers, and those of them that must be read to learn an edit.

    All, if both models are on this machine. Otherwise embeddings have some lines only, and writers
    whose first rows are the base's own are not read.
    """
    if not any(isinstance(one, RemoteFile) for one in (model, base)):
        return pairs, pairs
    short: list[Pair] = [
        tuple(_sampled(one, _LINES * one.width) if one.axis == -1 else one for one in pair)  # type: ignore[misc]
        for pair in pairs
    ]
    return short, changed(model, base, short)


def _looks(count: int) -> Iterator[int]:
    """The numbers of writers after which there is a verdict, up to all of them."""
    look, following = _LOOKS
    while look < count:
        yield look
        look, following = following, 2 * following
    yield count


def _some(model: StreamWeights, names: set[str]) -> StreamWeights:
    """The model with these writers, and with some lines of its embeddings."""
    writers = [
        _sampled(one, _LINES * model.width) if one.axis == -1 else one
        for one in model.writers
        if one.name in names or one.layer < 0
    ]
    return replace(model, writers=writers)


def _sampled(one: StreamWeight, lines: int) -> StreamWeight:
    """The first lines of an embedding, which are those of the commonest tokens."""
    return replace(one, shape=(min(lines, one.shape[0]), *one.shape[1:]))


def _holds(weights: Weights, count: int) -> bool:
    """Whether no more writers need to be read."""
    if count >= _LOOKS[1]:
        return weights.verdict != CANNOT_TELL
    tests = weights.tests or {}
    clear = (tests[one.name].gap >= _CLEAR * one.size for one in LIMITS if one.name in tests)
    return weights.verdict == EDITED and any(clear)


def _differ(model: ModelFile, base: ModelFile, old: StreamWeight, new: StreamWeight) -> bool:
    """Whether a writer's first rows differ from the base's, as stored."""
    if old.type != new.type or len(old.tensors) != len(new.tensors):
        return True
    for ours, theirs in zip(new.tensors, old.tensors, strict=True):
        if _first_rows(model, ours) != _first_rows(base, theirs):
            return True
    return False


def _first_rows(model: ModelFile, tensor: str) -> bytes:
    if isinstance(model, RemoteFile):
        model.fetch_rows([tensor], 0, _ROWS)
    rows = model.raw(tensor).reshape(-1)
    *outer, _ = model.kinds()[tensor][1]
    return bytes(rows[: _ROWS * (len(rows) // max(1, int(np.prod(outer))))])


def _with_evidence(weights: Weights, some: StreamWeights, model: StreamWeights) -> Weights:
    """The findings, with a sentence about what they depend on."""
    count, every = len(some.writers), len(model.writers)
    layers = spectrum.spans(sorted({one.layer for one in some.writers} - {-1}))
    said = f"read: {count} of {every} residual writers, in layers {layers} of {model.layers}"
    if not any(one.component == "mlp" for one in some.writers):
        said += ", none of them an MLP's: an edit of MLPs alone does not show"
    return replace(weights, evidence=[*weights.evidence, said])


def in_turn(writers: Sequence[StreamWeight], layers: int) -> list[StreamWeight]:
    """The writers inside the layers in the order in which they are read.

    Attention outputs come first, one a layer, from layers spread over the depth, then all others,
    the smallest first.
    """
    order = {layer: place for place, layer in enumerate(spread(layers))}
    inside = [one for one in writers if one.layer >= 0]
    first = {one.layer: one for one in inside if one.component == "attention"}
    chosen = sorted(first.values(), key=lambda one: order[one.layer])
    rest = [one for one in inside if one not in chosen]
    return chosen + sorted(rest, key=lambda one: (one.lines, order[one.layer]))


def spread(count: int) -> list[int]:
    """0 to count - 1, the middle first, so that every beginning of the list is spread evenly.

    This is van der Corput's sequence in base 2.
    """
    found: dict[int, None] = {}
    number = 0
    while len(found) < count:
        number += 1
        place, share, left = 0.0, 0.5, number
        while left:
            place, share, left = place + share * (left & 1), share / 2, left >> 1
        found[int(place * count)] = None
    return list(found)
