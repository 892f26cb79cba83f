"""What is known of directions: the candidates, what their removal did, and which was chosen."""

from __future__ import annotations

from dataclasses import dataclass

from abl_mlx.records.evaluations import Kept
from abl_mlx.records.record import Part


@dataclass(frozen=True, kw_only=True)
class Looked(Part):
    """Prompts of a set that were asked before anything was measured, and those refused."""

    asked: int
    refused: int


@dataclass(frozen=True, kw_only=True)
class Cloud(Part):
    """Two prompt sets in a plane: [x, y] of every prompt, after ``layer`` at ``position``."""

    layer: int | None = None
    position: int | None = None
    harmful: list[list[float]]
    harmless: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class ScoredCandidate(Part):
    """The candidate after ``layer`` at ``position``, and its figures on validation prompts.

    Attributes:
        d_prime: separation of the two sets along it.
        cosine: 1 − cos of the two means.
        mean: |mean element| of the unit direction.
        refusal: mean refusal score of harmful prompts with the direction removed, log-odds.
        refused: share of them whose likeliest first token still opens a refusal then.
        kl: at the first reply token of harmless prompts with it removed, nats.
        prompts: numbers of harmful and harmless prompts that these three were measured on.
        induced: mean refusal score of harmless prompts with it added, log-odds.
        dropped: why it cannot be chosen.
        effective_rank: exp of the entropy of the states' normalized singular values.
        explained: share of the variance that it explains.
        auc, accuracy: of telling the two sets apart along it.
    """

    layer: int
    position: int
    d_prime: float | None = None
    cosine: float | None = None
    mean: float | None = None
    refusal: float | None = None
    refused: float | None = None
    kl: float | None = None
    prompts: list[int] | None = None
    induced: float | None = None
    dropped: str | None = None
    effective_rank: float | None = None
    explained: float | None = None
    auc: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Selection(Part):
    """Which directions were taken.

    Attributes:
        method: how they were found; ``given`` where a file gave them.
        layer: of one layer; between two layers it is a fraction.
        position: token offset from the prompt's end.
        rank: how many, of more than one.
        across: ``layers`` or ``positions``, whose directions are taken together.
        among: of ``layers``, these alone.
        per_layer: each layer its own.
        orthogonal_to: of the prompts whose refusals are to stay, what the directions were made
            orthogonal to: ``own``, which sets these apart from harmful prompts, or ``all``, which
            sets them apart from harmless ones.
    """

    method: str | None = None
    layer: float | None = None
    position: int | None = None
    rank: int | None = None
    across: str | None = None
    among: list[int] | None = None
    per_layer: bool | None = None
    orthogonal_to: str | None = None


@dataclass(frozen=True, kw_only=True)
class TriedEdit(Selection):
    """A removal that was tried on the first reply tokens to validation prompts.

    Attributes:
        refusal: mean refusal score of harmful prompts, log-odds.
        refused: share of them whose likeliest first token opens a refusal.
        kl: of harmless prompts, nats.
        kept_refused: share of refusals that should stay and do.
        dropped: why it cannot be chosen.
    """

    refusal: float | None = None
    refused: float | None = None
    kl: float | None = None
    kept_refused: float | None = None
    dropped: str | None = None


@dataclass(frozen=True, kw_only=True)
class TriedConstant(Part):
    """A constant that was tried on harmless validation prompts.

    Attributes:
        layer, position: the mean difference that is added, after that layer.
        strength: multiple of the difference.
        agreement: share of the tokens of the model's own refusals that it would then say itself.
        likelihood: mean log-probability of these tokens, nats.
    """

    layer: int
    position: int
    strength: float
    agreement: float
    likelihood: float


@dataclass(frozen=True, kw_only=True)
class RefusalScores(Part):
    """Mean refusal scores of validation prompts, log-odds; the last with the direction removed."""

    harmful: float
    harmless: float
    harmful_ablated: float


