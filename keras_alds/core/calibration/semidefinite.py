"""Linear systems and roots of positive semidefinite matrices, including singular ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import scipy.linalg

from keras_alds.core.spectra import Float64

#: Returns the solution for right-hand sides `[n, m]`.
Solver = Callable[[Float64], Float64]


def solve(gram: Float64, right: Float64, *, overwrite: bool = False) -> Float64:
    """Solves a positive semidefinite system; undetermined components are zero.

    Args:
        gram: The matrix, `[n, n]`.
        right: The right-hand sides, `[n, m]`.
        overwrite: Whether `gram`, symmetric except for rounding, may be overwritten, to avoid
            copies of large matrices.

    Returns:
        Array `[n, m]`.
    """
    return solver(gram, overwrite=overwrite)(right)


def solver(gram: Float64, *, overwrite: bool = False) -> Solver:
    """Returns a function that solves systems of one matrix, which is factorized once.

    Args:
        gram: As for `solve`.
        overwrite: As for `solve`.
    """
    if not overwrite:
        gram = (gram + gram.T) / 2
    diagonal = gram.diagonal().copy()
    try:
        # The transpose is in Fortran order: its lower half is factorized in place, and the other
        # half does not change.
        factor = scipy.linalg.cho_factor(gram.T, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        gram = np.tril(gram, -1)
        gram += gram.T
        gram[np.diag_indices(len(gram))] = diagonal
        values, vectors = np.linalg.eigh(gram)
        kept = values > gram.shape[0] * np.finfo(np.float64).eps * max(values[-1], 0.0)
        inverse = np.divide(1.0, values, out=np.zeros_like(values), where=kept)
        return lambda right: vectors @ (inverse[:, None] * (vectors.T @ right))
    return functools.partial(scipy.linalg.cho_solve, factor, check_finite=False)


def square_root(block: Float64, floor: float) -> Float64:
    """A square C with Cᵀ C = S.

    Args:
        block: The matrix S, `[n, n]`.
        floor: If rounding left S indefinite: the lower bound on its eigenvalues, as a part of the
            largest one.

    Returns:
        Array `[n, n]`.
    """
    try:
        return np.linalg.cholesky(block).T
    except np.linalg.LinAlgError:  # rounding of many float32 inputs exceeds ρ
        values, vectors = np.linalg.eigh(block)
        return np.sqrt(np.maximum(values, floor * values[-1]))[:, None] * vectors.T
