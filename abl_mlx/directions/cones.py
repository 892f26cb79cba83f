"""Refusal direction optimization: directions found by gradients through the model.

Wollschläger et al. 2025, "The Geometry of Refusal in Large Language Models: Concept Cones and
Representational Independence" (arXiv 2502.17420): a direction, or the orthonormal basis of a cone,
is optimized so that its ablation ends refusals, its addition causes them, and its ablation leaves
replies to harmless prompts as they are. The loss is

    L = λ_ablation L_ablation + λ_addition L_addition + λ_retain L_retain

with the paper's weights 1, 0.2 and 1, and every step is followed by a projection to unit length. As
in the paper the targets of L_ablation are the first tokens of replies with the directions of the
start ablated, L_retain is the KL over the first tokens of the model's own replies, the addition is
made after one layer, in the length of the difference of means there, and for a cone it takes random
points of the cone. Three things differ. Where the start leaves a refusal there is no target, and
L_ablation is −log(1 − p), p being the probability of the model's refusal openings at the first
token. L_addition is −log p, so that no refusal has to be generated. And of a cone the whole span is
ablated, because that is the edit that is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.directions import estimators
from abl_mlx.directions.differentiable import ablated, added, orthonormal
from abl_mlx.directions.effects import Measured, Refined
from abl_mlx.directions.selection import opening_nats, refusal_scores
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.steering import ablation as ablated_plainly
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.distributions import kl_divergence
from abl_mlx.models.generation import generate
from abl_mlx.models.logits import first_reply_token, log_probabilities
from abl_mlx.models.prefix import Prefix
from abl_mlx.models.shortcuts import passes, trusted
from abl_mlx.models.writers import Writer
from abl_mlx.support.arrays import let_go, number, numbers, numpy_of
from abl_mlx.support.console import progress
from convert.base.errors import UserError
from convert.mlx.packed import gradients

# Prompts of one pass. What a backward pass needs of each layer is in memory until it has run.
_TOGETHER = 4


@dataclass(frozen=True)
class Begun:
    """A prompt with the first tokens of a reply.

    Attributes:
        prompt: the encoded prompt.
        reply: the tokens, of which the last is only predicted; none where no reply is wanted.
        base: log-probabilities of the unedited model at these tokens, (T, V); empty if not needed.
    """

    prompt: list[int]
    reply: list[int]
    base: mx.array = field(default_factory=lambda: mx.zeros((0, 0)))

    @property
    def tokens(self) -> list[int]:
        """What the model reads."""
        return [*self.prompt, *self.reply[:-1]]

    @property
    def places(self) -> list[int]:
        """The positions before the reply's tokens."""
        return list(range(len(self.prompt) - 1, len(self.tokens)))


@dataclass(frozen=True)
class Losses:
    """The three losses, in nats, and the gradient of their weighted sum, (k, d)."""

    ablation: float
    addition: float
    retain: float
    gradient: np.ndarray


@dataclass(frozen=True)
class Weights:
    """λ of each loss."""

    ablation: float
    addition: float
    retain: float


