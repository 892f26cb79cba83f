"""The low-rank change of a matrix that gives chosen inputs, the keys, other outputs.

W is a matrix (d, n). The keys are the rows of K (N, n), and the rows of R (N, d) are what is to be
added to their outputs. The kept inputs, the rows of X (M, n), are to keep their outputs. The change
Δ (d, n) minimizes

    Σᵢ ‖Δ kᵢ − rᵢ‖² + Σⱼ wⱼ ‖Δ xⱼ‖² + ε ‖Δ‖²,

so Δ = Rᵀ K (KᵀK + C)⁻¹ with C = Xᵀ diag(w) X + ε. With one key this is Rank-One Model Editing (Meng
et al. 2022, arXiv:2202.05262), with many its block form MEMIT (Meng et al. 2023, arXiv:2210.07229,
equation 14). `in_null_space` lets the kept inputs keep their outputs exactly, as AlphaEdit does
(Fang et al. 2025, arXiv:2410.02355).

Everything is computed in float64.
"""

from __future__ import annotations

import numpy as np

# Singular values below this share of the largest one count as 0.
_NOTHING = 1e-8


def change(
    keys: np.ndarray,
    wanted: np.ndarray,
    kept: np.ndarray,
    weights: np.ndarray,
    ridge: float,
    rank: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the change Δ = left @ right of the module's text.

    Args:
        keys: K, (N, n).
        wanted: R, (N, d).
        kept: X, (M, n).
        weights: w, (M,).
        ridge: ε, at least 0.
        rank: the largest rank: R is replaced by its best approximation of that rank.

    Returns:
        left (d, k) with orthonormal columns, and right (k, n), float64, with k at most ``rank``.
    """
    left, columns = _factors(wanted, rank)
    rows = np.concatenate([keys, np.sqrt(weights)[:, None] * kept]).astype(np.float64)
    targets = np.concatenate([columns, np.zeros((len(kept), columns.shape[1]))])
    return left, _ridge(rows, targets, ridge)


def in_null_space(
    keys: np.ndarray,
    wanted: np.ndarray,
    kept: np.ndarray,
    ridge: float,
    rank: int = 1,
    threshold: float = _NOTHING,
) -> tuple[np.ndarray, np.ndarray]:
    """Factors of a change that leaves the outputs of the kept inputs as they are.

    With P the projection onto the null space of XᵀX, the change is Δ P, where Δ minimizes
    Σᵢ ‖Δ P kᵢ − rᵢ‖² + ε ‖Δ P‖².

    Args:
        keys, wanted, kept, ridge, rank: as for `change`.
        threshold: eigenvalues of XᵀX below this share of the largest one count as 0.

    Returns:
        As `change` does.
    """
    left, columns = _factors(wanted, rank)
    free = keys.astype(np.float64)
    _, sizes, basis = np.linalg.svd(kept.astype(np.float64), full_matrices=False)
    basis = basis[sizes**2 > threshold * sizes[0] ** 2]
    for _ in range(2):  # the second time removes what rounding left
        free = free - (free @ basis.T) @ basis
    right = _ridge(free, columns, ridge)
    return left, right - (right @ basis.T) @ basis


def _factors(wanted: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """R as columns @ leftᵀ: left (d, k) orthonormal, columns (N, k)."""
    u, sizes, v = np.linalg.svd(wanted.astype(np.float64), full_matrices=False)
    k = max(1, min(rank, int(np.count_nonzero(sizes > _NOTHING * sizes[0]))))
    return v[:k].T, u[:, :k] * sizes[:k]


def _ridge(rows: np.ndarray, targets: np.ndarray, ridge: float) -> np.ndarray:
    """The B (k, n) that minimizes ‖rows Bᵀ − targets‖² + ε ‖B‖², by the smaller of two systems."""
    count, n = rows.shape
    if count <= n:
        gram = rows @ rows.T
        gram[np.diag_indices(count)] += ridge
        return (rows.T @ _solve(gram, targets)).T
    gram = rows.T @ rows
    gram[np.diag_indices(n)] += ridge
    return _solve(gram, rows.T @ targets).T


def _solve(gram: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The solution of a symmetric system; the shortest one where it has several."""
    try:
        return np.linalg.solve(gram, right)
    except np.linalg.LinAlgError:
        return np.linalg.lstsq(gram, right, rcond=None)[0]
