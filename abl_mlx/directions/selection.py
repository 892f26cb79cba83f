"""How candidate directions are scored: separation, and refusal by the first reply token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.directions.measuring import Candidates
from abl_mlx.models import capture
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.support.arrays import number, numbers, numpy_of

#: Directions read off the last 20% of the layers are left out: they are about to become words,
#: and removing them forbids tokens rather than refusing (Arditi et al. 2024, section C).
DEEPEST = 0.8
TOO_DEEP = f"in the last {1 - DEEPEST:.0%} of the layers"

#: A direction ends refusals when this share of replies at most still opens as one.
LEFT = 0.05


@dataclass(frozen=True)
class Outcome:
    """Whether a removal ends refusals, as far as first reply tokens tell.

    Attributes:
        refused: share of the harmful validation prompts whose likeliest first token opens a
            refusal with it; None where it was not tried.
        dropped: why it cannot be chosen; empty when it can.
        most_left: the largest share that counts as none: `trial.Trial.left`.
    """

    refused: float | None
    dropped: str
    most_left: float

    @property
    def works(self) -> bool:
        """Whether refusals are gone."""
        return not self.dropped and self.refused is not None and self.refused <= self.most_left


@dataclass(frozen=True)
class Score:
    """What is known of one candidate.

    Attributes:
        layer: the candidate is the mean difference after this layer, counted from 0.
        position: token offset from the prompt's end.
        d_prime: (μ_harmful − μ_harmless) / √((σ²_harmful + σ²_harmless) / 2) of the projections
            of validation prompts.
        cosine: 1 − cos(harmful mean, harmless mean).
        mean: |mean element| of the unit direction, the ranking of FailSpy's abliterator.
        refusal: mean refusal score (log-odds) of harmful validation prompts with the direction
            ablated; None where it was not tried.
        refused: share of these prompts whose likeliest first token still opens a refusal with the
            direction ablated; None where it was not tried.
        kl: mean KL(model ‖ ablated) in nats at the first reply token of harmless validation
            prompts; None where it was not tried.
        prompts: harmful and harmless ones that these three were measured on; None where it was not
            tried.
        induced: mean refusal score of harmless validation prompts with the difference of means
            added to the stream after the candidate's layer; None where it was not tried.
        dropped: why the candidate cannot be chosen; empty when it can.
    """

    layer: int
    position: int
    d_prime: float
    cosine: float
    mean: float
    refusal: float | None = None
    refused: float | None = None
    kl: float | None = None
    prompts: tuple[int, int] | None = None
    induced: float | None = None
    dropped: str = ""

    def outcome(self, most_left: float) -> Outcome:
        """Whether its removal ends refusals."""
        return Outcome(self.refused, self.dropped, most_left)

    def record(self) -> dict[str, Any]:
        """The score as JSON values."""
        return {key: value for key, value in vars(self).items() if value not in (None, "")}


def separation(
    chat: ChatModel,
    candidates: Candidates,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
) -> list[Score]:
    """Separation scores of every candidate on encoded prompts it was not made from."""
    states = [
        capture.full(chat, prompts, candidates.positions, label=f"separation, {name}")
        for prompts, name in ((harmful, "harmful"), (harmless, "harmless"))
    ]
    return separation_of(candidates, *(numpy_of(one).transpose(1, 2, 0, 3) for one in states))


def separation_of(candidates: Candidates, harmful: np.ndarray, harmless: np.ndarray) -> list[Score]:
    """The same from the prompts' states, (L, P, N, d) and (L, P, M, d)."""
    leads = numpy_of(candidates.leads)
    projections = []
    for states in (harmful, harmless):
        along = np.empty((states.shape[2], *leads.shape[:2]), np.float32)
        for at in np.ndindex(*leads.shape[:2]):  # one layer and position in memory at a time
            along[:, at[0], at[1]] = states[at] @ leads[at]
        projections.append(mx.array(along))
    d_primes = d_prime(*projections)
    cosines = cosine_separation(candidates)
    means = mx.abs(candidates.leads.mean(axis=-1))
    return [
        Score(
            layer,
            position,
            number(d_primes[layer, p]),
            number(cosines[layer, p]),
            number(means[layer, p]),
            dropped=(TOO_DEEP if (layer + 1) / candidates.n_layers > DEEPEST else ""),
        )
        for layer in range(candidates.n_layers)
        for p, position in enumerate(candidates.positions)
    ]


