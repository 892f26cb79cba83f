"""One Gram matrix: its bulk, and the directions in which it has the least energy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import numpy as np

from convert.base.cores import blas_of_one

#: Below this width eigenvectors are computed by LAPACK, above it by a few inverse iterations.
_SMALL = 768

# Rows that are solved at a time.
_BLOCK = 128


def threads(width: int) -> AbstractContextManager[object]:
    """Context manager with a single BLAS thread for small matrices, which are faster with one."""
    return blas_of_one() if width <= _SMALL else nullcontext()


def bulk(gram: np.ndarray) -> float:
    """The mean eigenvalue of a Gram matrix (d, d) without its few largest ones.

    The largest eigenvalue of an embedding may be half of its trace.
    """
    d = len(gram)
    k = min(16, d // 4)
    trace = float(np.trace(gram, dtype=np.float64))
    if k == 0 or trace <= 0:
        return max(trace / d, 0.0)
    block = np.random.default_rng(0).standard_normal((d, k)).astype(gram.dtype)
    for _ in range(3):
        block = gram @ block
        block /= np.linalg.norm(block, axis=0)
    block = np.linalg.qr(block.astype(np.float64))[0].astype(gram.dtype)
    top = float(np.trace(block.T @ (gram @ block), dtype=np.float64))
    return max((trace - top) / (d - k), 1e-7 * trace / d)


def lowest(gram: np.ndarray, count: int) -> np.ndarray:
    """Nearly the ``count`` weakest directions of a Gram matrix (d, d): orthonormal (d, count).

    Dimensions without any energy (pruned or unused) are left out, because an edit does not cause
    them. For wide matrices inverse iteration is used (one Cholesky factor): a direction whose
    energy is clearly the lowest is exact, the others lie near the lower end of the spectrum.
    """
    diagonal = np.diagonal(gram)
    alive = np.flatnonzero(diagonal > 1e-7 * np.median(diagonal))
    count = min(count, len(alive))
    whole = len(alive) == len(gram)
    part = gram if whole else gram[np.ix_(alive, alive)]
    if len(part) <= _SMALL:
        found = np.linalg.eigh(part.astype(np.float64))[1][:, :count]
    else:
        found = _inverse_iteration(part, count)
    if whole:
        return found
    out = np.zeros((len(gram), count))
    out[alive] = found
    return out


def _inverse_iteration(gram: np.ndarray, count: int) -> np.ndarray:
    solve = _solver(gram)
    block = np.random.default_rng(0).standard_normal((len(gram), count + 8))
    for _ in range(6):
        block = np.linalg.qr(solve(block))[0]
    turn = np.linalg.eigh(block.T @ (gram @ block))[1]
    return block @ turn[:, :count]


def _solver(gram: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Solves (G + shift·I) x = b for a Gram matrix G (d, d) and columns b (d, k), in float64.

    The shift is a small share of the median energy, and larger only where the rounding of G needs
    it. NumPy has Cholesky's factor, a sixth of the work of an inverse, but no triangular solver:
    so blocks of rows are solved in turn, by the inverses of the blocks on the diagonal.
    """
    shifted = gram.astype(np.float64)
    diagonal = np.diagonal(shifted).copy()
    for share in 10.0 ** np.arange(-5, 3):
        shifted[np.diag_indices_from(shifted)] = diagonal + share * float(np.median(diagonal))
        with suppress(np.linalg.LinAlgError):  # not positive by rounding
            lower = np.linalg.cholesky(shifted)
            break
    del shifted
    rows = [slice(at, at + _BLOCK) for at in range(0, len(lower), _BLOCK)]
    inverses = [np.linalg.inv(lower[some, some]) for some in rows]

    def solve(columns: np.ndarray) -> np.ndarray:
        x = columns.astype(np.float64)
        for some, inverse in zip(rows, inverses, strict=True):
            x[some] = inverse @ (x[some] - lower[some, : some.start] @ x[: some.start])
        for some, inverse in zip(rows[::-1], inverses[::-1], strict=True):
            x[some] = inverse.T @ (x[some] - lower[some.stop :, some].T @ x[some.stop :])
        return x

    return solve
