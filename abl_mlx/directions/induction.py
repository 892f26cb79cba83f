"""Inducing refusals: choosing a vector whose addition makes a model refuse everything.

A multiple of the difference of means is added to the residual stream after one layer, at every
token, which turns answers into refusals (docs/architecture.md, "Induce"). Multiplying the component
along the refusal direction would not do so, because it only amplifies an existing component. The
layer, the token position and the multiple are chosen by their effect.
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
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import EncodedSets
from abl_mlx.models.logits import log_probabilities
from abl_mlx.support.arrays import number
from abl_mlx.support.console import progress
from convert.base.errors import UserError

#: Multiples of the difference of means that are tried.
LADDER = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

#: How many pairs of layer and position are tried, and on how many harmless validation prompts each.
TRIALS, TRIED = 24, 8

#: How many validation prompts of each set verify the choice.
PROMPTS = 16

#: How many tokens of the model's own refusals are used, and of the replies that verify a choice.
OPENING, REPLY = 16, 32

#: How many settings are verified by generating replies, the best first.
VERIFIED = 4

# By how many nats per token the surprise of the unsteered model at an induced refusal may exceed
# that at its own refusals. With more, the text is no longer fluent.
_SURPRISE = 1.0

# Shares of validation prompts refused in fluent sentences: enough to stop the search, and the least
# that is accepted.
_ENOUGH, _LEAST = 0.95, 0.5


@dataclass(frozen=True)
class Trial:
    """The effect of one vector on harmless prompts that are followed by given refusals.

    Attributes:
        layer, position: the layer and token position of the difference of means; the vector is
            added after that layer.
        strength: the multiple of the difference.
        agreement: the share of the refusal's tokens that the steered model itself would generate,
            counted as 0 where it would not open with a refusal; the mean over prompts. 1 means a
            fluent refusal of every prompt.
        likelihood: mean log-probability of these tokens, in nats.
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
    """How many positions are measured, counted back from the prompt's end.

    Raises:
        UserError: when the position in ``finding`` is not a number.
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
    """The first trial that causes enough fluent refusals, or else the best one.

    Args:
        trials: the best first.
        candidates: the measured differences of means.
        share: the share of harmless prompts that are refused in fluent sentences under an
            intervention.

    Returns:
        That share, the trial, and its vector (d,).

    Raises:
        UserError: when even the best trial causes too few fluent refusals.
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
    sets: EncodedSets,
    finding: Finding,
    *,
    strength: float = 1.0,
    batch_size: int = 32,
    first_layer: int = 0,
) -> Induction:
    """Choose the vector whose addition makes the model refuse harmless prompts in fluent sentences.

    The model's own refusals are appended to harmless validation prompts. Each candidate (the
    difference of means over the train prompts at a layer and position, times a multiple) is judged
    by whether the steered model itself would generate them: whether it opens with a refusal and can
    finish the sentence. The best candidates are verified by generating replies.

    Args:
        chat: the model.
        sets: the prompts, behind what replies open with.
        finding: a layer and a position that are used without a choice, if given.
        strength: a factor of the vector.
        batch_size: how many replies are generated at the same time.
        first_layer: earlier layers are not tried (llama.cpp steers from layer 1 on).

    Raises:
        UserError: when the model refuses nothing, there is no such layer or position, or no vector
            causes fluent refusals.
    """

    harmful = sets.validation["harmful"].tokens[:PROMPTS]
    harmless = sets.validation["harmless"].tokens[:PROMPTS]
    refusals = own_refusals(chat, harmful, batch_size)
    tried = harmless[:TRIED]
    behind = [refusals[i % len(refusals)] for i in range(len(tried))]
    count = _positions(chat, finding)
    candidates = measuring.measure(
        chat,
        sets.train["harmful"].tokens,
        sets.train["harmless"].tokens,
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
    """The first `OPENING` tokens of the model's refusals of harmful prompts, their end included.

    Raises:
        UserError: when it refuses none of the prompts.
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
    """The pairs of layer and position to try, those that separate the sets best first.

    Raises:
        UserError: when the layer in ``finding`` does not exist or cannot be used.
    """
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
    """Trials of one layer and position with rising multiples, until the score falls."""
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
    """(agreement, likelihood), as in `Trial`, of given replies to prompts."""
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
    """The mean of `surprises`, in nats per token."""
    values = surprises(chat, prompts, replies)
    return sum(values) / len(values)


def surprises(
    chat: ChatModel, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]
) -> list[float]:
    """Mean −log p per token of each reply without its first token, in nats, under the plain model.

    It is 0 for replies of fewer than two tokens.
    """
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
    """The share of prompts to which the steered model replies with a fluent refusal.

    A refusal is fluent if it surprises the unsteered model by at most ``limit`` nats per token.
    """
    with steering(chat, steered):
        replies = generate(chat, prompts, REPLY, batch_size=batch_size, label="induced replies")
    refused = [classify(text) == Verdict.REFUSAL for text in decode(chat, replies)]
    fluent = [value <= limit for value in surprises(chat, prompts, replies)]
    return sum(map(min, refused, fluent)) / len(prompts)
