"""Systems and roots of positive semidefinite matrices, singular ones included."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from keras_alds.core.spectra import Float64


def solve(gram: Float64, right: Float64, *, overwrite: bool = False) -> Float64:
    """Solves a positive semidefinite system; what it does not determine is zero.

    Args:
        gram: The matrix, `[n, n]`.
        right: The right-hand sides, `[n, m]`.
        overwrite: Whether `gram`, symmetric but for rounding, may be used up: large ones are not
            copied then.

    Returns:
        Array `[n, m]`.
    """
    if not overwrite:
        gram = (gram + gram.T) / 2
    diagonal = gram.diagonal().copy()
    try:
        # The transpose is in Fortran's order: its lower half is factorized in place, and the other
        # half stays what it is.
        factor = scipy.linalg.cho_factor(gram.T, lower=True, overwrite_a=True, check_finite=False)
        return scipy.linalg.cho_solve(factor, right, check_finite=False)
    except np.linalg.LinAlgError:
        gram = np.tril(gram, -1)
        gram += gram.T
        gram[np.diag_indices(len(gram))] = diagonal
        values, vectors = np.linalg.eigh(gram)
        kept = values > gram.shape[0] * np.finfo(np.float64).eps * max(values[-1], 0.0)
        inverse = np.divide(1.0, values, out=np.zeros_like(values), where=kept)
        return vectors @ (inverse[:, None] * (vectors.T @ right))


def square_root(block: Float64, floor: float) -> Float64:
    """A square C with Cᵀ C = S.

    Args:
        block: The matrix S, `[n, n]`.
        floor: If rounding left S indefinite: the least that an eigenvalue counts, as a part of
            the largest one.

    Returns:
        Array `[n, n]`.
    """
    try:
        return np.linalg.cholesky(block).T
    except np.linalg.LinAlgError:  # float32 inputs, much more of them than ρ can cover
        values, vectors = np.linalg.eigh(block)
        return np.sqrt(np.maximum(values, floor * values[-1]))[:, None] * vectors.T
