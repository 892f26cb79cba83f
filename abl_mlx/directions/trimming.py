"""Strengths for each layer with which an edit ends refusals at a lower KL.

Removing a direction at strength 1 from every writer costs more than it has to: some writers hardly
add to the refusal and still move harmless prompts, others do the opposite. The gradients of both
with respect to the strength of each layer's attention and MLP tell which are which.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from abl_mlx.directions.slopes import COMPONENTS, Slopes
from abl_mlx.directions.trial import Effect, Trial
from abl_mlx.directions.variants import Tried
from abl_mlx.edits.weight_edit import LayeredEdit
from abl_mlx.support.console import progress, say

#: A KL in nats below which there is nothing to gain.
GENTLE = 0.01

#: The number of harmful and of harmless prompts whose gradients are taken.
PROMPTS = 8

#: The largest changes of a strength, step by step.
RADII = (0.5, 0.3)

#: The largest strength in a layer. Beyond 1 the component changes its sign, beyond 2 it grows.
STRONGEST = 2.0

#: What the refusal score is to fall by, in nats, where an edit leaves refusals.
FURTHER = 0.5

#: The largest share of the KL that may be left for the strengths to be taken.
LESS = 0.95

#: Where that takes the KL beyond its limit, how far towards the limit the strengths go instead.
NEARLY = 0.9


@dataclass(frozen=True)
class Trimmed:
    """An edit with a strength for each layer, and its effect on all validation prompts."""

    edit: LayeredEdit
    effect: Effect


def trimmed(
    trial: Trial, edit: LayeredEdit, layers: int, before: Tried, limit: float
) -> Trimmed | None:
    """The edit with other strengths, if these are better; else None.

    They are better if no more prompts open with a refusal and the KL is lower. Where the edit
    leaves refusals, they are better if the KL is within its limit and fewer prompts open with a
    refusal, or as many at a lower refusal score.

    Args:
        trial: tries edits.
        edit: the edit, whose strength is 1 everywhere.
        layers: L, the number of the model's layers.
        before: its effect on all validation prompts.
        limit: of the KL, in nats.
    """
    refused, kl = before.refused, before.kl
    works = refused <= trial.left
    if works and kl <= GENTLE:
        return None
    strengths = np.ones((len(COMPONENTS), layers))
    hardest = trial.moved  # the mean KL is made by a few prompts
    aim: float | None = None
    begun = trial.tokens
    with progress(len(RADII) + 1, "strengths by layer", "step") as bar:
        for radius in RADII:
            found = trial.slopes(edit, strengths, PROMPTS, harmless=hardest)
            if found is None:
                say(
                    "  strengths of each layer stay as they are: others are found by gradients, "
                    "which a streamed model does not have, nor some architectures"
                )
                return None
            if aim is None:
                aim = found.refusal - (0 if works else FURTHER)
            strengths = stepped(found, strengths, aim - found.refusal, radius)
            bar.update()
        other, effect = tried(trial, edit, strengths)
        if not works and effect.kl > limit > kl:
            share = NEARLY * (limit - kl) / (effect.kl - kl)
            other, effect = tried(trial, edit, 1 + share * (strengths - 1))
        bar.update()
    say(
        f"  with a strength for each layer: KL {effect.kl:.3f} instead of {kl:.3f}, "
        f"{effect.refused:.0%} instead of {refused:.0%} opening as refusals; "
        f"{trial.tokens - begun:,} forward tokens"
    )
    if works:
        better = effect.refused <= refused and effect.kl <= LESS * kl
    else:
        fewer = (effect.refused, effect.refusal) < (refused, before.refusal)
        better = fewer and effect.kl <= limit
    return Trimmed(other, effect) if better else None


def tried(trial: Trial, edit: LayeredEdit, strengths: np.ndarray) -> tuple[LayeredEdit, Effect]:
    """The edit with these strengths, (2, L), and its effect on all validation prompts."""
    other = with_strengths(edit, strengths)
    return other, trial.of_edit(other)


def with_strengths(edit: LayeredEdit, strengths: np.ndarray) -> LayeredEdit:
    """The edit with these strengths, (2, L), of each layer's attention and MLP."""
    return edit.with_profile(
        {name: row.tolist() for name, row in zip(COMPONENTS, strengths, strict=True)}
    )


def stepped(slopes: Slopes, strengths: np.ndarray, change: float, radius: float) -> np.ndarray:
    """Strengths with a lower KL at a refusal score that changes by ``change``, to first order.

    The step goes against g + λ f, g and f being the slopes of KL and refusal score, with the
    smallest λ for which the score changes as wanted: where a strength buys as much refusal for its
    KL as others, it stays. The largest fifth of the changes are cut down to ``radius``.

    Args:
        slopes: at these strengths.
        strengths: (2, L).
        change: the wanted change of the refusal score, in nats.
        radius: the largest change of a strength.
    """
    f, g = slopes.of_refusal, slopes.of_kl
    unit = np.abs(g).mean() / max(float(np.abs(f).mean()), 1e-12)

    def moved(weight: float) -> np.ndarray:
        against = -(g + weight * unit * f)
        sizes = np.abs(against[against != 0])  # some strengths may have nothing to multiply
        largest = max(float(np.quantile(sizes, 0.8)), 1e-12) if len(sizes) else 1.0
        change = radius * np.clip(against / largest, -1, 1)
        return np.clip(strengths + change, 0, STRONGEST)

    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        if (f * (moved(middle) - strengths)).sum() <= change:
            high = middle
        else:
            low = middle
    return moved(high)
