"""Candidate directions: the difference of two prompt sets' mean states, and other estimators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from abl_mlx.choices import METHODS
from abl_mlx.directions import estimators
from abl_mlx.models import capture
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.support.arrays import numbers, numpy_of
from convert.base.errors import UserError

#: Token positions that are measured at most, counted back from the prompt's end.
MOST_POSITIONS = 8

METHOD = METHODS[0]


@dataclass(frozen=True)
class Candidates:
    """Mean residual states and candidate directions at every layer and position.

    Attributes:
        harmful_mean: (L, P, d) float32, mean state over harmful prompts after layer l at
            position p; of the method over-refusal, over borderline prompts.
        harmless_mean: (L, P, d) float32, the same over harmless prompts.
        positions: the P token offsets from the prompt's end, -1 being the last token.
        method: of `choices.METHODS`.
        found: (L, P, k, d) float32, what the method found: orthonormal rows. None for the
            difference of means, which follows from the means (Arditi et al. 2024).
        facts: name -> (L, P) of what else is known of each candidate: ``effective_rank``, ...
    """

    harmful_mean: mx.array
    harmless_mean: mx.array
    positions: tuple[int, ...]
    method: str = METHOD
    found: mx.array | None = None
    facts: Mapping[str, mx.array] = field(default_factory=dict)

    @property
    def bases(self) -> mx.array:
        """(L, P, k, d) float32, orthonormal rows."""
        if self.found is not None:
            return self.found
        return _unit(self.harmful_mean - self.harmless_mean)[:, :, None]

    @property
    def directions(self) -> mx.array:
        """The candidates: unit vectors (L, P, d), or for subspaces orthonormal (L, P, k, d)."""
        return self.bases if self.rank > 1 else self.bases[:, :, 0]

    @property
    def leads(self) -> mx.array:
        """Unit vectors (L, P, d): the direction of each candidate along which the means differ."""
        if self.rank == 1:
            return self.bases[:, :, 0]
        difference = (self.harmful_mean - self.harmless_mean)[:, :, None]
        along = (self.bases * difference).sum(axis=-1, keepdims=True)
        return _unit((along * self.bases).sum(axis=2))

    @property
    def n_layers(self) -> int:
        """L."""
        return int(self.harmful_mean.shape[0])

    @property
    def rank(self) -> int:
        """k, how many directions a candidate has."""
        return 1 if self.found is None else int(self.found.shape[2])

    def at(self, layer: float, position: int) -> mx.array:
        """One candidate as (k, d) float32; between two layers, what lies between theirs.

        Raises:
            UserError: when there is no such layer or position.
        """
        if not 0 <= layer <= self.n_layers - 1:
            raise UserError(f"--layer {layer:g}: the model has layers 0 to {self.n_layers - 1}.")
        column = self._column(position)
        whole = int(layer)
        first = self.bases[whole, column]
        if layer == whole:
            return first
        second = self.bases[whole + 1, column]
        between = estimators.interpolated(numpy_of(first), numpy_of(second), layer - whole)
        return mx.array(between.astype(np.float32))

    def difference(self, layer: int, position: int) -> mx.array:
        """Harmful mean minus harmless mean, (d,) float32, in its own length."""
        at = layer, self._column(position)
        return self.harmful_mean[at] - self.harmless_mean[at]

    def _column(self, position: int) -> int:
        if position not in self.positions:
            raise UserError(
                f"--position {position}: the measured positions are "
                f"{', '.join(map(str, self.positions))}."
            )
        return self.positions.index(position)

    def each_layer(self, position: int) -> mx.array:
        """The candidates at one position, for an edit of each layer's own: (L, k, d)."""
        return self.bases[:, self._column(position)]

    def for_edit(self, layer: float, position: int) -> mx.array:
        """What an edit with one candidate removes: (k, d), or (L, k, d) where layers differ.

        Of the method "biprojected" the writers of layer t get the direction made orthogonal to the
        harmless means both where it was measured and after layer t, so that no harmless mean of an
        edited layer is disturbed (grimjim 2025,
        https://huggingface.co/blog/grimjim/norm-preserving-biprojected-abliteration).
        """
        basis = self.at(layer, position)
        if self.method != "biprojected":
            return basis
        column = self._column(position)
        means = numpy_of(self.harmless_mean[:, column]).astype(np.float64)
        own = means[int(layer)]
        rows = [
            estimators.unit(estimators.without(numpy_of(basis), np.stack([own, mean])))
            for mean in means
        ]
        return mx.array(np.stack(rows).astype(np.float32))

    def across_positions(self, rank: int) -> Candidates:
        """Subspaces of what is measured at all positions: one candidate for each layer.

        They are the top ``rank`` singular vectors of a layer's directions at all positions, each
        of length 1. The means are those at the last position.
        """
        bases, last = numpy_of(self.bases), max(self.positions)
        found = [
            self._span(bases[layer].reshape(-1, bases.shape[-1]), rank, "--across positions", layer)
            for layer in range(self.n_layers)
        ]
        column = slice(self._column(last), self._column(last) + 1)
        return replace(
            self,
            harmful_mean=self.harmful_mean[:, column],
            harmless_mean=self.harmless_mean[:, column],
            positions=(last,),
            found=mx.array(np.stack(found)[:, None].astype(np.float32)),
            facts={},
        )

    def across_layers(
        self, position: int, rank: int, layers: Sequence[int] | None = None
    ) -> mx.array:
        """The subspace of one position's directions after all layers: (k, d), k = ``rank``.

        The top singular vectors of the directions, each of length 1: what they have in common
        comes first. A refusal that moves to another direction on its way up lies in it whole.

        Args:
            layers: of these alone; where the sets are hardly apart, directions are noise.
        """
        rows = numpy_of(self.each_layer(position))
        if layers is not None:
            rows = rows[list(layers)]
        span = self._span(rows.reshape(-1, rows.shape[-1]), rank, "--across layers", None)
        return mx.array(span.astype(np.float32))

    def _span(self, rows: np.ndarray, rank: int, flag: str, layer: int | None) -> np.ndarray:
        where = None if layer is None else numpy_of(self.leads[layer, -1])
        span, _ = estimators.subspace(rows, rank, where)
        if len(span) < rank:
            raise UserError(
                f"{flag} --rank {rank}: the directions span {len(span)} dimensions only; choose a "
                "smaller rank."
            )
        return span