class Objective:
    """The loss of directions on a few prompts.

    Attributes:
        forward, backward: the numbers of tokens that were run.
    """

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        openings: Sequence[int],
        weights: Weights,
        layer: int,
        length: float,
    ):
        """Keep what all prompts share.

        Args:
            chat: the model.
            writers: its residual writers.
            openings: the tokens that open refusals.
            weights: λ.
            layer: the layer after which a direction is added.
            length: the length of what is added.
        """
        self._chat, self._writers = chat, writers
        self._openings, self._weights = mx.array(list(openings)), weights
        self._layer, self._length = layer, length
        self.forward = self.backward = 0

    def __call__(
        self,
        rows: np.ndarray,
        shares: np.ndarray,
        harmful: Sequence[Begun],
        harmless: Sequence[Begun],
    ) -> Losses:
        """The losses of directions (k, d).

        Args:
            rows: the directions.
            shares: (k,), the point of the cone that is added.
            harmful: prompts, with the replies that are wanted.
            harmless: prompts, with the beginnings of the model's own replies.
        """
        weights = self._weights
        asked = [one.prompt for one in harmless]

        def ablation(given: mx.array, start: int) -> mx.array:
            some = harmful[start : start + _TOGETHER]
            with ablated(self._writers, given):
                found = self._rows([one.tokens for one in some], [one.places for one in some])
            return mx.stack(
                [self._cost(one, row) for one, row in zip(some, found, strict=True)]
            ).sum()

        def addition(given: mx.array, start: int) -> mx.array:
            point = (mx.array(shares.astype(np.float32))[:, None] * orthonormal(given)).sum(axis=0)
            with added(self._chat, self._length * point, self._layer):
                return -self._opening(asked[start : start + _TOGETHER]).sum()

        def retain(given: mx.array, start: int) -> mx.array:
            some = harmless[start : start + _TOGETHER]
            with ablated(self._writers, given):
                found = self._rows([one.tokens for one in some], [one.places for one in some])
            kls = [
                kl_divergence(one.base, row).mean() for one, row in zip(some, found, strict=True)
            ]
            return mx.stack(kls).sum()

        values = []
        gradient = np.zeros(rows.shape)
        for loss, weight, prompts in (
            (ablation, weights.ablation, [one.tokens for one in harmful]),
            (addition, weights.addition, asked),
            (retain, weights.retain, [one.tokens for one in harmless]),
        ):
            value, slope = self._summed(loss, rows, prompts)
            values.append(value)
            gradient += weight * slope
        return Losses(values[0], values[1], values[2], gradient)

    def _summed(
        self,
        loss: Callable[[mx.array, int], mx.array],
        rows: np.ndarray,
        prompts: Sequence[Sequence[int]],
    ) -> tuple[float, np.ndarray]:
        """The mean of a loss over prompts, and its gradient."""
        value, slope = 0.0, np.zeros(rows.shape)
        for start in range(0, len(prompts), _TOGETHER):
            try:
                with gradients():
                    of, by = mx.value_and_grad(loss)(mx.array(rows.astype(np.float32)), start)
                    mx.eval(of, by)
            except (NotImplementedError, RuntimeError, ValueError) as error:
                raise UserError(
                    "--method rdo needs gradients, and a module of this model has none on this "
                    f"machine ({' '.join(str(error).split())[:120]}): choose another method."
                ) from None
            value += number(of) / len(prompts)
            slope += numpy_of(by) / len(prompts)
            del of, by
        tokens = sum(map(len, prompts))
        self.forward += tokens
        self.backward += tokens
        return value, slope

    def _cost(self, one: Begun, row: mx.array) -> mx.array:
        """What a reply costs with log-probabilities (T, V) of its first tokens."""
        if one.reply:
            return -mx.take_along_axis(row, mx.array(one.reply)[:, None], axis=1).mean()
        return -opening_nats(row[0], self._openings)[1]

    def _opening(self, prompts: Sequence[Sequence[int]]) -> mx.array:
        """log p of the refusal openings at the first reply token: (B,)."""
        rows = self._rows(prompts, [[len(one) - 1] for one in prompts])
        return mx.stack([opening_nats(row[0], self._openings)[0] for row in rows])

    def _rows(
        self, prompts: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
    ) -> list[mx.array]:
        how = trusted(self._chat, prompts)
        nothing = Prefix(self._chat, [], cached=how.cached)
        rows = dict(passes(self._chat, prompts, places, how, nothing))
        return [rows[index] for index in range(len(prompts))]


