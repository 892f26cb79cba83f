"""Directions without what protected concepts have in common with them.

Cristofano 2026, "Surgical Refusal Ablation: Disentangling Safety from Intelligence via
Concept-Guided Spectral Cleaning" (arXiv 2601.08489): the difference of means r mixes refusal with
concepts that harmful prompts happen to share, such as code or a style. Each protected concept has
an atom, its mean state less the harmless mean, and r loses its ridge-regularized projection on all
atoms:

    r' = r − A (AᵀA + λ I)⁻¹ Aᵀ r,   the unit atoms being the columns of A.

The ridge λ keeps atoms that are nearly the same from being told apart by noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import numpy as np

from abl_mlx.directions.estimators import Array, orthonormal, unit
from abl_mlx.directions.measuring import Candidates, float32
from abl_mlx.models import capture
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.support.arrays import numpy_of
from convert.base.errors import UserError

#: λ, for atoms of length 1: of a direction that lies along one atom a share of λ / (1 + λ) is left.
RIDGE = 0.05

#: Names of the sets of train prompts that show a protected concept begin with this.
PREFIX = "protected: "

#: The smallest length that a unit direction may have left; below it, it is one of the concepts.
LEAST = 0.1


def residual(rows: Array, atoms: Array, ridge: float = RIDGE) -> Array:
    """Rows (k, d) less their ridge-regularized projection on the atoms (m, d)."""
    rows, atoms = np.asarray(rows, np.float64), unit(atoms)
    inside = np.linalg.solve(atoms @ atoms.T + ridge * np.eye(len(atoms)), atoms @ rows.T)
    left: Array = rows - inside.T @ atoms
    return left


def protected(
    chat: ChatModel, candidates: Candidates, train: Mapping[str, list[list[int]]]
) -> Candidates:
    """The candidates without the protected concepts; themselves if there are none.

    Args:
        chat: the model.
        candidates: what was measured.
        train: encoded train prompts by name of the set; those of concepts begin with `PREFIX`.

    Raises:
        UserError: when a candidate is hardly more than the concepts.
    """
    names = [name for name in train if name.startswith(PREFIX)]
    if not names:
        return candidates
    atoms = np.stack(
        [
            numpy_of(
                capture.mean(chat, train[name], candidates.positions, label=name)
                - candidates.harmless_mean
            )
            for name in names
        ]
    )
    bases = numpy_of(candidates.bases)
    found = np.empty_like(bases)
    lengths = np.empty(bases.shape[:2])
    for at in np.ndindex(*bases.shape[:2]):
        rows = residual(bases[at], atoms[:, at[0], at[1]])
        found[at], left = orthonormal(rows)
        lengths[at] = left.min()
    if lengths.max() < LEAST:
        concepts = ", ".join(name.removeprefix(PREFIX) for name in names)
        raise UserError(
            f"--protect: after every layer the refusal direction is hardly more than what is "
            f"protected ({concepts}): give prompts that this model answers, and of other topics."
        )
    facts = {**candidates.facts, "unprotected": mx.array(lengths.astype(np.float32))}
    return replace(candidates, found=float32(found), facts=facts)