def _unit(vectors: mx.array) -> mx.array:
    lengths = mx.sqrt((vectors * vectors).sum(axis=-1, keepdims=True))
    return vectors / mx.maximum(lengths, 1e-30)


# --- measuring ---------------------------------------------------------------------------------

Sequences = Sequence[Sequence[int]]


def measure(
    chat: ChatModel,
    harmful: Sequences,
    harmless: Sequences,
    positions: Sequence[int],
    *,
    method: str = METHOD,
    rank: int = 1,
    borderline: Sequences | None = None,
) -> Candidates:
    """Candidates over the encoded prompts at every layer and the given positions.

    Sums are streamed: memory does not grow with the number of prompts. Methods that need every
    prompt's states (medians, svd, probe) keep them in a temporary file (`capture.stored`).

    Args:
        method: of `choices.METHODS`.
        rank: how many directions ``svd`` finds.
        borderline: what ``over-refusal`` needs: harmless prompts that sound harmful.

    Raises:
        UserError: a state that is not finite, naming the layer.
    """
    if method == "winsorized-means":
        parts = [_two_means(chat, one, positions, label) for one, label in (
            (harmful, "harmful prompts"), (harmless, "harmless prompts"))]  # fmt: skip
        (harmful_mean, first), (harmless_mean, second) = parts
        candidates = _checked(Candidates(harmful_mean, harmless_mean, tuple(positions), method))
        return replace(candidates, found=float32(estimators.unit(first - second))[:, :, None])
    if method in ("median-means", "svd", "probe"):
        return _from_states(chat, harmful, harmless, positions, method, rank)
    harmful_mean = capture.mean(chat, harmful, positions, label="harmful prompts")
    harmless_mean = capture.mean(chat, harmless, positions, label="harmless prompts")
    candidates = _checked(Candidates(harmful_mean, harmless_mean, tuple(positions), method))
    if method in ("projected", "biprojected"):
        return replace(candidates, found=_projected(candidates)[:, :, None])
    if method == "over-refusal":
        assert borderline is not None
        middle = capture.mean(chat, borderline, positions, label="borderline prompts")
        _checked(replace(candidates, harmful_mean=middle))
        three = (numpy_of(one) for one in (harmful_mean, middle, harmless_mean))
        found = float32(estimators.unit(estimators.over_refusal(*three)))
        return replace(candidates, harmful_mean=middle, found=found[:, :, None])
    return candidates


def _checked(candidates: Candidates) -> Candidates:
    sums = candidates.harmful_mean + candidates.harmless_mean
    finite = numbers(mx.isfinite(sums).all(axis=(1, 2)))
    if not all(finite):
        raise UserError(
            f"the residual stream after layer {finite.index(False)} is not finite: the model's "
            "weights are damaged, or overflow their dtype."
        )
    return candidates


def float32(values: np.ndarray) -> mx.array:
    return mx.array(np.ascontiguousarray(values, np.float32))


