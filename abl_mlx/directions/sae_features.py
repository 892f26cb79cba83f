"""Ranking the features of a sparse autoencoder by how they tell two sets of prompts apart.

As in O'Brien et al. 2024 (arXiv 2411.11296) and Yeo et al. 2025 (arXiv 2505.23556), refusal is
looked for in features that are active on harmful prompts and not on harmless ones. Features are
ranked on train prompts, and the figures that are shown are those of validation prompts, because the
largest of thousands of noisy figures is too large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from abl_mlx.behaviour import separation

Array = np.ndarray


@dataclass(frozen=True)
class Separation:
    """How far the activations of a feature on two sets of prompts are apart.

    Attributes:
        difference: d, the difference of mean activation over the pooled deviation.
        error: the standard error of d.
        auc: the probability that the activation on a harmful prompt is above that on a harmless
            one, equal ones counting half.
        interval: the 95% interval of the AUC.
        active: the shares of harmful and of harmless prompts on which it is above 0.
    """

    difference: float
    error: float
    auc: float
    interval: tuple[float, float]
    active: tuple[float, float]


def differences(harmful: Array, harmless: Array) -> Array:
    """d of every feature, (N, F), (M, F) -> (F,): (mean_H − mean_G) / √((s²_H + s²_G) / 2).

    s² are variances over prompts with N − 1 and M − 1. A deviation below a millionth of the
    feature's largest activation counts as that, so that d is finite; a feature that is never active
    has d = 0.
    """
    high, low = np.asarray(harmful, np.float64), np.asarray(harmless, np.float64)
    spread = np.sqrt((_variance(high) + _variance(low)) / 2)
    least = 1e-6 * np.maximum(np.abs(high).max(axis=0), np.abs(low).max(axis=0))
    return (high.mean(axis=0) - low.mean(axis=0)) / np.maximum(np.maximum(spread, least), 1e-300)


def error(difference: float, n: int, m: int) -> float:
    """The standard error of d from groups of n and m: √((n + m) / nm + d² / 2(n + m)).

    It is the large-sample error for normal values (Hedges & Olkin 1985, "Statistical Methods for
    Meta-Analysis", chapter 5). Activations are not normal, so it is an indication.
    """
    return math.sqrt((n + m) / (n * m) + difference**2 / (2 * (n + m)))


def separation_of(harmful: Array, harmless: Array) -> Separation:
    """The separation of one feature, (N,), (M,)."""
    n, m = len(harmful), len(harmless)
    (difference,) = differences(harmful[:, None], harmless[:, None])
    area = separation.auc(harmful, harmless)
    return Separation(
        float(difference),
        error(float(difference), n, m),
        area,
        separation.auc_interval(area, n, m),
        (float((harmful > 0).mean()), float((harmless > 0).mean())),
    )


def ranked(harmful: Array, harmless: Array, most: int) -> Sequence[int]:
    """The features with the largest positive d, at most ``most`` of them, the largest first.

    Args:
        harmful, harmless: activations, (N, F) and (M, F).
    """
    found = differences(harmful, harmless)
    order = np.argsort(-found, kind="stable")[:most]
    return [int(feature) for feature in order if found[feature] > 0]


def _variance(values: Array) -> Array:
    return values.var(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
