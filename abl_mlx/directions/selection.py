"""Scores of candidate directions: separation of the prompt sets, and refusal at the first token."""

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

#: Directions from the last 20% of the layers are left out: they are close to the output tokens, so
#: removing them suppresses particular tokens rather than refusing (Arditi et al. 2024, section C).
DEEPEST = 0.8
TOO_DEEP = f"in the last {1 - DEEPEST:.0%} of the layers"

#: A removal ends refusals when at most this share of replies still opens with a refusal.
LEFT = 0.05


@dataclass(frozen=True)
class Outcome:
    """Whether a removal ends refusals, judged by the first reply token.

    Attributes:
        refused: share of the harmful validation prompts whose likeliest first token still opens a
            refusal after the removal; None if it was not tried.
        dropped: why the removal cannot be chosen; empty if it can.
        most_left: the largest share that counts as no refusals: `trial.Trial.left`.
    """

    refused: float | None
    dropped: str
    most_left: float

    @property
    def works(self) -> bool:
        """Whether the removal ends refusals and can be chosen."""
        return not self.dropped and self.refused is not None and self.refused <= self.most_left


@dataclass(frozen=True)
class Score:
    """The scores of one candidate.

    Attributes:
        layer: the layer after which the candidate was measured, counted from 0.
        position: its token position, counted from the prompt's end.
        d_prime: (μ_harmful − μ_harmless) / √((σ²_harmful + σ²_harmless) / 2) of the projections
            of validation prompts.
        cosine: 1 − cos(harmful mean, harmless mean).
        mean: |mean element| of the unit direction, by which FailSpy's abliterator ranks.
        refusal: mean refusal score (log-odds, nats) of harmful validation prompts with the
            direction ablated; None if it was not tried.
        refused: share of these prompts whose likeliest first token still opens a refusal with the
            direction ablated; None if it was not tried.
        kl: mean KL(model ‖ ablated) in nats at the first reply token of harmless validation
            prompts; None if it was not tried.
        prompts: the numbers of harmful and harmless prompts on which these three were measured;
            None if it was not tried.
        induced: mean refusal score of harmless validation prompts with the difference of means
            added to the stream after the candidate's layer; None if it was not tried.
        dropped: why the candidate cannot be chosen; empty if it can.
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
        """Whether the candidate's removal ends refusals."""
        return Outcome(self.refused, self.dropped, most_left)

    def record(self) -> dict[str, Any]:
        """The score as JSON values."""
        return {key: value for key, value in vars(self).items() if value not in (None, "")}

    def described(self, candidates: Candidates) -> dict[str, Any]:
        """The score and the facts about its candidate, as JSON values."""
        at = self.layer, candidates.positions.index(self.position)
        facts = {
            name: value
            for name, values in candidates.facts.items()
            if name != "threshold" and math.isfinite(value := number(values[at]))
        }
        return {**self.record(), **facts}


def separation(
    chat: ChatModel,
    candidates: Candidates,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
) -> list[Score]:
    """Separation scores of every candidate, on encoded prompts that were not used to measure it."""
    states = [
        capture.full(chat, prompts, candidates.positions, label=f"separation, {name}")
        for prompts, name in ((harmful, "harmful"), (harmless, "harmless"))
    ]
    return separation_of(candidates, *(numpy_of(one).transpose(1, 2, 0, 3) for one in states))


def separation_of(candidates: Candidates, harmful: np.ndarray, harmless: np.ndarray) -> list[Score]:
    """Separation scores of every candidate, from states (L, P, N, d) and (L, P, M, d)."""
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
    """The refusal openings: ids of the tokens with which this model begins its refusals.

    They are those tokens whose mean probability as the first reply token is at least 0.02 higher
    after harmful prompts than after harmless ones, and at least three times as high. One prompt
    alone makes no opening, as an answer may begin with a word of its own: without the prompt after
    which the token is likeliest, the mean has to be at least 0.005 still. Less than eight prompts
    are too few for this rule.

    Args:
        harmful: log-probabilities of the first reply token, (N, V) float32.
        harmless: log-probabilities of the first reply token, (M, V) float32.
        most: the largest number of tokens; those with the largest difference are returned.
    """
    each, b = mx.exp(harmful), mx.exp(harmless).mean(axis=0)
    count, a = len(each), each.mean(axis=0)
    others = (a * count - each.max(axis=0)) / max(1, count - 1)
    difference = a - b
    order = numbers(mx.argsort(-difference)[:most])
    return [
        token
        for token in order
        if number(difference[token]) >= 0.02
        and number(a[token]) >= 3 * number(b[token])
        and (count < 8 or number(others[token]) >= 0.005)
    ]