def optimized(
    measured: Measured,
    layer: int,
    position: int,
    *,
    steps: int,
    batch: int,
    rate: float,
    prompts: int,
    reply_tokens: int,
    ablation: float,
    addition: float,
    retain: float,
) -> Refined:
    """Directions that end refusals and leave harmless replies, from the difference of means on.

    Args:
        measured: the model and its candidates.
        layer, position: the candidate to begin with, after whose layer directions are added.
        steps: the number of steps of Adam.
        batch: the number of prompts of each set in a step.
        rate: the step length, per dimension, of a unit vector of 1,024 dimensions; it falls to 0.
        prompts: the number of train prompts of each set.
        reply_tokens: the number of tokens of harmless replies that are to stay.
        ablation, addition, retain: λ of each loss.

    Raises:
        UserError: where a module of the model has no gradient.
    """
    trial = measured.trial()
    rows = _start(measured, layer, position)
    harmful, harmless = _train(measured, rows, prompts, reply_tokens)
    difference = measured.candidates.difference(layer, position)
    objective = Objective(
        measured.chat, measured.writers, trial.refusal_tokens,
        Weights(ablation, addition, retain), layer,
        number(mx.sqrt((difference * difference).sum())),
    )  # fmt: skip
    largest = rate * (1024 / rows.shape[1]) ** 0.5
    adam = optim.Adam(optim.linear_schedule(largest, 0.0, steps), [0.9, 0.98], bias_correction=True)
    generator, losses = np.random.default_rng(0), []
    let_go()
    with progress(steps, "gradients", "step") as bar:
        for step in range(steps):
            at = range(step * batch, (step + 1) * batch)
            shares = np.abs(generator.normal(size=len(rows)))
            losses.append(
                objective(
                    rows,
                    shares / np.linalg.norm(shares),
                    [harmful[n % len(harmful)] for n in at],
                    [harmless[n % len(harmless)] for n in at],
                )
            )
            gradient = mx.array(losses[-1].gradient.astype(np.float32))
            moved = adam.apply_gradients({"rows": gradient}, {"rows": mx.array(rows)})
            rows, _ = estimators.orthonormal(numpy_of(moved["rows"]).astype(np.float64))
            bar.update()
    trial.tokens += objective.forward
    trial.backward += objective.backward
    last = losses[-max(1, steps // 4) :]
    return Refined(
        mx.array(rows.astype(np.float32)),
        f"gradients of refusals and harmless replies, {steps} steps",
        {
            f"{name}_loss": float(np.mean([getattr(one, name) for one in last]))
            for name in ("ablation", "addition", "retain")
        },
    )


def _start(measured: Measured, layer: int, position: int) -> np.ndarray:
    """Orthonormal rows (k, d): the difference of means first, then what all layers have beside.

    Raises:
        UserError: when there are too few layers for so many rows.
    """
    candidates, most = measured.candidates, len(measured.chat.layers) + 1
    if measured.rank > most:
        raise UserError(
            f"--method rdo --rank {measured.rank}: a cone begins with one direction, and one more "
            f"for each layer; choose at most {most}."
        )
    rows = [numpy_of(candidates.difference(layer, position)).astype(np.float64)]
    if measured.rank > 1:
        rows += list(numpy_of(candidates.across_layers(position, measured.rank - 1)))
    generator = np.random.default_rng(1)
    noise = generator.normal(size=(len(rows), len(rows[0]))) / len(rows[0])
    # A little noise keeps rows that lie in one another's span apart.
    noise[0] = 0
    return estimators.orthonormal(estimators.unit(np.stack(rows)) + noise)[0]


def _train(
    measured: Measured, rows: np.ndarray, most: int, reply_tokens: int
) -> tuple[list[Begun], list[Begun]]:
    """Harmful prompts that are refused, and harmless ones that are not, with replies' beginnings.

    Args:
        measured: the model.
        rows: the directions with which targets are made.
        most: the number of prompts of each set to take these from.
        reply_tokens: the number of tokens of a beginning.
    """
    chat, trial = measured.chat, measured.trial()
    refused, answered = (measured.train[name][:most] for name in ("harmful", "harmless"))
    scores = [
        numbers(refusal_scores(first_reply_token(chat, some), trial.refusal_tokens))
        for some in (refused, answered)
    ]
    asked = [one for one, score in zip(refused, scores[0], strict=True) if score > 0] or refused
    kept = [one for one, score in zip(answered, scores[1], strict=True) if score < 0] or answered
    with ablated_plainly(measured.writers, Edit(mx.array(rows.astype(np.float32)))):
        targets = generate(chat, asked, reply_tokens, label="targets")
    replies = generate(chat, kept, reply_tokens, label="harmless replies")
    verdicts = [classify(text) for text in evaluate.decode(chat, targets)]
    harmful = [
        Begun(one, target if verdict is Verdict.ANSWER else [])
        for one, target, verdict in zip(asked, targets, verdicts, strict=True)
    ]
    harmless = [Begun(one, reply) for one, reply in zip(kept, replies, strict=True)]
    read = [one.tokens for one in harmless]
    base = dict(log_probabilities(chat, read, [one.places for one in harmless]))
    mx.eval(base)
    trial.tokens += sum(map(len, [*refused, *answered, *asked, *targets, *read, *read]))
    return harmful, [replace(one, base=base[index]) for index, one in enumerate(harmless)]
