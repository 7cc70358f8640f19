"""Tucker-2 of a convolution's kernel: W[·,c,f] ≈ Σ V[c,p] G[·,p,j] D[j,f].

V comes from the higher-order SVD: the leading left singular vectors of the kernel, unfolded by its
input channels. With data, the channels are whitened first by their second moment C, the mean over
the window's positions: V = C^(-1/2) Q. Given V, the best G and D are exact. With the second moment
S of whole windows, S' = (V ⊗ I)ᵀ S (V ⊗ I) = L Lᵀ, and Y = L⁻¹ (V ⊗ I)ᵀ S W, the error of the
outputs is ‖Y‖² of all rows minus the j largest squared singular values of the rows of the p first
channels. So one Cholesky factorization gives the errors of all pairs (p, j). Without data,
S = C = I.

Rounds of higher-order orthogonal iteration then fit V to the outputs that are kept, and the outputs
to V.

Sources: L. De Lathauwer et al., "A Multilinear Singular Value Decomposition" and "On the Best
Rank-1 and Rank-(R1,…,RN) Approximation of Higher-Order Tensors", SIAM J. Matrix Anal. Appl. 21
(2000); Y.-D. Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power
Mobile Applications", ICLR 2016 (arXiv 1511.06530); for whitened channels, arXiv 2511.04494.
"""

from __future__ import annotations

import contextlib
import math

import numpy as np
import scipy.linalg

from keras_alds.core.calibration.moments import SecondMoment, check_moment
from keras_alds.core.calibration.refit import balance
from keras_alds.core.calibration.semidefinite import square_root
from keras_alds.core.chains import CHAINS, TUCKER, Chain, chain_ranks
from keras_alds.core.parallel import single_threaded_blas
from keras_alds.core.slicing import Array, unfold
from keras_alds.core.spectra import Float64, SliceSpectrum, Spectra

#: How often V is fitted anew.
ROUNDS = 3


def tucker_spectra(kernel: Array, moment: SecondMoment | None = None) -> Spectra:
    """Returns the squared errors of all Tucker-2 decompositions of a kernel, before any rounds.

    Args:
        kernel: Array `[*window, c, f]` of real numbers.
        moment: Second moment of the layer's unfolded inputs. Defaults to None: errors are those of
            the kernel.

    Returns:
        `Spectra` whose `slices` are ranks p of the input channels, and whose ranks are j.

    Example:
        >>> found = tucker_spectra(np.ones((3, 3, 4, 4)))
        >>> found.slices[1].residual_energy.round(6).tolist()
        [144.0, 0.0, 0.0, 0.0, 0.0]
    """
    with single_threaded_blas():
        seen = _Seen(kernel, moment)
        rows = seen.regressed(seen.basis(seen.matrix, len(seen.channels)))[1]
        squares = np.square(rows).reshape(len(seen.channels), -1).sum(axis=1)
        total = float(squares.sum())
        # Ranks at which a chain is smaller than the kernel, and the highest.
        wanted = {*chain_ranks(kernel.shape, TUCKER), len(seen.channels)}
        gram, curves = np.zeros((rows.shape[1],) * 2), {}
        for p in range(1, len(seen.channels) + 1):
            part = rows[(p - 1) * seen.positions : p * seen.positions]
            gram += part.T @ part
            if p not in wanted:
                continue
            rank = min(rows.shape[1], p * seen.positions)
            values = np.maximum(np.linalg.eigvalsh(gram)[::-1][:rank], 0.0)
            kept = np.append(np.cumsum(values[::-1])[::-1], 0.0)
            energy = kept + float(squares[p:].sum())
            curves[p] = SliceSpectrum(np.sqrt(energy), energy)
    return Spectra(tuple(kernel.shape), math.sqrt(total), total, curves)


