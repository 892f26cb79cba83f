"""Records of directions: the candidates, the effects of removing them, and the choice."""

from __future__ import annotations

from dataclasses import dataclass

from abl_mlx.records.cliffs import RefusalCliff
from abl_mlx.records.conditions import ConditionFound
from abl_mlx.records.evaluations import Kept
from abl_mlx.records.explained import Explained
from abl_mlx.records.record import Part


@dataclass(frozen=True, kw_only=True)
class Looked(Part):
    """How many prompts of a set were asked before the measurement, and how many were refused."""

    asked: int
    refused: int


@dataclass(frozen=True, kw_only=True)
class Cloud(Part):
    """The states of two prompt sets, projected on a plane.

    Attributes:
        layer, position: where the states were captured: after this layer, at this token.
        harmful, harmless: [x, y] of every prompt, in units of the residual stream.
    """

    layer: int | None = None
    position: int | None = None
    harmful: list[list[float]]
    harmless: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class ScoredCandidate(Part):
    """A candidate after ``layer`` at ``position``, and its figures on validation prompts.

    Attributes:
        d_prime: the d′ of the two sets along the candidate.
        cosine: 1 − the cosine of the two mean states.
        mean: the absolute mean of the unit direction's elements.
        refusal: mean refusal score of harmful prompts with the direction ablated, log-odds.
        refused: share of harmful prompts whose likeliest first token is a refusal opening with the
            direction ablated, 0 to 1.
        kl: mean KL at the first reply token of harmless prompts with the direction ablated, nats.
        prompts: the numbers of harmful and of harmless prompts for these three figures.
        induced: mean refusal score of harmless prompts with the direction added, log-odds.
        dropped: the reason why the candidate cannot be chosen.
        effective_rank: exp of the entropy of the normalized singular values of the states.
        explained: share of the variance of harmful states that the candidate explains, 0 to 1.
        auc, accuracy: of a classifier of the two sets along the candidate, 0 to 1.
        unprotected: the length that ``--protect`` leaves of the unit direction, 0 to 1.
        cosmic: the sum of two cosine similarities by which ``cosmic`` chooses, -2 to 2.
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
    unprotected: float | None = None
    cosmic: float | None = None


@dataclass(frozen=True, kw_only=True)
class Selection(Part):
    """The directions that were chosen.

    Attributes:
        method: the method that found them; ``given`` if they come from a file.
        layer: the layer, if they belong to one; a fraction lies between two layers.
        position: the token position.
        rank: the number of directions of a subspace.
        across: ``layers`` or ``positions``, if a subspace spans the directions of several.
        among: the layers that it spans, if not all.
        per_layer: whether each layer has a direction of its own.
        orthogonal_to: if the directions were made orthogonal to what prompts whose refusals are to
            stay have of their own: ``own``, the difference of these prompts from harmful ones, or
            ``all``, their difference from harmless ones.
        features: the features of a sparse autoencoder whose decoder rows they are.
    """

    method: str | None = None
    layer: float | None = None
    position: int | None = None
    rank: int | None = None
    across: str | None = None
    among: list[int] | None = None
    per_layer: bool | None = None
    orthogonal_to: str | None = None
    features: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class TriedEdit(Selection):
    """A removal that was tried on the first reply tokens to validation prompts.

    Attributes:
        refusal: mean refusal score of harmful prompts, log-odds.
        refused: share of harmful prompts whose likeliest first token is a refusal opening, 0 to 1.
        kl: mean KL on harmless prompts, nats.
        kept_refused: share of the refusals that are to stay and have stayed, 0 to 1.
        dropped: the reason why it cannot be chosen.
    """

    refusal: float | None = None
    refused: float | None = None
    kl: float | None = None
    kept_refused: float | None = None
    dropped: str | None = None


@dataclass(frozen=True, kw_only=True)
class TriedUpdate(Part):
    """A change of MLPs (``--method rome``) that was tried on the first reply tokens.

    Attributes:
        layers: the first and the last layer that is changed.
        keep: the weight of each kept input beside a key.
        reach: the share of the way to the harmless mean that values ask for.
        form: ``ridge``, or ``null-space`` if kept inputs keep their outputs exactly.
        refusal: mean refusal score of harmful prompts, log-odds.
        refused: share of harmful prompts whose likeliest first token is a refusal opening, 0 to 1.
        kl: mean KL on harmless prompts, nats.
        strengths: the strength of each of these layers, if it is not 1 everywhere.
    """

    layers: list[int]
    keep: float
    reach: float
    form: str
    strengths: list[float] | None = None
    refusal: float | None = None
    refused: float | None = None
    kl: float | None = None


@dataclass(frozen=True, kw_only=True)
class TriedConstant(Part):
    """A constant that was tried on harmless validation prompts.

    Attributes:
        layer, position: of the mean difference that is added after this layer.
        strength: the multiple of the mean difference.
        agreement: share of the tokens of the model's own refusals that are the likeliest ones with
            the constant, 0 to 1.
        likelihood: mean log-probability of these tokens with the constant, nats.
    """

    layer: int
    position: int
    strength: float
    agreement: float
    likelihood: float


@dataclass(frozen=True, kw_only=True)
class RefusalScores(Part):
    """Mean refusal scores of validation prompts, log-odds.

    Attributes:
        harmful, harmless: of the unedited model.
        harmful_ablated: of harmful prompts with the direction ablated.
    """

    harmful: float
    harmless: float
    harmful_ablated: float


@dataclass(frozen=True, kw_only=True)
class FigureChange(Part):
    """A scorer's figure of the unedited model, and at runtime with the chosen edit."""

    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class SoughtFigure(FigureChange):
    """The figure that a search lowers (``--search-for``).

    Attributes:
        scorer: the scorer's name.
        target: the figure that is good enough.
        default: the figure with the edit that was chosen before the search.
    """

    scorer: str
    target: float
    default: float


