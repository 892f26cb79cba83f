"""Strengths by layer that a formula gives, without running the model."""

from __future__ import annotations

from collections.abc import Sequence


def gabliteration(layers: int, ridge: float, beta: float) -> Sequence[float]:
    """The strengths of Gülmez 2025, "Gabliteration" (arXiv 2512.18901), at α_base = 1.

    The paper projects by R(RᵀR + λI)⁻¹Rᵀ, with the top right singular vectors of paired differences
    as the columns of R, and scales layer ℓ by 1 + β(1 − |ξ|), ξ from -1 to 1 being its place among
    the edited layers. The columns of R are orthonormal, so the ridge divides strengths by 1 + λ.

    Args:
        layers: L.
        ridge: λ.
        beta: β, by how much the middle layer is stronger than the ends.
    """
    places = [2 * layer / max(1, layers - 1) - 1 for layer in range(layers)]
    return [(1 + beta * (1 - abs(place))) / (1 + ridge) for place in places]
