"""Which candidate direction: separation scores, then causal scores (DESIGN sections 5 and 9)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from abl_mlx import capture
from abl_mlx.arrays import number, numbers
from abl_mlx.directions import Candidates
from abl_mlx.distributions import kl_divergence, known
from abl_mlx.edits import Edit
from abl_mlx.logits import first_reply_token
from abl_mlx.models import ChatModel, progress
from abl_mlx.report import say
from abl_mlx.steering import Intervention, ablation, adding, steering
from abl_mlx.writers import Writer
from convert.errors import UserError

#: Directions read off the last 20% of the layers are left out: they are about to become words,
#: and removing them forbids tokens rather than refusing (Arditi et al. 2024, section C).
DEEPEST = 0.8
TOO_DEEP = f"in the last {1 - DEEPEST:.0%} of the layers"

#: A direction ends refusals when this share of replies at most still opens as one.
LEFT = 0.05

NO_REFUSAL = (
    "this model opens its replies to harmful and harmless prompts in the same way, so there is no "
    "refusal to find: check with `abl-mlx eval`, or choose a direction yourself with --layer and "
    "--position."
)


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
    induced: float | None = None
    dropped: str = ""

    def record(self) -> dict[str, Any]:
        """The score as JSON values."""
        return {key: value for key, value in vars(self).items() if value not in (None, "")}


@dataclass(frozen=True)
class Choice:
    """The chosen candidate and how it was found.

    Attributes:
        score: of the chosen candidate.
        direction: (k, d) float32.
        scores: of every candidate.
        refusal_tokens: the token ids whose odds are the refusal score.
        refusal_before: (harmful, harmless) mean refusal scores of the unedited model.
    """

    score: Score
    direction: mx.array
    scores: list[Score]
    refusal_tokens: list[int]
    refusal_before: tuple[float, float]


def separation(
    chat: ChatModel,
    candidates: Candidates,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
) -> list[Score]:
    """Separation scores of every candidate on encoded prompts it was not made from."""
    projections = []
    for prompts, label in ((harmful, "separation, harmful"), (harmless, "separation, harmless")):
        rows = [
            (states * candidates.leads[None]).sum(axis=-1)
            for _, states in capture.iterate(chat, prompts, candidates.positions, label=label)
        ]
        projections.append(mx.concatenate(rows, axis=0))  # (N, L, P)
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
            dropped=_unfit(layer, candidates.n_layers, number(d_primes[layer, p])),
        )
        for layer in range(candidates.n_layers)
        for p, position in enumerate(candidates.positions)
    ]


def _unfit(layer: int, layers: int, d_prime: float) -> str:
    if not math.isfinite(d_prime):
        return "its states are not numbers"
    return TOO_DEEP if (layer + 1) / layers > DEEPEST else ""


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


def refused(log_probabilities: mx.array, tokens: Sequence[int]) -> float:
    """The share of greedy replies that open with one of ``tokens``, from (N, V).

    Odds above 1 would miss some: where answers open in many ways, a refusal's opening may be the
    likeliest of all tokens at a probability far below a half.
    """
    first = log_probabilities.argmax(axis=-1)
    return number((first[:, None] == mx.array(list(tokens))[None]).any(axis=-1).mean())


@dataclass(frozen=True)
class Effect:
    """What an edit does to the first reply token, on validation prompts; see `Score`.

    An edit that leaves logits that are no numbers has an infinite refusal score and KL, so that
    nothing chooses it.
    """

    refusal: float
    refused: float
    kl: float


class Trial:
    """Tries edits on a loaded model at runtime, by what they do to the first reply token.

    Attributes:
        refusal_tokens: the token ids whose odds are the refusal score.
        refusal_before: (harmful, harmless) mean refusal scores of the unedited model.
        harmful_tokens, harmless_tokens: in the prompts; a forward pass runs so many at most.
    """

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        harmful: Sequence[Sequence[int]],
        harmless: Sequence[Sequence[int]],
    ):
        """Run the model as it is once.

        Args:
            harmful, harmless: encoded prompts.

        Raises:
            UserError: when the model does not open refusals differently from answers.
        """
        self._chat, self._writers = chat, writers
        self._harmful, self._harmless = harmful, harmless
        before = first_reply_token(chat, harmful)
        self._base = first_reply_token(chat, harmless)
        self.refusal_tokens = refusal_tokens(before, self._base)
        if not self.refusal_tokens:
            raise UserError(NO_REFUSAL)
        self.refusal_before = (
            number(refusal_scores(before, self.refusal_tokens).mean()),
            number(refusal_scores(self._base, self.refusal_tokens).mean()),
        )
        self.harmful_tokens = sum(map(len, harmful))
        self.harmless_tokens = sum(map(len, harmless))

    def of_edit(self, edit: Edit) -> Effect:
        """The effect of an edit, without its kept norms, which are had in weights only."""
        with ablation(self._writers, replace(edit, norm="none")):
            asked = first_reply_token(self._chat, self._harmful)
            opened = first_reply_token(self._chat, self._harmless)
        if not (known(asked) and known(opened)):
            return Effect(refusal=math.inf, refused=1.0, kl=math.inf)
        return Effect(
            refusal=number(refusal_scores(asked, self.refusal_tokens).mean()),
            refused=refused(asked, self.refusal_tokens),
            kl=number(kl_divergence(self._base, opened).mean()),
        )

    def refused(self, sequences: Sequence[Sequence[int]], edit: Edit | None = None) -> float:
        """The share of other prompts, encoded, whose replies open as refusals."""
        if edit is None:
            return refused(first_reply_token(self._chat, sequences), self.refusal_tokens)
        with ablation(self._writers, replace(edit, norm="none")):
            return refused(first_reply_token(self._chat, sequences), self.refusal_tokens)

    def of_adding(self, intervention: Intervention) -> float:
        """The mean refusal score of harmless prompts under an intervention on the stream."""
        with steering(self._chat, intervention):
            opened = first_reply_token(self._chat, self._harmless)
        if not known(opened):
            return -math.inf
        return number(refusal_scores(opened, self.refusal_tokens).mean())


# --- the choice --------------------------------------------------------------------------------


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


def choose(
    chat: ChatModel,
    writers: Sequence[Writer],
    candidates: Candidates,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    *,
    edit_for: Callable[[Score], Edit],
    max_kl: float = 0.1,
    trials: int = 16,
) -> Choice:
    """The causal choice of Arditi et al. 2024: ablate, and see what it does to the first token.

    Among the shortlisted candidates whose ablation moves harmless prompts by at most ``max_kl``
    (nats, first reply token), the one that leaves the lowest refusal score on harmful ones
    (bypass). A candidate that makes harmless prompts refused when it is added (induce) is taken
    before all that do not: what only stops refusals may have broken something else. The deepest
    layers are tried when nothing before them ends refusals.

    Args:
        harmful, harmless: encoded validation prompts.
        edit_for: the edit to try a candidate with.
        max_kl: limit of the mean KL on harmless prompts, nats.
        trials: how many candidates are tried; each costs a forward pass of the harmful prompts and
            two of the harmless ones.

    Raises:
        UserError: when the model does not open refusals differently from answers, or when no
            candidate stays under the limit.
    """
    scores = separation(chat, candidates, harmful, harmless)
    trial = Trial(chat, writers, harmful, harmless)
    tried: dict[tuple[int, int], Score] = {}

    def attempt(chosen: Sequence[Score]) -> None:
        tokens = len(chosen) * (trial.harmful_tokens + 2 * trial.harmless_tokens)
        say(f"  {len(chosen)} candidates are tried, which takes about {tokens:,} forward tokens")
        with progress(len(chosen), "causal choice", "candidate") as bar:
            for score in chosen:
                effect = trial.of_edit(edit_for(score))
                limit = f"KL {effect.kl:.3f} over the limit of {max_kl:g}"
                tried[score.layer, score.position] = replace(
                    score,
                    **vars(effect),
                    induced=trial.of_adding(addition(candidates, score)),
                    dropped="" if effect.kl <= max_kl else limit,
                )
                bar.update()

    attempt(shortlist(scores, trials))
    if not any(map(_works, tried.values())):
        deep = [replace(score, dropped="") for score in scores if score.dropped == TOO_DEEP]
        attempt(shortlist(deep, trials))
    scores = [tried.get((score.layer, score.position), score) for score in scores]
    left = [score for score in tried.values() if not score.dropped]
    if not left:
        lowest = min((score.kl for score in tried.values() if score.kl is not None), default=0.0)
        raise UserError(
            f"every candidate direction moves harmless prompts by more than --max-kl {max_kl:g} "
            f"(the gentlest by {lowest:.3f}): raise --max-kl, or choose with --layer and "
            "--position."
        )
    best = min(left, key=_preference)
    return Choice(
        best,
        direction_of(candidates, best.layer, best.position),
        scores,
        trial.refusal_tokens,
        trial.refusal_before,
    )


def _preference(score: Score) -> tuple[bool, bool, float]:
    assert score.refusal is not None
    assert score.induced is not None
    return not _works(score), score.induced <= 0, score.refusal


def _works(score: Score) -> bool:
    return not score.dropped and score.refused is not None and score.refused <= LEFT


def addition(candidates: Candidates, score: Score) -> Intervention:
    """The difference of means, in its own length, added after a candidate's layer."""
    return adding(candidates.difference(score.layer, score.position), score.layer)


def direction_of(candidates: Candidates, layer: float, position: int) -> mx.array:
    """One candidate as (k, d) float32.

    Raises:
        UserError: when there is no such layer or position.
    """
    return candidates.at(layer, position)