def _two_means(
    chat: ChatModel, sequences: Sequences, positions: Sequence[int], label: str
) -> tuple[mx.array, np.ndarray]:
    """The mean state, and the mean of winsorized ones: (L, P, d) each."""
    plain: mx.array | None = None
    cut: np.ndarray | None = None
    for _, states in capture.iterate(chat, sequences, positions, label=label):
        part = estimators.winsorized(numpy_of(states)).sum(axis=0, dtype=np.float64)
        plain = states.sum(axis=0) if plain is None else plain + states.sum(axis=0)
        cut = part if cut is None else cut + part
        mx.eval(plain)
    if plain is None or cut is None:
        raise UserError("there are no prompts to run.")
    return plain / len(sequences), cut / len(sequences)


def _projected(candidates: Candidates) -> mx.array:
    difference = numpy_of(candidates.harmful_mean) - numpy_of(candidates.harmless_mean)
    means = numpy_of(candidates.harmless_mean)
    found = np.stack([
        np.stack([estimators.without(row, mean) for row, mean in zip(*pair, strict=True)])
        for pair in zip(difference, means, strict=True)
    ])  # fmt: skip
    return float32(estimators.unit(found))


def _from_states(
    chat: ChatModel,
    harmful: Sequences,
    harmless: Sequences,
    positions: Sequence[int],
    method: str,
    rank: int,
) -> Candidates:
    facts: dict[str, list[float]] = {}
    estimate: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, dict[str, float]]] = {
        "median-means": _median,
        "svd": lambda bad, good: _svd(bad, good, rank),
        "probe": _probe,
    }[method]
    with (
        capture.stored(chat, harmful, positions, label="harmful prompts") as bad,
        capture.stored(chat, harmless, positions, label="harmless prompts") as good,
    ):
        means = [float32(states.mean(axis=2, dtype=np.float64)) for states in (bad, good)]
        candidates = _checked(Candidates(means[0], means[1], tuple(positions), method))
        found = np.empty((*bad.shape[:2], rank if method == "svd" else 1, chat.width), np.float32)
        for layer, column in np.ndindex(*bad.shape[:2]):
            found[layer, column], known = estimate(bad[layer, column], good[layer, column])
            for name, value in known.items():
                facts.setdefault(name, []).append(value)
    shaped = {name: mx.array(values).reshape(*found.shape[:2]) for name, values in facts.items()}
    return replace(candidates, found=mx.array(found), facts=shaped)


def _median(bad: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    return estimators.unit(estimators.median(bad) - estimators.median(good)), {}


def _svd(bad: np.ndarray, good: np.ndarray, rank: int) -> tuple[np.ndarray, dict[str, float]]:
    """Directions of the harmful states less the harmless mean (docs/architecture.md)."""
    rows = bad.astype(np.float64) - good.mean(axis=0, dtype=np.float64)
    top, whole = estimators.subspace(rows, rank)
    if len(top) < rank:
        raise UserError(
            f"--rank {rank}: {len(bad)} harmful prompts span {len(top)} dimensions only; choose a "
            "smaller rank, or give more prompts."
        )
    return top, {"effective_rank": whole.effective_rank}


def _probe(bad: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    found = estimators.probe(bad, good)
    length = float(np.linalg.norm(found.weight))
    return found.weight / length, {"threshold": -found.bias / length}


def describe(candidates: Candidates, harmful: np.ndarray, harmless: np.ndarray) -> Candidates:
    """The candidates with what held-out states say of each.

    ``explained``: the share of Σ‖h − harmless mean‖² over harmful states within the candidate.
    ``auc`` and ``accuracy``: how well the projection on it (on `leads`) tells the two sets apart;
    the accuracy at the probe's threshold, or else half way between the training means.

    Args:
        harmful, harmless: (L, P, N, d) and (L, P, M, d), of prompts they were not made from.
    """
    bases, leads = numpy_of(candidates.bases), numpy_of(candidates.leads)
    low, high = numpy_of(candidates.harmless_mean), numpy_of(candidates.harmful_mean)
    names = "explained", "auc", "accuracy"
    facts = {name: np.zeros(leads.shape[:2], np.float32) for name in names}
    for at in np.ndindex(*leads.shape[:2]):
        lead = leads[at].astype(np.float64)
        threshold = float((low[at] + high[at]) @ lead) / 2
        if "threshold" in candidates.facts:
            threshold = float(candidates.facts["threshold"][at].item())  # type: ignore[arg-type]
        bad, good = harmful[at] @ lead - threshold, harmless[at] @ lead - threshold
        facts["explained"][at] = estimators.explained(harmful[at], low[at], bases[at])
        facts["auc"][at] = estimators.auc(bad, good)
        facts["accuracy"][at] = estimators.accuracy(bad, good)
    return replace(
        candidates,
        facts={**candidates.facts, **{name: mx.array(value) for name, value in facts.items()}},
    )
