"""The reverse: a constant vector in the residual stream that makes a model refuse everything.

Multiplying the component along the refusal direction only amplifies what is there; adding a
multiple of the mean difference after one layer, at every token, is what turns answers into
refusals (docs/architecture.md, "Induce"). The layer, the token and the multiple are chosen by their
effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from abl_mlx.behaviour.evaluate import decode, generate
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import Finding
from abl_mlx.directions import measuring, selection
from abl_mlx.directions.measuring import Candidates
from abl_mlx.edits.steering import Induction, Intervention, adding, steering
from abl_mlx.inputs.sets import Prompt, PromptSets
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.logits import log_probabilities
from abl_mlx.support.arrays import number
from abl_mlx.support.console import progress
from convert.base.errors import UserError

#: Multiples of the mean difference that are tried.
LADDER = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

#: Pairs of layer and position that are tried, and harmless validation prompts for each trial.
TRIALS, TRIED = 24, 8

#: Validation prompts of each set that the choice is verified with.
PROMPTS = 16

#: Tokens of the model's own refusals that are looked at, and of the replies that verify a choice.
OPENING, REPLY = 16, 32

#: Settings that are verified by generating, best first.
VERIFIED = 4

# Nats a token by which the unsteered model may be more surprised by an induced refusal than by its
# own: beyond, the words no longer follow from one another.
_SURPRISE = 1.0

# Share of the validation prompts that has to be refused in fluent sentences.
_ENOUGH, _LEAST = 0.95, 0.5


@dataclass(frozen=True)
class Trial:
    """Effect of one constant on harmless prompts, with the replies given token by token.

    Attributes:
        layer, position: whose mean difference is added, after which layer.
        strength: multiple of the difference.
        agreement: mean over prompts of the share of the refusal's tokens that the steered model
            would say itself, 0 where it would not open with it: 1 is a fluent refusal everywhere.
        likelihood: mean log-probability of these tokens, nats.
    """

    layer: int
    position: int
    strength: float
    agreement: float
    likelihood: float

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self))


def _positions(chat: ChatModel, finding: Finding) -> int:
    """How many positions are measured, back from the prompt's end.

    Raises:
        UserError: a position that is no number.
    """
    count = min(chat.template_tail(), measuring.MOST_POSITIONS)
    if finding.position is None:
        return count
    if not isinstance(finding.position, int):
        raise UserError(
            f"--position {finding.position}: with --induce, count from the prompt's end: -1 is "
            "the last token."
        )
    return max(count, -finding.position)


def _first_fluent(
    trials: Sequence[Trial], candidates: Candidates, share: Callable[[Intervention], float]
) -> tuple[float, Trial, mx.array]:
    """The first trial that brings enough fluent refusals about, or the best: (share, trial, (d,)).

    Args:
        share: of harmless prompts that are refused in fluent sentences under an intervention.

    Raises:
        UserError: when even the best brings too few about.
    """
    checked = []
    for one in trials[:VERIFIED]:
        found = one.strength * candidates.difference(one.layer, one.position)
        rate = share(adding(found, one.layer))
        checked.append((rate, one, found))
        if rate >= _ENOUGH:
            break
    rate, best, vector = max(checked, key=lambda each: each[0])
    if rate < _LEAST:
        raise UserError(
            "no constant makes this model refuse in fluent sentences (the best, after layer "
            f"{best.layer}, {rate:.0%} of harmless prompts): choose another --layer or --position."
        )
    return rate, best, vector


def choose(
    chat: ChatModel,
    sets: PromptSets,
    finding: Finding,
    *,
    strength: float = 1.0,
    batch_size: int = 32,
    first_layer: int = 0,
) -> Induction:
    """The constant that makes harmless prompts be refused in fluent sentences.

    The model's own refusals are put behind harmless validation prompts, and every candidate (the
    mean difference of the train prompts at a layer and position, times a multiple) is judged by
    whether the steered model would say them itself: that it opens with a refusal, and that it can
    finish the sentence. The best are verified by replies.

    Args:
        finding: a layer and a position that are taken without a choice, where given.
        strength: scales the constant.
        batch_size: replies generated side by side.
        first_layer: layers before it are left out (llama.cpp steers from layer 1).

    Raises:
        UserError: a model that refuses nothing, a layer or position that is not there, or when no
            constant brings fluent refusals about.
    """

    def encoded(prompts: Sequence[Prompt]) -> list[list[int]]:
        return [chat.encode(prompt) for prompt in prompts]

    harmful = encoded(sets.harmful.validation.prompts[:PROMPTS])
    harmless = encoded(sets.harmless.validation.prompts[:PROMPTS])
    refusals = own_refusals(chat, harmful, batch_size)
    tried = harmless[:TRIED]
    behind = [refusals[i % len(refusals)] for i in range(len(tried))]
    count = _positions(chat, finding)
    candidates = measuring.measure(
        chat,
        encoded(sets.harmful.train.prompts),
        encoded(sets.harmless.train.prompts),
        list(range(-count, 0)),
    )
    cells = _cells(chat, candidates, harmful, harmless, finding, first_layer)
    openings = {reply[0] for reply in refusals}
    trials: list[Trial] = []
    with progress(len(cells), "induce", "candidate") as bar:
        for layer, position in cells:
            trials += _climb(chat, candidates, layer, position, tried, behind, openings)
            bar.update()
    trials.sort(key=lambda one: (-round(one.agreement, 2), -one.likelihood))
    limit = _SURPRISE + surprise(chat, harmful[: len(refusals)], refusals)

    def share(steered: Intervention) -> float:
        return fluent_share(chat, steered, harmless, limit, batch_size)

    rate, best, vector = _first_fluent(trials, candidates, share)
    vector = strength * vector
    if strength != 1:
        rate = share(adding(vector, best.layer))
    summary = {
        "method": "induced refusals",
        "layer": best.layer,
        "position": best.position,
        "multiple": best.strength * strength,
        "length": number(mx.linalg.norm(vector, stream=mx.cpu)),
        "chosen_by": "the model's own refusals becoming its replies to harmless validation prompts",
        "agreement": best.agreement,
        "fluent_refusals": rate,
        "trials": [one.record() for one in trials],
    }
    return Induction(vector, best.layer, summary)


def own_refusals(
    chat: ChatModel, harmful: Sequence[Sequence[int]], batch_size: int = 32
) -> list[list[int]]:
    """How the model refuses harmful prompts: the first tokens of each refusal, its end included.

    Raises:
        UserError: when it refuses none.
    """
    replies = generate(chat, harmful, REPLY, batch_size=batch_size, label="own refusals")
    end = [next(iter(chat.tokenizer.eos_token_ids))]
    found = [
        (reply if len(reply) == REPLY else reply + end)[:OPENING]
        for reply, text in zip(replies, decode(chat, replies), strict=True)
        if classify(text) == Verdict.REFUSAL
    ]
    if not found:
        raise UserError(
            "this model refuses none of the harmful validation prompts, so there is no refusal to "
            "induce: check with `abl-mlx eval`, or give prompts that it refuses (--harmful)."
        )
    return found


def _cells(
    chat: ChatModel,
    candidates: Candidates,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    finding: Finding,
    first_layer: int,
) -> list[tuple[int, int]]:
    """The layers and positions that are tried, best-separating first."""
    if finding.layer is not None and finding.layer != int(finding.layer):
        raise UserError(f"--layer {finding.layer:g}: a constant is added after one whole layer.")
    if finding.layer is not None and finding.layer < first_layer:
        raise UserError(
            f"--layer {finding.layer}: llama.cpp adds no control vector before layer {first_layer}."
        )
    if finding.layer is not None and finding.layer >= candidates.n_layers:
        raise UserError(
            f"--layer {finding.layer}: the model has layers 0 to {candidates.n_layers - 1}."
        )
    scores = selection.separation(chat, candidates, harmful, harmless)
    fits = [
        replace(score, dropped="")
        for score in scores
        if (finding.position is None or score.position == finding.position)
        and (
            score.layer == finding.layer
            if finding.layer is not None
            else first_layer <= score.layer and not score.dropped
        )
    ]
    chosen = selection.shortlist(fits, TRIALS, each=len(candidates.positions))
    return [(score.layer, score.position) for score in chosen]


def _climb(
    chat: ChatModel,
    candidates: Candidates,
    layer: int,
    position: int,
    prompts: Sequence[Sequence[int]],
    behind: Sequence[Sequence[int]],
    openings: set[int],
) -> list[Trial]:
    """The multiples tried for one cell, in rising order, until the score falls."""
    trials: list[Trial] = []
    vector = candidates.difference(layer, position)
    for strength in LADDER:
        with steering(chat, adding(vector, layer, strength)):
            trials.append(Trial(layer, position, strength, *_said(chat, prompts, behind, openings)))
        best = max(trials, key=lambda one: one.likelihood)
        if trials[-1].agreement == 0 and trials[-1].likelihood < best.likelihood - 0.5:
            break
    return trials


def _said(
    chat: ChatModel,
    prompts: Sequence[Sequence[int]],
    behind: Sequence[Sequence[int]],
    openings: set[int],
) -> tuple[float, float]:
    """(agreement, likelihood) of replies that are put behind prompts."""
    sequences = [[*prompt, *reply] for prompt, reply in zip(prompts, behind, strict=True)]
    positions = [
        list(range(len(prompt) - 1, len(prompt) - 1 + len(reply)))
        for prompt, reply in zip(prompts, behind, strict=True)
    ]
    agreement = likelihood = 0.0
    for index, rows in log_probabilities(chat, sequences, positions, label="induce"):
        reply = mx.array(list(behind[index]))
        said = mx.argmax(rows, axis=-1)
        opens = int(number(said[0])) in openings
        rest = (said[1:] == reply[1:]).astype(mx.float32)
        agreement += opens * (number(rest.mean()) if len(reply) > 1 else 1.0)
        nats = number(mx.take_along_axis(rows, reply[:, None], axis=1).mean())
        if math.isnan(nats):
            return 0.0, -math.inf
        likelihood += nats
    return agreement / len(prompts), likelihood / len(prompts)


def surprise(
    chat: ChatModel, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]
) -> float:
    """Mean −log p, nats a token, of replies under the model as it is, the first token left out."""
    values = surprises(chat, prompts, replies)
    return sum(values) / len(values)


def surprises(
    chat: ChatModel, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]
) -> list[float]:
    """The same of each reply; 0 for replies of fewer than two tokens."""
    found = [0.0] * len(replies)
    long = [index for index, reply in enumerate(replies) if len(reply) > 1]
    if not long:
        return found
    sequences = [[*prompts[index], *replies[index]] for index in long]
    positions = [
        list(range(len(prompts[index]), len(prompts[index]) + len(replies[index]) - 1))
        for index in long
    ]
    for which, rows in log_probabilities(chat, sequences, positions, label="fluency"):
        reply = mx.array(list(replies[long[which]][1:]))
        found[long[which]] = -number(mx.take_along_axis(rows, reply[:, None], axis=1).mean())
    return found


def fluent_share(
    chat: ChatModel,
    steered: Intervention,
    prompts: Sequence[Sequence[int]],
    limit: float,
    batch_size: int = 32,
) -> float:
    """The share of prompts that get a refusal which surprises the unsteered model by at most
    ``limit`` nats a token."""
    with steering(chat, steered):
        replies = generate(chat, prompts, REPLY, batch_size=batch_size, label="induced replies")
    refused = [classify(text) == Verdict.REFUSAL for text in decode(chat, replies)]
    fluent = [value <= limit for value in surprises(chat, prompts, replies)]
    return sum(map(min, refused, fluent)) / len(prompts)
