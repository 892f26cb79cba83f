"""Iterative null-space projection: classifiers of harmful states, each in what the last one left.

Ravfogel et al. 2020 (INLP, arXiv 2004.07667), applied to refusals by Rocchetti & Ferrara 2026,
"Refusal Beyond a Single Direction" (arXiv 2606.13720): a linear classifier is fitted, its direction
is projected out of the states, and the next classifier is fitted to what is left. That paper finds
that projecting the states on the null space of the directions removes refusals less well than
counterfactual flipping, which reverses the components along them (Ravfogel et al. 2021, AlterRep,
arXiv 2105.06965). In weights the components are reversed by an edit of strength 2. It reverses them
on both sides of a classifier's boundary, where flipping moves all states to one side.
"""

from __future__ import annotations

import numpy as np

from abl_mlx.directions.estimators import Array, Facts, probe, unit


def directions(harmful: Array, harmless: Array, rank: int, *, penalty: float) -> Facts:
    """Orthonormal rows (k, d): the unit weights of the classifiers, in the order of fitting.

    Args:
        harmful, harmless: states (N, d) and (M, d).
        rank: the number of classifiers.
        penalty: of the logistic regression, as of `estimators.probe`.
    """
    sets = [np.asarray(one, np.float64) for one in (harmful, harmless)]
    rows: list[Array] = []
    for _ in range(rank):
        weight = probe(sets[0], sets[1], penalty=penalty).weight
        for row in rows:  # against rounding
            weight = weight - (weight @ row) * row
        length = float(np.linalg.norm(weight))
        if length < 1e-12:
            break
        rows.append(unit(weight))
        sets = [one - np.outer(one @ rows[-1], rows[-1]) for one in sets]
    return np.stack(rows), {}
