"""Canonical polyadic (CP) decomposition of a convolution's kernel, computed by TensorLy.

W[h,w,c,f] ≈ Σ_j A[c,j] H[h,j] V[w,j] B[f,j]: a sum of outer products, by alternating least squares.
There is no closed form, and no best rank. So errors are known at some ranks only, and interpolated.

Source: V. Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned
CP-Decomposition", ICLR 2015 (arXiv 1412.6553).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from keras_alds import extras
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.chains import CHAINS, CP, Chain, chain_ranks
from keras_alds.core.parallel import single_threaded_blas
from keras_alds.core.slicing import Array
from keras_alds.core.spectra import SliceSpectrum, Spectra

# Rounds of alternating least squares: for an error, and for the factors of a choice.
_ROUNDS_OF_ERRORS, _ROUNDS = 25, 100


def cp_spectra(kernel: Array, moment: SecondMoment | None = None) -> Spectra:
    """Returns the squared errors of the CP decompositions of a kernel, for all smaller ranks.

    They are computed at ranks 1, 2, 4 … and the largest one, and interpolated in between, both in
    logarithms.

    Args:
        kernel: Array `[h, w, c, f]` of real numbers.
        moment: Not used: errors are those of the kernel.

    Returns:
        `Spectra` of one slice.

    Raises:
        ImportError: If TensorLy is not installed.
    """
    energy = float(np.square(kernel, dtype=np.float64).sum())
    most = chain_ranks(kernel.shape, CP)[1][-1]
    ranks = sorted({most, *(2**n for n in range(most.bit_length()))})
    found = []
    for rank in ranks:
        _, relative = _decomposed(kernel, rank, _ROUNDS_OF_ERRORS)
        found.append(max(relative, np.finfo(np.float32).eps) ** 2 * energy)
    # A larger rank is never worse; the iteration may have stopped early.
    logs = np.log(np.minimum.accumulate(found) if energy else np.ones(len(found)))
    errors = np.exp(np.interp(np.log(np.arange(1, most + 1)), np.log(ranks), logs))
    errors = np.append(energy, errors if energy else 0 * errors)
    curve = SliceSpectrum(np.sqrt(errors), errors)
    return Spectra(tuple(kernel.shape), math.sqrt(energy), energy, {1: curve})


def cp(kernel: Array, moment: SecondMoment | None, input_rank: int, rank: int) -> tuple[Array, ...]:
    """Returns the four arrays of a CP decomposition, balanced.

    Args:
        kernel: Array `[h, w, c, f]` of floating-point numbers.
        moment: Not used.
        input_rank: Not used.
        rank: Rank j.

    Returns:
        `[c, j]`, `[h, j]`, `[w, j]` and `[j, f]`, in the kernel's dtype.

    Raises:
        ImportError: If TensorLy is not installed.
    """
    (height, width, channels, filters), _ = _decomposed(kernel, rank, _ROUNDS)
    parts = [channels, height, width, filters]
    norms = [np.linalg.norm(part, axis=0) for part in parts]
    mean = np.prod(norms, axis=0) ** (1 / len(parts))
    scaled = [
        part * np.divide(mean, norm, out=np.zeros_like(norm), where=norm > 0)
        for part, norm in zip(parts, norms, strict=True)
    ]
    scaled[-1] = scaled[-1].T
    return tuple(part.astype(kernel.dtype) for part in scaled)


def _decomposed(kernel: Array, rank: int, rounds: int) -> tuple[list[Any], float]:
    """The factors `[n, j]` of all axes, and the relative error.

    A trace of ridge keeps the least squares solvable.
    """
    norm = float(np.linalg.norm(kernel))
    if not norm:
        return [np.zeros((length, rank)) for length in kernel.shape], 0.0
    decomposition = extras.imported(
        "tensorly.decomposition", "CP decompositions", '"keras_alds[tensors]"'
    )
    options = {"n_iter_max": rounds, "init": "svd", "random_state": 0, "tol": 1e-7, "l2_reg": 1e-9}
    with single_threaded_blas(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ranks above an axis's length
        (scales, factors), errors = decomposition.parafac(
            kernel.astype(np.float64) / norm, rank, return_errors=True, **options
        )
    factors = [np.asarray(factor) for factor in factors]
    factors[0] = factors[0] * np.asarray(scales) * norm
    return factors, float(errors[-1])


CHAINS[CP] = Chain(cp_spectra, cp)