def d_prime(harmful: mx.array, harmless: mx.array) -> mx.array:
    """Difference of means over the root mean variance, along axis 0: (N, …), (M, …) -> (…)."""
    spread = mx.sqrt((mx.var(harmful, axis=0) + mx.var(harmless, axis=0)) / 2)
    return (harmful.mean(axis=0) - harmless.mean(axis=0)) / mx.maximum(spread, 1e-12)


def cosine_separation(candidates: Candidates) -> mx.array:
    """1 − cos of the two means, (L, P)."""
    a, b = candidates.harmful_mean, candidates.harmless_mean
    norms = mx.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return 1 - (a * b).sum(axis=-1) / mx.maximum(norms, 1e-30)


# --- the refusal score -------------------------------------------------------------------------


def refusal_tokens(harmful: mx.array, harmless: mx.array, *, most: int = 16) -> list[int]:
    """The tokens with which this model opens refusals, found from its own behaviour.

    They are those whose mean probability as the first reply token is at least 0.02 higher after
    harmful prompts than after harmless ones and at least three times as high.

    Args:
        harmful: log-probabilities (N, V) float32 of the first reply token.
        harmless: the same, (M, V).
        most: at most so many tokens, those with the largest difference.
    """
    a, b = mx.exp(harmful).mean(axis=0), mx.exp(harmless).mean(axis=0)
    difference = a - b
    order = numbers(mx.argsort(-difference)[:most])
    return [
        token
        for token in order
        if number(difference[token]) >= 0.02 and number(a[token]) >= 3 * number(b[token])
    ]


def refusal_scores(log_probabilities: mx.array, tokens: Sequence[int]) -> mx.array:
    """Log-odds, in nats, that a reply opens with one of ``tokens``: (N, V) -> (N,)."""
    inside = mx.logsumexp(log_probabilities[:, mx.array(list(tokens))], axis=-1)
    # log(1 − p) from p would lose what is left when p is close to one; the rest is summed.
    outside = mx.array(log_probabilities)
    outside[:, mx.array(list(tokens))] = -math.inf
    return inside - mx.logsumexp(outside, axis=-1)


def openings(log_probabilities: mx.array, tokens: Sequence[int]) -> list[bool]:
    """Whether each greedy reply opens with one of ``tokens``, from (N, V).

    Odds above 1 would miss some: where answers open in many ways, a refusal's opening may be the
    likeliest of all tokens at a probability far below a half.
    """
    return [int(token) in tokens for token in numbers(log_probabilities.argmax(axis=-1))]


# --- the shortlist -----------------------------------------------------------------------------


def shortlist(scores: Sequence[Score], most: int, each: int = 2) -> list[Score]:
    """The candidates worth a causal trial, at most ``most`` of them, best-separating first.

    The best position of every allowed layer comes before the second-best of any, since directions
    at neighbouring positions of one layer are alike; no layer gets more than ``each``.
    """
    ranked: list[list[Score]] = [[] for _ in range(each)]
    seen: Counter[int] = Counter()
    for score in sorted((s for s in scores if not s.dropped), key=lambda s: -s.d_prime):
        if seen[score.layer] < each:
            ranked[seen[score.layer]].append(score)
            seen[score.layer] += 1
    return [score for rank in ranked for score in rank][:most]


def apart(scores: Sequence[Score]) -> tuple[int, ...]:
    """The layers that hold the two sets apart: those whose d′ is at least half of the largest.

    Elsewhere the difference of the means is noise for the most part. None where no d′ is above 0:
    there validation prompts lie the other way round.

    Args:
        scores: of the layers to choose from, at one position.
    """
    largest = max((score.d_prime for score in scores), default=0.0)
    return tuple(sorted(one.layer for one in scores if one.d_prime >= largest / 2 > 0))


def direction_of(candidates: Candidates, layer: float, position: int) -> mx.array:
    """One candidate as (k, d) float32.

    Raises:
        UserError: when there is no such layer or position.
    """
    return candidates.at(layer, position)
