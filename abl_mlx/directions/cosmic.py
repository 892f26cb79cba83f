"""Choosing a direction by cosine similarities of states, without looking at replies.

Siu et al. 2025, "COSMIC: Generalized Refusal Direction Identification in LLM Activations" (arXiv
2506.00085): the best candidate makes harmful prompts look like harmless ones when it is ablated,
and harmless prompts like harmful ones when it is added. With h and g the mean states of harmful and
harmless prompts at the last token, over the tenth of the layers where their cosine is lowest,

    S = cos(h under ablation, g) + cos(g under addition, h).

As in the paper candidates of the last fifth of the layers are left out, and those whose ablation
moves harmless prompts beyond a limit of the KL. Here only the candidates that separate the sets
best are tried, as in the choice by first tokens.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import numpy as np

from abl_mlx.directions.choice import MOST, addition
from abl_mlx.directions.effects import Chosen, Measured
from abl_mlx.directions.estimators import Array
from abl_mlx.directions.selection import Score, shortlist
from abl_mlx.edits.steering import ablation, steering
from abl_mlx.models import capture
from abl_mlx.models.distributions import kl_divergence
from abl_mlx.models.logits import first_reply_token
from abl_mlx.support.arrays import number, numpy_of
from abl_mlx.support.console import progress
from convert.base.errors import UserError


def cosine(first: Array, second: Array) -> float:
    """cos of two vectors (d,), in float64."""
    a, b = (np.asarray(one, np.float64) for one in (first, second))
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-300))


def apart(harmful: Array, harmless: Array, share: float) -> list[int]:
    """The layers in which the mean states (L, d) of the sets are least alike, at least one.

    Args:
        harmful, harmless: the mean states.
        share: of the layers.
    """
    alike = [cosine(a, b) for a, b in zip(harmful, harmless, strict=True)]
    count = max(1, round(share * len(alike)))
    return sorted(np.argsort(alike)[:count].tolist())


def inversion(ablated: Array, added: Array, harmful: Array, harmless: Array) -> float:
    """S of a candidate, −2 to 2, from mean states over prompts in some layers, (E, d) each.

    Args:
        ablated: of harmful prompts with the candidate ablated.
        added: of harmless prompts with it added.
        harmful, harmless: of both sets without a change.
    """
    means = [np.asarray(one, np.float64).mean(axis=0) for one in (ablated, added)]
    aims = [np.asarray(one, np.float64).mean(axis=0) for one in (harmless, harmful)]
    return cosine(means[0], aims[0]) + cosine(means[1], aims[1])


def chosen(measured: Measured, *, share: float, prompts: int) -> Chosen:
    """The candidate with the largest S whose KL is within the limit.

    Args:
        measured: the model and its candidates.
        share: of the layers whose states are compared.
        prompts: the number of validation prompts of each set.

    Raises:
        UserError: when every candidate that was tried has a larger KL.
    """
    chat, tokens = measured.chat, 0
    harmful, harmless = (measured.validation[name][:prompts] for name in ("harmful", "harmless"))

    def means(asked: list[list[int]], context: AbstractContextManager[None]) -> Array:
        """Mean states (L, d) at the last token, within a context."""
        nonlocal tokens
        tokens += sum(map(len, asked))
        with context:
            return numpy_of(capture.mean(chat, asked, [-1], label="cosines")[:, 0])

    bad, good = (means(asked, nullcontext()) for asked in (harmful, harmless))
    layers = apart(bad, good, share)
    sums = np.full(measured.candidates.harmful_mean.shape[:2], np.nan, np.float32)
    some = shortlist(measured.scores, MOST)
    with progress(len(some), "cosines", "direction") as bar:
        for score in some:
            edit = measured.edit_for(measured.candidates.at(score.layer, score.position))
            ablated = means(harmful, ablation(measured.writers, edit))
            added = means(harmless, steering(chat, addition(measured.candidates, score)))
            at = score.layer, measured.candidates.positions.index(score.position)
            sums[at] = inversion(ablated[layers], added[layers], bad[layers], good[layers])
            bar.update()

    def s_of(score: Score) -> float:
        return float(sums[score.layer, measured.candidates.positions.index(score.position)])

    base, lowest = first_reply_token(chat, harmless), math.inf
    for score in sorted(some, key=s_of, reverse=True):
        edit = measured.edit_for(measured.candidates.at(score.layer, score.position))
        with ablation(measured.writers, edit):
            kl = number(kl_divergence(base, first_reply_token(chat, harmless)).mean())
        tokens += sum(map(len, harmless))
        lowest = min(lowest, kl)
        if kl <= measured.max_kl:
            by = "largest sum of cosine similarities of ablated and added states, of validation "
            return Chosen(score, f"{by}prompts", {"cosmic": mx.array(sums)}, tokens)
    raise UserError(
        f"every direction that was tried moves harmless prompts by more than --max-kl "
        f"{measured.max_kl:g} (the gentlest by {lowest:.3f}): raise --max-kl, or choose with "
        "--layer and --position."
    )