@dataclass(frozen=True, kw_only=True)
class Searched(Part):
    """What ``--search`` did.

    Attributes:
        trials: how many were made.
        ended: why there are no more.
        target_refusals: the share of refusals that is good enough.
        refusal_rate, broken_rate: shares of the replies with the edit that was taken.
        refusal_score, kl: of that edit, log-odds and nats.
        kl_default, refusal_score_default: of the edit without a search.
        hypervolume: of the Pareto front.
        forward_tokens, generated_tokens: what it cost.
    """

    trials: int
    ended: str
    target_refusals: float
    refusal_rate: float
    broken_rate: float
    refusal_score: float
    kl: float
    kl_default: float
    refusal_score_default: float
    hypervolume: float
    forward_tokens: int
    generated_tokens: int


@dataclass(frozen=True, kw_only=True)
class Recipe(Part):
    """How strongly what is edited: ``attention`` and ``mlp`` -> a strength for each layer."""

    profile: dict[str, list[float]] | None = None
    embedding: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ViewOf(Part):
    """Where a direction was measured: the mode of thinking, and ``end-of-prompt`` or
    ``end-of-thought``."""

    thinking: str
    measured_at: str


@dataclass(frozen=True, kw_only=True)
class RepliedInMode(Part):
    """Replies to validation prompts in a mode of thinking.

    Attributes:
        refused, broken: shares of harmful prompts.
        harmless_lost: share of harmless prompts that are refused or broken.
        thought_words: mean length of the thoughts that end.
    """

    refused: float
    broken: float
    harmless_lost: float
    thought_words: float | None = None


@dataclass(frozen=True, kw_only=True)
class JudgedInModes(Part):
    """What the model and the edit that was taken reply, by mode; the KL is of the worse mode."""

    before: dict[str, RepliedInMode]
    after: dict[str, RepliedInMode]
    kl: float


@dataclass(frozen=True, kw_only=True)
class JudgedFinalist(Part):
    """A direction, or the span of several, that was judged by replies in every mode.

    Attributes:
        views: where its directions were measured.
        rank: how many directions it has.
        kl: nats at the first reply token of harmless prompts, in the worse mode.
        dropped: why it cannot be chosen.
    """

    views: list[ViewOf]
    rank: int
    kl: float
    modes: dict[str, RepliedInMode]
    dropped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Chosen(Selection):
    """The directions, or the constant, that were taken, and why.

    Attributes:
        multiple, length: of a constant, in mean differences and as a vector.
        chosen_by: the rule.
        refusal_score: before and with them removed.
        validation_kl, refused, kept_refused: as those of `TriedEdit`.
        refusal_tokens: first reply tokens that open a refusal.
        single: the best single direction, where several were taken.
        forward_tokens: how many ran for the choice.
        search: with ``--search``.
        agreement: as that of `TriedConstant`.
        fluent_refusals: share of the replies that are fluent refusals with the constant.
        trials: the constants that were tried.
        file: the name of the file that they were read from.
        sha256: of their float32 bytes.
        recipe: of a search's edit.
        thinking, measured_at: of a model that thinks, where the (first) direction was measured.
        views: where the directions were measured, of a span of several.
        judged: what replies say of it in every mode of thinking.
        kept: set -> what replies to validation prompts show of the refusals that are to stay.
    """

    multiple: float | None = None
    length: float | None = None
    chosen_by: str | None = None
    refusal_score: RefusalScores | None = None
    validation_kl: float | None = None
    refused: float | None = None
    refusal_tokens: list[str] | None = None
    kept_refused: float | None = None
    single: TriedEdit | None = None
    forward_tokens: int | None = None
    search: Searched | None = None
    agreement: float | None = None
    fluent_refusals: float | None = None
    trials: list[TriedConstant] | None = None
    file: str | None = None
    sha256: str
    recipe: Recipe | None = None
    thinking: str | None = None
    measured_at: str | None = None
    views: list[ViewOf] | None = None
    judged: JudgedInModes | None = None
    kept: dict[str, Kept] | None = None


@dataclass(frozen=True, kw_only=True)
class Found(Part):
    """What was found on the way to a direction; of another's direction file, less.

    Attributes:
        direction: what was chosen.
        first_look: set -> replies of the model as it is.
        scores: every candidate.
        trials: what else was tried.
        cloud: the two sets as the model holds them.
        finalists: of a model that thinks, what was judged by replies.
    """

    direction: Chosen
    first_look: dict[str, Looked] | None = None
    scores: list[ScoredCandidate] | None = None
    trials: list[TriedEdit] | None = None
    cloud: Cloud | None = None
    finalists: list[JudgedFinalist] | None = None
