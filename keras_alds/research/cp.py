"""Canonical polyadic (CP) decomposition of a convolution's kernel, computed by TensorLy.

W[h,w,c,f] ≈ Σ_j A[c,j] H[h,j] V[w,j] B[f,j]: a sum of outer products, by alternating least squares.
There is no closed form, and no best rank. So errors are known at some ranks only, and interpolated.
With data, B is then the least-squares fit of the layer's outputs.

Source: V. Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned
CP-Decomposition", ICLR 2015 (arXiv 1412.6553).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from keras_alds import extras
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.calibration.semidefinite import solve
from keras_alds.core.chains import CHAINS, CP, Chain, chain_ranks
from keras_alds.core.parallel import single_threaded_blas
from keras_alds.core.slicing import Array, unfold
from keras_alds.core.spectra import SliceSpectrum, Spectra

# Rounds of alternating least squares: for an error, and for the factors of a choice.
_ROUNDS_OF_ERRORS, _ROUNDS = 25, 100


def cp_spectra(kernel: Array, moment: SecondMoment | None = None) -> Spectra:
    """Returns the squared errors of the CP decompositions of a kernel, for all smaller ranks.

    They are computed at ranks 1, 2, 4 … and the largest one, and interpolated in between, both in
    logarithms.

    Args:
        kernel: Array `[h, w, c, f]` of real numbers.
        moment: Second moment of the layer's unfolded inputs. Defaults to None: errors are those of
            the kernel, else of the outputs.

    Returns:
        `Spectra` of one slice.

    Raises:
        ImportError: If TensorLy is not installed.
    """
    rows = unfold(kernel, 1)[0].astype(np.float64)
    energy = float(np.vdot(rows, rows if moment is None else moment.times(rows)))
    most = chain_ranks(kernel.shape, CP)[1][-1]
    ranks = sorted({most, *(2**n for n in range(most.bit_length()))})
    found = []
    for rank in ranks:
        first, decoder = _fitted(kernel, moment, rank, _ROUNDS_OF_ERRORS)
        rest = rows - _encoder(*first) @ decoder
        error = float(np.vdot(rest, rest if moment is None else moment.times(rest)))
        found.append(max(error, np.finfo(np.float64).eps * energy))
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
        moment: Second moment of the layer's unfolded inputs, or None to approximate the kernel.
        input_rank: Not used.
        rank: Rank j.

    Returns:
        `[c, j]`, `[h, j]`, `[w, j]` and `[j, f]`, in the kernel's dtype.

    Raises:
        ImportError: If TensorLy is not installed.
    """
    (channels, height, width), decoder = _fitted(kernel, moment, rank, _ROUNDS)
    parts = [channels, height, width, decoder.T]
    norms = [np.linalg.norm(part, axis=0) for part in parts]
    mean = np.prod(norms, axis=0) ** (1 / len(parts))
    scaled = [
        part * np.divide(mean, norm, out=np.zeros_like(norm), where=norm > 0)
        for part, norm in zip(parts, norms, strict=True)
    ]
    scaled[-1] = scaled[-1].T
    return tuple(part.astype(kernel.dtype) for part in scaled)


def _fitted(
    kernel: Array, moment: SecondMoment | None, rank: int, rounds: int
) -> tuple[list[Any], Array]:
    """The factors of channels, height and width, and the decoder `[j, f]`."""
    height, width, channels, filters = _decomposed(kernel, rank, rounds)
    if moment is None:
        return [channels, height, width], filters.T
    encoder = _encoder(channels, height, width)
    seen = moment.times(encoder)
    decoder = solve(encoder.T @ seen, seen.T @ unfold(kernel, 1)[0].astype(np.float64))
    return [channels, height, width], decoder


def _encoder(channels: Array, height: Array, width: Array) -> Array:
    """All convolutions but the last one as a matrix `[c·κ, j]`."""
    return np.einsum("cj,hj,wj->chwj", channels, height, width).reshape(-1, channels.shape[1])


def _decomposed(kernel: Array, rank: int, rounds: int) -> list[Any]:
    """The factors `[n, j]` of all axes.

    A trace of ridge keeps the least squares solvable.
    """
    from keras_alds._backend.quiet import ignored_warnings  # `_backend` imports TensorFlow

    norm = float(np.linalg.norm(kernel))
    if not norm:
        return [np.zeros((length, rank)) for length in kernel.shape]
    decomposition = extras.imported(
        "tensorly.decomposition", "CP decompositions", '"keras_alds[tensors]"'
    )
    options = {"n_iter_max": rounds, "init": "svd", "random_state": 0, "tol": 1e-7, "l2_reg": 1e-9}
    with single_threaded_blas(), ignored_warnings():  # of ranks above an axis's length
        scales, factors = decomposition.parafac(kernel.astype(np.float64) / norm, rank, **options)
    factors = [np.asarray(factor) for factor in factors]
    factors[0] = factors[0] * np.asarray(scales) * norm
    return factors


CHAINS[CP] = Chain(cp_spectra, cp)
