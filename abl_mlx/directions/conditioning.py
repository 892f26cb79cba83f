"""Finding a condition: a vector, layer, side and threshold that set some prompts apart.

As in CAST (Lee et al. 2024, arXiv 2409.05907) vectors are taken from train prompts, and a grid of
layers, thresholds and sides is searched for the largest F1 on validation prompts. The paper's
vector is the first principal component of both sets about the middle of their means. It is the
direction along which prompts differ most, whatever they differ in, so the difference of the means
and the weight of a linear probe are in the grid as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from abl_mlx.directions import estimators
from abl_mlx.edits.condition import Condition, cosines
from abl_mlx.models import capture
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.records.conditions import ConditionFound
from abl_mlx.support.arrays import numpy_of
from convert.base import scratch
from convert.base.errors import UserError

Array = np.ndarray

#: How many of a prompt's last tokens are averaged; those that the shortest prompt has are tried.
TOKENS = (1, 4, 8, 16)


@dataclass(frozen=True)
class Sides:
    """Arrays of the prompts on which a condition should be met, and of all others."""

    inside: Array
    outside: Array


@dataclass(frozen=True)
class Cut:
    """A threshold, and how well it tells scores apart.

    Attributes:
        threshold: half way between two neighbouring scores.
        above: whether scores at and above it count as inside, or those below it.
        f1, precision, recall: of that decision.
        gap: the distance of the two scores, in standard deviations of all scores.
    """

    threshold: float
    above: bool
    f1: float
    precision: float
    recall: float
    gap: float

    @property
    def rank(self) -> tuple[float, float]:
        """The better of two cuts has the larger rank."""
        return self.f1, self.gap


# --- vectors -----------------------------------------------------------------------------------


def difference(inside: Array, outside: Array) -> Array:
    """The difference of the means, (N, d), (M, d) -> (d,)."""
    apart: Array = inside.mean(axis=0) - outside.mean(axis=0)
    return apart


def principal(inside: Array, outside: Array) -> Array:
    """The first principal component about the middle of the two means, as in the paper."""
    middle = (inside.mean(axis=0) + outside.mean(axis=0)) / 2
    found = estimators.spectrum(np.concatenate([inside, outside]) - middle).vectors
    return found[0] if len(found) else np.zeros(inside.shape[1])


def probe(inside: Array, outside: Array) -> Array:
    """The weight of a logistic regression."""
    return estimators.probe(inside, outside).weight


#: Name -> formula of each kind of vector, in the order in which equally good ones are preferred.
KINDS: dict[str, Callable[[Array, Array], Array]] = {
    "difference": difference,
    "principal": principal,
    "probe": probe,
}


# --- thresholds --------------------------------------------------------------------------------


def best_cut(scores: Sides) -> Cut:
    """The threshold and side with the largest F1 = 2 TP / (2 TP + FP + FN), then the widest gap.

    Args:
        scores: (N,) and (M,).
    """
    every = np.concatenate([scores.inside, scores.outside])
    inside = np.repeat([1, 0], [len(scores.inside), len(scores.outside)])
    order = np.argsort(every, kind="stable")
    every, inside = every[order], inside[order]
    gaps = np.diff(every)
    spread = max(float(every.std()), 1e-30)
    below = np.cumsum(inside)[:-1]  # how many of those inside lie below each threshold
    count = np.arange(1, len(every))
    best: Cut | None = None
    for at in np.flatnonzero(gaps > 0):
        threshold = float(every[at] + every[at + 1]) / 2
        total = int(inside.sum())
        for above in (True, False):
            hits = total - int(below[at]) if above else int(below[at])
            taken = len(every) - int(count[at]) if above else int(count[at])
            cut = Cut(
                threshold, above, 2 * hits / (taken + total), hits / taken, hits / total,
                float(gaps[at]) / spread,
            )  # fmt: skip
            if best is None or cut.rank > best.rank:
                best = cut
    if best is None:
        raise UserError("the states of all prompts are the same, so no condition tells them apart.")
    return best


# --- the search --------------------------------------------------------------------------------


@contextmanager
def stored(
    chat: ChatModel, sequences: Sequence[Sequence[int]], counts: Sequence[int]
) -> Iterator[Array]:
    """Context manager with mean states of the last tokens of each prompt, in a temporary file.

    Args:
        chat: the model, without any intervention.
        sequences: encoded prompts.
        counts: the numbers of last tokens that are averaged.

    Yields:
        (N, L, len(counts), d) float32, memory-mapped.
    """
    shape = len(sequences), len(chat.layers), len(counts), chat.width
    offsets = range(-max(counts), 0)
    with scratch.scratch() as folder:
        found = scratch.array(folder / "condition.f32", shape)
        for indices, states in capture.iterate(chat, sequences, offsets, label="condition"):
            for at, count in enumerate(counts):
                found[indices, :, at] = numpy_of(states[:, :, -count:].mean(axis=2))
        yield found
        del found


def counts_of(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The numbers of last tokens to try: `TOKENS` as far as every prompt has them."""
    shortest = min(map(len, sequences))
    return [count for count in TOKENS if count <= shortest]


def find(
    train: Sides, validation: Sides, counts: Sequence[int], prompts: str
) -> tuple[Condition, ConditionFound]:
    """The condition with the largest F1 on validation prompts, and what is known of it.

    Args:
        train, validation: states (N, L, T, d) and (M, L, T, d), as `stored` yields them.
        counts: the T numbers of tokens that were averaged.
        prompts: where the prompts came from, for the record.
    """
    best: tuple[tuple[float, float], Condition, ConditionFound] | None = None
    sizes = [len(validation.inside), len(validation.outside)]
    for layer, at, kind, vector in _vectors(train):
        cut = best_cut(Sides(*(cosines(one[:, layer, at], vector)
                               for one in (validation.inside, validation.outside))))  # fmt: skip
        if best is not None and cut.rank <= best[0]:
            continue
        unit = mx.array(estimators.unit(vector).astype(np.float32))
        condition = Condition(unit, layer, counts[at], cut.threshold, cut.above)
        found = ConditionFound(
            prompts=prompts, kind=kind, layer=layer, tokens=counts[at], threshold=cut.threshold,
            above=cut.above, f1=cut.f1, precision=cut.precision, recall=cut.recall,
            validation=sizes,
        )  # fmt: skip
        best = cut.rank, condition, found
    assert best is not None
    return best[1], best[2]


def _vectors(train: Sides) -> Iterator[tuple[int, int, str, Array]]:
    _, layers, counts, _ = train.inside.shape
    for kind, formula in KINDS.items():
        for layer in range(layers):
            for at in range(counts):
                inside, outside = (
                    np.asarray(one[:, layer, at], np.float64)
                    for one in (train.inside, train.outside)
                )
                vector = formula(inside, outside)
                if np.linalg.norm(vector) > 0:
                    yield layer, at, kind, vector