@dataclass(frozen=True, kw_only=True)
class Searched(Part):
    """The result of a search (``--search``).

    Attributes:
        trials: the number of edits that were tried.
        minutes: the longest time for trials, if there was one.
        started_from: the name of the file of ``--from``.
        ended: why the search ended.
        target_refusals: the share of refused and broken replies that is small enough, 0 to 1.
        refusal_rate, broken_rate: of replies to harmful prompts with the chosen edit, 0 to 1.
        refusal_score: of the chosen edit, log-odds.
        refusal_score_default: of the edit that was chosen before the search.
        figure: with ``--search-for``, the figure that was lowered; it takes the place of the last
            five.
        scorers: name of each scorer of ``--scorer`` -> its figure.
        kl, kl_default: of the chosen edit, and of the one that was chosen before the search, nats.
        hypervolume: of the Pareto front, 0 to 1.
        forward_tokens: the number of tokens in forward passes.
        generated_tokens: the number of tokens that were generated.
    """

    trials: int
    minutes: float | None = None
    started_from: str | None = None
    ended: str
    target_refusals: float | None = None
    refusal_rate: float | None = None
    broken_rate: float | None = None
    refusal_score: float | None = None
    refusal_score_default: float | None = None
    figure: SoughtFigure | None = None
    scorers: dict[str, FigureChange] | None = None
    kl: float
    kl_default: float
    hypervolume: float
    forward_tokens: int
    generated_tokens: int


@dataclass(frozen=True, kw_only=True)
class Recipe(Part):
    """The strengths of the edit of a search, or of one that was learned.

    Attributes:
        profile: ``attention`` and ``mlp`` -> the strength in each layer.
        embedding: whether the embedding is edited.
        strength: a factor of all strengths, also the embedding's; None for 1.
        norm: the norms that are kept; None for those of ``--norm``.
    """

    profile: dict[str, list[float]] | None = None
    embedding: bool | None = None
    strength: float | None = None
    norm: str | None = None


@dataclass(frozen=True, kw_only=True)
class ViewOf(Part):
    """Where a direction was measured.

    Attributes:
        thinking: the mode of thinking.
        measured_at: ``end-of-prompt`` or ``end-of-thought``.
    """

    thinking: str
    measured_at: str


@dataclass(frozen=True, kw_only=True)
class RepliedInMode(Part):
    """Verdicts on replies to validation prompts in one mode of thinking.

    Attributes:
        refused, broken: shares of the replies to harmful prompts, 0 to 1.
        harmless_lost: share of refused or broken replies to harmless prompts, 0 to 1.
        thought_words: mean length in words of the thoughts that end; None if no thought does.
        kept: with an edit: set -> how many of the refusals that are to stay have stayed.
    """

    refused: float
    broken: float
    harmless_lost: float
    thought_words: float | None = None
    kept: dict[str, Kept] | None = None


@dataclass(frozen=True, kw_only=True)
class JudgedInModes(Part):
    """Replies of the unedited model and with the chosen edit, by mode of thinking.

    Attributes:
        before, after: mode -> verdicts on replies.
        kl: mean KL at the first reply token of harmless prompts, nats; the larger of the modes'.
    """

    before: dict[str, RepliedInMode]
    after: dict[str, RepliedInMode]
    kl: float


@dataclass(frozen=True, kw_only=True)
class JudgedFinalist(Part):
    """A direction, or a subspace spanned by several, that was judged by replies in every mode.

    Attributes:
        views: where its directions were measured.
        rank: the number of its directions.
        orthogonal_to: as in `Selection`.
        kl: mean KL at the first reply token of harmless prompts, nats; the larger of the modes'.
        modes: mode -> verdicts on replies.
        dropped: the reason why it cannot be chosen.
    """

    views: list[ViewOf]
    rank: int
    orthogonal_to: str | None = None
    kl: float
    modes: dict[str, RepliedInMode]
    dropped: str | None = None