@dataclass(frozen=True)
class Told:
    """What whole replies of the unedited model tell of their first tokens.

    Attributes:
        tokens: the ids of the tokens that open refusals.
        answers: the share of the answers that open with one of them.
    """

    tokens: tuple[int, ...] = ()
    answers: float = 1.0


def told(refusals: Sequence[int], answers: Sequence[int]) -> Told:
    """The refusal openings, from the first tokens of replies that were judged.

    A token opens refusals if at least two of them, and a tenth, begin with it, and if its share
    among the refusals is at least three times that among the answers. Unlike `refusal_tokens` this
    works for a model that refuses many harmless prompts as well.

    Args:
        refusals: the first token of each refusal, whatever it was asked.
        answers: the first token of each answer.
    """
    refusing, answering = Counter(refusals), Counter(answers)
    tokens = tuple(
        token
        for token, count in refusing.most_common()
        if count >= max(2, len(refusals) / 10)
        and count * len(answers) >= 3 * answering[token] * len(refusals)
    )
    if not tokens or not answers:
        return Told()
    return Told(tokens, sum(answering[token] for token in tokens) / len(answers))


def refusal_scores(log_probabilities: mx.array, tokens: Sequence[int]) -> mx.array:
    """Log-odds, in nats, that a reply opens with one of ``tokens``: (N, V) -> (N,)."""
    inside = mx.logsumexp(log_probabilities[:, mx.array(list(tokens))], axis=-1)
    # The other tokens' probabilities are summed, because 1 − p would be imprecise for p close to 1.
    outside = mx.array(log_probabilities)
    outside[:, mx.array(list(tokens))] = -math.inf
    return inside - mx.logsumexp(outside, axis=-1)


def opening_nats(log_probabilities: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """log p and log(1 − p), p being the probability of opening with one of ``tokens``: (…,) each.

    Their difference is the score of `refusal_scores`, less precise for p close to 1, but it can be
    differentiated. log(1 − p) stays finite where the probability of the others rounds to 0.

    Args:
        log_probabilities: of the first reply token, (…, V).
        tokens: ids of tokens, (K,).
    """
    inside = mx.logsumexp(log_probabilities[..., tokens], axis=-1)
    return inside, mx.log(mx.maximum(1 - mx.exp(inside), 1e-7))


def openings(log_probabilities: mx.array, tokens: Sequence[int]) -> list[bool]:
    """For each prompt, whether the greedy reply opens with one of ``tokens``.

    Log-odds above 0 would be another criterion: where answers open in many ways, a refusal opening
    may be the likeliest token with a probability far below one half.

    Args:
        log_probabilities: of the first reply token, (N, V).
        tokens: ids of tokens.
    """
    return [int(token) in tokens for token in numbers(log_probabilities.argmax(axis=-1))]


# --- the shortlist -----------------------------------------------------------------------------


def shortlist(scores: Sequence[Score], most: int, each: int = 2) -> list[Score]:
    """The candidates to try causally, at most ``most``, those that separate the sets best first.

    The best position of every allowed layer comes before the second-best position of any layer,
    because directions at neighbouring positions of a layer are similar. No layer has more than
    ``each`` candidates in the list.
    """
    ranked: list[list[Score]] = [[] for _ in range(each)]
    seen: Counter[int] = Counter()
    for score in sorted((s for s in scores if not s.dropped), key=lambda s: -s.d_prime):
        if seen[score.layer] < each:
            ranked[seen[score.layer]].append(score)
            seen[score.layer] += 1
    return [score for rank in ranked for score in rank][:most]


def apart(scores: Sequence[Score]) -> tuple[int, ...]:
    """The layers that separate the two sets: those whose d′ is at least half of the largest.

    In other layers the difference of means is mostly noise. The result is empty if no d′ is above
    0, that is, if the validation prompts lie the other way round.

    Args:
        scores: the scores of the layers to choose from, at one position.
    """
    largest = max((score.d_prime for score in scores), default=0.0)
    return tuple(sorted(one.layer for one in scores if one.d_prime >= largest / 2 > 0))


def direction_of(candidates: Candidates, layer: float, position: int) -> mx.array:
    """One candidate as (k, d) float32.

    Raises:
        UserError: when there is no such layer or position.
    """
    return candidates.at(layer, position)
