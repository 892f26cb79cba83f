"""Candidate directions: the difference of two prompt sets' mean states, and other estimators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from abl_mlx.behaviour import separation
from abl_mlx.directions import estimators, methods
from abl_mlx.directions.methods import Method
from abl_mlx.models import capture, sweeps
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.support.arrays import numbers, numpy_of
from convert.base.errors import UserError

#: The largest number of token positions that are measured, counted back from the prompt's end.
MOST_POSITIONS = 8

METHOD = methods.METHODS[0]


@dataclass(frozen=True)
class Candidates:
    """Mean residual states and candidate directions at every layer and position.

    Attributes:
        harmful_mean: (L, P, d) float32, mean state over harmful prompts after layer l at
            position p; for the method over-refusal, over borderline prompts.
        harmless_mean: (L, P, d) float32, mean state over harmless prompts.
        positions: the P token positions, counted from the prompt's end, -1 being the last token.
        method: one of `methods.METHODS`.
        found: (L, P, k, d) float32, the candidates that the method found, as orthonormal rows. None
            for the difference of means, which follows from the means (Arditi et al. 2024).
        facts: name -> (L, P), further facts about each candidate, such as ``effective_rank``.
    """

    harmful_mean: mx.array
    harmless_mean: mx.array
    positions: tuple[int, ...]
    method: str = METHOD
    found: mx.array | None = None
    facts: Mapping[str, mx.array] = field(default_factory=dict)

    @property
    def bases(self) -> mx.array:
        """The candidates as orthonormal rows, (L, P, k, d) float32."""
        if self.found is not None:
            return self.found
        return _unit(self.harmful_mean - self.harmless_mean)[:, :, None]

    @property
    def directions(self) -> mx.array:
        """The candidates: unit vectors (L, P, d), or for subspaces orthonormal (L, P, k, d)."""
        return self.bases if self.rank > 1 else self.bases[:, :, 0]

    @property
    def leads(self) -> mx.array:
        """Unit vectors (L, P, d): each candidate's direction along which the means differ."""
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
        """k, the number of directions in a candidate."""
        return 1 if self.found is None else int(self.found.shape[2])

    def at(self, layer: float, position: int) -> mx.array:
        """One candidate as (k, d) float32; for a layer such as 3.5, between those of two layers.

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
        """Harmful mean minus harmless mean, (d,) float32, not normalized."""
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
        """The candidates of all layers at one position, (L, k, d), for an edit of every layer with
        its own directions."""
        return self.bases[:, self._column(position)]

    def for_edit(self, layer: float, position: int) -> mx.array:
        """The directions that an edit with one candidate removes: (k, d), or (L, k, d) per layer.

        They differ per layer for methods with `each_layer`: from the writers of layer t an edit
        removes the direction made orthogonal both to the harmless mean where it was measured and
        to the one after layer t, so that no edited layer's harmless mean changes (grimjim 2025,
        https://huggingface.co/blog/grimjim/norm-preserving-biprojected-abliteration).
        """
        basis = self.at(layer, position)
        if not methods.named(self.method).each_layer:
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
        """Candidates that combine the directions at all positions: one subspace for each layer.

        It is spanned by the top ``rank`` singular vectors of the layer's directions (unit vectors)
        at all positions. The means are those at the last position.
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
        """A subspace that combines the directions of several layers at one position: (rank, d).

        It is spanned by the top singular vectors of the directions (unit vectors), those that they
        have in common first. So it also holds a refusal whose direction changes from layer to
        layer.

        Args:
            position: the token position.
            rank: the number of dimensions.
            layers: the layers to combine; None for all. Where the sets are hardly separated,
                directions are noise.
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
    """Measure candidates on encoded prompts, at every layer and the given positions.

    Means are accumulated, so memory does not grow with the number of prompts. Methods that need the
    states of every prompt (`methods.STATES`) keep them in a temporary file (`capture.stored`).

    Args:
        chat: the model.
        harmful, harmless: encoded prompts.
        positions: token positions, counted from the prompt's end.
        method: one of `methods.METHODS`.
        rank: the number of directions of a candidate, for methods that find subspaces.
        borderline: encoded harmless prompts that sound harmful, needed by ``over-refusal``.

    Raises:
        UserError: when a state is not finite, naming the layer.
    """
    how = methods.named(method)
    if how.needs == methods.STATES:
        return _from_states(chat, harmful, harmless, positions, how, how.ranked(rank))
    if how.cut:
        (bad, first), (good, second) = (
            _two_means(chat, one, positions, how, label)
            for one, label in ((harmful, "harmful prompts"), (harmless, "harmless prompts"))
        )
    else:
        bad, good = sweeps.together(
            chat.model,
            lambda: capture.mean(chat, harmful, positions, label="harmful prompts"),
            lambda: capture.mean(chat, harmless, positions, label="harmless prompts"),
        )
        first, second = numpy_of(bad), numpy_of(good)
    candidates = _checked(Candidates(bad, good, tuple(positions), method))
    if method == METHOD:
        return candidates
    if how.needs == methods.THREE_MEANS:
        assert borderline is not None
        middle = capture.mean(chat, borderline, positions, label="borderline prompts")
        candidates = _checked(replace(candidates, harmful_mean=middle))
        found = how.estimate(first, numpy_of(middle), second)
    else:
        found = np.empty(first.shape)
        for at in np.ndindex(*first.shape[:2]):
            found[at] = how.estimate(first[at], second[at])
    return replace(candidates, found=float32(estimators.unit(found))[:, :, None])


def orthogonalized(candidates: Candidates, others: Sequence[mx.array]) -> Candidates:
    """The candidates made orthogonal to other vectors of the same layer and position.

    Args:
        others: (L, P, d) each.
    """
    bases = numpy_of(candidates.bases)
    vectors = np.stack([numpy_of(one) for one in others])
    found = np.empty_like(bases)
    for at in np.ndindex(*bases.shape[:2]):
        rows = estimators.without(bases[at], vectors[:, at[0], at[1]])
        found[at], _ = estimators.orthonormal(rows)
    return replace(candidates, found=float32(found), facts={})


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
    chat: ChatModel, sequences: Sequences, positions: Sequence[int], how: Method, label: str
) -> tuple[mx.array, np.ndarray]:
    """The mean of the states, and of the states as the method cuts them, (L, P, d) each."""
    cut_off = how.cut_off
    plain: mx.array | None = None
    cut: np.ndarray | None = None
    for _, states in capture.iterate(chat, sequences, positions, label=label):
        part = cut_off(numpy_of(states)).sum(axis=0, dtype=np.float64)
        plain = states.sum(axis=0) if plain is None else plain + states.sum(axis=0)
        cut = part if cut is None else cut + part
        mx.eval(plain)
    if plain is None or cut is None:
        raise UserError("there are no prompts to run.")
    return plain / len(sequences), cut / len(sequences)


def _from_states(
    chat: ChatModel,
    harmful: Sequences,
    harmless: Sequences,
    positions: Sequence[int],
    how: Method,
    rank: int,
) -> Candidates:
    facts: dict[str, list[float]] = {}
    sets = {"harmful prompts": harmful, "harmless prompts": harmless}
    with capture.stored_each(chat, sets, positions) as (bad, good):
        means = [float32(states.mean(axis=2, dtype=np.float64)) for states in (bad, good)]
        candidates = _checked(Candidates(means[0], means[1], tuple(positions), how.name))
        found = np.empty((*bad.shape[:2], rank, chat.width), np.float32)
        for at in np.ndindex(*bad.shape[:2]):
            rows, known = how.estimate(bad[at], good[at], rank)
            if len(rows := np.atleast_2d(rows)) < rank:
                raise UserError(
                    f"--rank {rank}: {len(harmful)} harmful prompts span {len(rows)} dimensions "
                    "only; choose a smaller rank, or give more prompts."
                )
            found[at] = rows
            for name, value in known.items():
                facts.setdefault(name, []).append(value)
    shaped = {name: mx.array(values).reshape(*found.shape[:2]) for name, values in facts.items()}
    return replace(candidates, found=mx.array(found), facts=shaped)


def describe(candidates: Candidates, harmful: np.ndarray, harmless: np.ndarray) -> Candidates:
    """The candidates with further ``facts``, measured on held-out states.

    ``explained`` is the share of Σ‖h − harmless mean‖² over harmful states that lies in the
    candidate. ``auc`` and ``accuracy`` say how well the projection on `leads` separates the two
    sets; the threshold of the accuracy is the probe's, or else half way between the training means.

    Args:
        candidates: the candidates.
        harmful, harmless: (L, P, N, d) and (L, P, M, d), states of prompts that were not used to
            measure the candidates.
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
        facts["auc"][at] = separation.auc(bad, good)
        facts["accuracy"][at] = estimators.accuracy(bad, good)
    return replace(
        candidates,
        facts={**candidates.facts, **{name: mx.array(value) for name, value in facts.items()}},
    )
