"""Strengths of each layer learned by gradients, with ``--learn-strengths``.

What is minimized over the strengths s of each layer's attention and MLP, held to [0, `STRONGEST`],
is KL(model ‖ edited) of harmless prompts, plus what the refusal scores of harmful prompts are above
a ceiling:

    mean KL(s) + PRICE · mean max(0, score(s) − ceiling)

Both parts are of the first reply token, and differentiable. The ceiling of a prompt is `CEILING`,
or its score at strength 1 if that is higher and the edit ends refusals. So the second part is an
exact penalty: it is 0 where every prompt is far enough from opening with a refusal, and then only
the KL is lowered, until a few prompts touch their ceilings. Steps are Adam's (Kingma & Ba 2015,
arXiv 1412.6980), each from a few prompts of each set, and projected on the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from abl_mlx.directions.slopes import COMPONENTS
from abl_mlx.directions.trial import Effect, Trial
from abl_mlx.directions.trimming import LESS, STRONGEST, tried
from abl_mlx.edits.weight_edit import LayeredEdit
from abl_mlx.support.console import progress, say
from convert.base.errors import UserError

#: The number of harmful and of harmless prompts in one step.
PROMPTS = 14

#: Nats of KL that a nat of refusal score above the ceiling counts.
PRICE = 1.0

#: The refusal score, in nats, below which a prompt counts nothing: refusal openings have 12%.
CEILING = -2.0

#: The length of the first steps; it falls to a tenth of that.
RATE = 0.12

#: Decay of Adam's means of gradients and of their squares.
BETAS = (0.9, 0.99)

#: Shares of the way from strength 1 to the learned strengths that are tried, one after the other.
SHARES = (1.0, 0.7, 0.4)


@dataclass(frozen=True)
class Learned:
    """An edit with learned strengths, and its effect on all validation prompts.

    Attributes:
        edit: the edit.
        effect: its effect.
        forward, backward: the tokens that it took.
    """

    edit: LayeredEdit
    effect: Effect
    forward: int
    backward: int


@dataclass
class Adam:
    """Adam's steps for an array of numbers between bounds.

    Attributes:
        values: the numbers.
        mean, square: running means of the gradients and of their squares.
        steps: how many steps were made.
    """

    values: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    steps: int = 0

    @classmethod
    def at(cls, values: np.ndarray) -> Adam:
        """The state before the first step."""
        return cls(values.copy(), np.zeros_like(values), np.zeros_like(values))

    def step(self, gradient: np.ndarray, rate: float, low: float, high: float) -> None:
        """Go against a gradient by about ``rate``, and back into the bounds."""
        first, second = BETAS
        self.steps += 1
        self.mean = first * self.mean + (1 - first) * gradient
        self.square = second * self.square + (1 - second) * gradient**2
        mean = self.mean / (1 - first**self.steps)
        size = np.sqrt(self.square / (1 - second**self.steps))
        moved = self.values - rate * mean / (size + 1e-12)
        self.values = np.clip(moved, low, high)


def learned(
    trial: Trial, edit: LayeredEdit, layers: int, steps: int, before: Effect
) -> Learned | None:
    """The edit with learned strengths, if these are better than strength 1; else None.

    They are better if no more prompts open with a refusal than may, and the KL is lower; or, where
    the edit leaves refusals, if fewer do and the KL is not over twice as high.

    Args:
        trial: tries edits.
        edit: the edit, whose strength is 1 everywhere.
        layers: L, the number of the model's layers.
        steps: how many steps are made.
        before: its effect on all validation prompts.

    Raises:
        UserError: when a module of the model has no gradient.
    """
    forward, backward = trial.tokens, trial.backward
    refused, kl = before.refused, before.kl
    works = refused <= trial.left
    ceilings = [max(CEILING, score) if works else CEILING for score in before.scores]
    state = Adam.at(np.ones((len(COMPONENTS), layers)))
    with progress(steps, "learn strengths", "step") as bar:
        for number in range(steps):
            found = trial.slopes(edit, state.values, PROMPTS, number * PROMPTS, ceilings)
            if found is None:
                raise UserError(
                    "--learn-strengths: a module of this model has no gradient here (experts on a "
                    "CPU, for one): leave the flag out."
                )
            rate = RATE * (1 - 0.9 * number / max(1, steps - 1))
            state.step(found.of_kl + PRICE * found.of_refusal, rate, 0.0, STRONGEST)
            bar.update()
    best = None
    for share in SHARES:
        other, effect = tried(trial, edit, 1 + share * (state.values - 1))
        if works:
            better = effect.refused <= max(refused, trial.left) and effect.kl <= LESS * kl
        else:
            better = effect.refused < refused and effect.kl <= 2 * kl
        if better:
            best = Learned(other, effect, trial.tokens - forward, trial.backward - backward)
            break
    say(
        f"  strengths learned in {steps} steps: KL {effect.kl:.4f} instead of {kl:.4f}, "
        f"{effect.refused:.0%} instead of {refused:.0%} opening as refusals; "
        f"{trial.tokens - forward:,} forward and {trial.backward - backward:,} backward tokens"
        + ("" if best else "; this is no better, so strength 1 stays")
    )
    return best