def tucker(
    kernel: Array,
    moment: SecondMoment | None,
    input_rank: int,
    rank: int,
    *,
    rounds: int = ROUNDS,
) -> tuple[Array, Array, Array]:
    """Returns the three arrays of a Tucker-2 decomposition, balanced.

    Args:
        kernel: Array `[*window, c, f]` of floating-point numbers.
        moment: Second moment of the layer's unfolded inputs, or None to approximate the kernel.
        input_rank: Rank p of the input channels, from 1 to min(c, κ·f).
        rank: Rank j of the output channels, from 1 to min(f, κ·p).
        rounds: How often V is fitted anew; the best round counts. Defaults to 3.

    Returns:
        `[c, p]`, `[*window, p, j]` and `[j, f]`, in the kernel's dtype.

    Raises:
        ValueError: If a rank is out of range, or the kernel is not finite.

    Example:
        >>> parts = tucker(np.ones((3, 3, 4, 5)), None, 2, 3)
        >>> [part.shape for part in parts]
        [(4, 2), (3, 3, 2, 3), (3, 5)]
    """
    *window, c, f = kernel.shape
    most = min(c, math.prod(window) * f), min(f, math.prod(window) * input_rank)
    if not (1 <= input_rank <= most[0] and 1 <= rank <= most[1]):
        raise ValueError(
            f"Expected ranks of a kernel of shape {kernel.shape} from 1 to {most[0]} of the input "
            f"channels, and to {most[1]} of the outputs. "
            f"Received: input_rank={input_rank}, rank={rank}"
        )
    with single_threaded_blas():
        seen = _Seen(kernel, moment)
        target, best = seen.matrix, -1.0
        for _ in range(rounds + 1):
            basis = seen.basis(target, input_rank)
            root, rows = seen.regressed(basis)
            left, values, right = scipy.linalg.svd(rows, full_matrices=False, check_finite=False)
            kept = float(np.square(values[:rank]).sum())
            if kept > best:
                best = kept
                scales = np.sqrt(values[:rank])
                core = left[:, :rank] * scales
                if root is not None:
                    core = scipy.linalg.solve_triangular(root.T, core, check_finite=False)
                found = basis, core, right[:rank] * scales[:, None]
            target = seen.matrix @ right[:rank].T @ right[:rank]
        encoder, core, decoder = found
        encoders, cores = balance(encoder[None], core.reshape(1, input_rank, -1))
    folded = np.moveaxis(cores[0].reshape(input_rank, *window, rank), 0, -2)
    return tuple(part.astype(kernel.dtype) for part in (encoders[0], folded, decoder))


class _Seen:
    """A kernel, and the moments of its inputs: of whole windows, and of channels."""

    def __init__(self, kernel: Array, moment: SecondMoment | None) -> None:
        *window, c, _ = kernel.shape
        if moment is not None:
            kernel = check_moment(kernel, moment)
        elif not np.isfinite(kernel).all():
            raise ValueError("Expected a finite kernel. Received: NaN or infinity")
        self.matrix = unfold(kernel, 1)[0].astype(np.float64)
        self.positions = math.prod(window)
        self.channels = np.eye(c)
        self.moment: Float64 | None = None
        if moment is not None:
            self.moment = scipy.linalg.block_diag(*moment.blocks)
            self.moment[np.diag_indices(len(self.moment))] += moment.ridge or 1.0
            parts = self.moment.reshape(c, self.positions, c, self.positions)
            mean = np.einsum("apbp->ab", parts) / self.positions
            self.channels = square_root(mean, np.finfo(np.float64).eps)

    def basis(self, matrix: Float64, rank: int) -> Float64:
        """V `[c, p]`: the leading inputs of a matrix `[c·κ, f]`, whitened."""
        by_channel = self.channels @ matrix.reshape(len(self.channels), -1)
        vectors = np.linalg.eigh(by_channel @ by_channel.T)[1][:, : -rank - 1 : -1]
        if self.moment is None:
            return vectors
        return scipy.linalg.solve(self.channels, vectors, check_finite=False)

    def regressed(self, basis: Float64) -> tuple[Float64 | None, Float64]:
        """L and Y for V; None in place of the identity."""
        c, p = basis.shape
        if self.moment is None:
            return None, (basis.T @ self.matrix.reshape(c, -1)).reshape(p * self.positions, -1)
        half = basis.T @ self.moment.reshape(c, -1)
        half = half.reshape(p * self.positions, c * self.positions)
        gram = basis.T @ half.T.reshape(c, -1)
        root = _cholesky(gram.reshape(p * self.positions, -1))
        right = half @ self.matrix
        return root, scipy.linalg.solve_triangular(root, right, lower=True, check_finite=False)


def _cholesky(gram: Float64) -> Float64:
    """A lower triangle; the whitened gram has a mean diagonal of 1."""
    for added in (0.0, 1e-12, 1e-9):
        with contextlib.suppress(np.linalg.LinAlgError):
            return np.asarray(np.linalg.cholesky(gram + added * np.eye(len(gram))), np.float64)
    return np.asarray(np.linalg.cholesky(gram + 1e-6 * np.eye(len(gram))), np.float64)


CHAINS[TUCKER] = Chain(tucker_spectra, tucker)