@dataclass(frozen=True, kw_only=True)
class RankedPart(Part):
    """An attention head or an expert, with figures of the train prompts.

    Attributes:
        layer, number: which one, counted from 0.
        harmful, harmless: the mean component that a head writes along the first direction at the
            measured token; or how often a token of the prompts is sent to an expert, 0 to 1.
        stable: of an expert, how often it is among the first when prompts are drawn anew, 0 to 1.
    """

    layer: int
    number: int
    harmful: float
    harmless: float
    stable: float | None = None


@dataclass(frozen=True, kw_only=True)
class Chosen(Selection):
    """The directions or the constant that were chosen, and the reason.

    Attributes:
        multiple: of a constant, the multiple of the mean difference.
        length: of a constant, its Euclidean norm in units of the residual stream.
        chosen_by: the rule of the choice.
        refusal_score: mean refusal scores with and without the directions.
        validation_kl, refused, kept_refused: figures with the edit, as in `TriedEdit`.
        uniform_kl: the KL with strength 1 everywhere, if ``recipe`` has other strengths.
        refusal_tokens: the refusal openings, as text.
        single: the best single direction, if a subspace was chosen.
        forward_tokens: the number of tokens in forward passes for the choice.
        backward_tokens: the number of tokens in backward passes for the choice.
        parameters: the constants of the method, by name.
        facts: figures of how the method found the directions, by name.
        search: the result of ``--search``.
        agreement: of a constant, as in `TriedConstant`.
        fluent_refusals: share of replies that are fluent refusals with the constant, 0 to 1.
        trials: the constants that were tried.
        file: the name of the file that the directions were read from.
        sha256: of the float32 bytes of the directions.
        recipe: the strengths by layer, where these differ.
        thinking, measured_at: where the first direction was measured, if the model was asked to
            think.
        views: where each direction of a subspace was measured, if the model was asked to think.
        judged: verdicts on replies in every mode of thinking.
        kept: set -> the refusals that are to stay, counted in replies to validation prompts.
        update: the change of MLPs, if no directions are removed.
        heads: those that write most along the direction, by harmful less harmless.
        experts: those to which tokens of harmful prompts are sent more often.
    """

    multiple: float | None = None
    update: TriedUpdate | None = None
    length: float | None = None
    chosen_by: str | None = None
    refusal_score: RefusalScores | None = None
    validation_kl: float | None = None
    refused: float | None = None
    uniform_kl: float | None = None
    refusal_tokens: list[str] | None = None
    kept_refused: float | None = None
    single: TriedEdit | None = None
    forward_tokens: int | None = None
    backward_tokens: int | None = None
    parameters: dict[str, float] | None = None
    facts: dict[str, float] | None = None
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
    heads: list[RankedPart] | None = None
    experts: list[RankedPart] | None = None


@dataclass(frozen=True, kw_only=True)
class RankedFeature(Part):
    """A feature of a sparse autoencoder, with figures of the prompts' last tokens.

    Attributes:
        feature: its number.
        difference: d, the difference of mean activation on harmful and on harmless validation
            prompts over the pooled deviation.
        error: the standard error of d.
        auc: the probability that the activation on a harmful prompt is the larger one.
        interval: the 95% interval of the AUC.
        active: shares of the harmful and of the harmless prompts on which it is active, 0 to 1.
        train_difference: d on the train prompts, by which features are ranked.
        cosine: of its decoder row and the difference of the mean states.
    """

    feature: int
    difference: float
    error: float
    auc: float
    interval: list[float]
    active: list[float]
    train_difference: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class SaeFound(Part):
    """The features of a sparse autoencoder (``--sae``).

    Attributes:
        name: of the autoencoder's folder.
        architecture: ``standard``, ``gated``, ``jumprelu`` or ``topk``.
        model: the model it was trained on, if its files say so.
        layer: the layer after which it reads the stream.
        position: the token at which it was read.
        count: the number of its features.
        features: those that were taken, and those that tell the prompt sets apart best.
    """

    name: str
    architecture: str
    model: str | None = None
    layer: int
    position: int
    count: int
    features: list[RankedFeature]


@dataclass(frozen=True, kw_only=True)
class Found(Part):
    """All findings on the way to a direction; from another tool's direction file, fewer.

    Attributes:
        direction: the choice.
        first_look: set -> refusals of the unedited model.
        scores: all candidates.
        trials: the other edits that were tried.
        cloud: the states of the two prompt sets at the chosen layer and position.
        finalists: what was judged by replies, if the model was asked to think.
        sae: the features of a sparse autoencoder, if directions were taken from one.
        condition: the prompts on which an edit at runtime is made. Weights have no condition.
        updates: the changes of MLPs that were tried, the chosen one first.
        explained: what the direction is made of.
        cliff: where in its thoughts the model gives up refusals.
    """

    direction: Chosen
    first_look: dict[str, Looked] | None = None
    scores: list[ScoredCandidate] | None = None
    trials: list[TriedEdit] | None = None
    cloud: Cloud | None = None
    finalists: list[JudgedFinalist] | None = None
    sae: SaeFound | None = None
    condition: ConditionFound | None = None
    updates: list[TriedUpdate] | None = None
    explained: Explained | None = None
    cliff: RefusalCliff | None = None
