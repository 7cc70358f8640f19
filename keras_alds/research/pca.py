"""Principal components of a layer's outputs: the method `"pca"` of the paper's comparison.

With y = x W + b, mean ȳ and centred covariance Cov(y) = Wᵀ (S − x̄ x̄ᵀ) W, and P its j leading
eigenvectors, the output is approximated by ȳ + (y − ȳ) P Pᵀ: encoder W P, decoder Pᵀ, and the bias
b P Pᵀ + ȳ (I − P Pᵀ). S and x̄ are the second moment and the mean of the unfolded inputs.

Source: X. Zhang et al., "Accelerating Very Deep Convolutional Networks", TPAMI 2016 (arXiv
1505.06798), sections 3.1 (linear case) and 3.3; the baseline of arXiv 2107.11442, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from keras_alds.core.calibration.moments import SecondMoment, check_moment
from keras_alds.core.calibration.refit import balance
from keras_alds.core.parallel import single_threaded_blas
from keras_alds.core.slicing import Array, fold_encoder, full_rank, unfold
from keras_alds.core.spectra import Float64, SliceSpectrum, Spectra


def centred_spectra(kernel: Array, moment: SecondMoment) -> Spectra:
    """Returns the spectrum of a layer's centred outputs, for one slice.

    Their `"energy"` error is the dropped part of the outputs' variance.

    Args:
        kernel: Real array `[*spatial, c, f]`.
        moment: Second moment and mean of the layer's unfolded inputs, in one block.

    Returns:
        The `Spectra`, of one slice.

    Raises:
        ValueError: If kernel and moment do not match, the moment has no mean or several blocks,
            or the kernel is not finite.

    Example:
        >>> moment = SecondMoment(np.diag([5.0, 1.0])[None], 10, np.array([2.0, 0.0]))
        >>> centred_spectra(np.eye(2), moment).energy  # the first input varies by 5 − 2²
        2.0
    """
    with single_threaded_blas():
        covariance, square = _covariance(kernel, moment)
        values = np.linalg.eigvalsh(covariance)[::-1][: full_rank(kernel.shape, 1)]
    # Subtracting the squared mean leaves rounding errors.
    values = np.where(values > kernel.size * np.finfo(np.float64).eps * square, values, 0.0)
    curve = SliceSpectrum(
        np.append(np.sqrt(values), 0.0), np.append(np.cumsum(values[::-1])[::-1], 0.0)
    )
    norm, energy = float(curve.residual_norm[0]), float(curve.residual_energy[0])
    return Spectra(tuple(kernel.shape), norm, energy, {1: curve})


def centred_spectra_many(
    kernels: Sequence[Array],
    moments: Sequence[SecondMoment],
    ranks: Sequence[Mapping[int, int]] = (),
) -> list[Spectra]:
    """Returns `centred_spectra` of several layers, always for one slice."""
    return [centred_spectra(k, m) for k, m in zip(kernels, moments, strict=True)]


def obstacle(moment: SecondMoment) -> str | None:
    """Returns why a second moment allows no principal components, or None.

    Args:
        moment: Second moment of a layer's unfolded inputs.

    Raises:
        ValueError: If it has no mean.

    Example:
        >>> obstacle(SecondMoment(np.ones((2, 1, 1)), 10, np.zeros(2)))
        "its second moment is kept in 2 blocks, and the method 'pca' needs all of it"
    """
    if moment.mean is None:
        raise ValueError(
            "Expected calibration statistics with means, for the method 'pca'. "
            "Received: older ones without. Collect them anew."
        )
    if moment.block_count == 1:
        return None
    return (
        f"its second moment is kept in {moment.block_count} blocks, and the method 'pca' needs "
        "all of it"
    )


def factorize_pca(
    kernel: Array, moment: SecondMoment, rank: int, bias: Array | None = None
) -> tuple[Array, Array, Array]:
    """Returns balanced factors and the bias that keep the principal components of the outputs.

    Args:
        kernel: Array `[*spatial, c, f]` of floating-point numbers.
        moment: Second moment and mean of the layer's unfolded inputs, in one block.
        rank: Number j of components, from 1 to min(c·κ, f).
        bias: The layer's bias `[f]`, or None.

    Returns:
        `(encoder, decoder, bias)` in the kernel's dtype: `[*spatial, c, j]`, `[j, f]`, `[f]`.

    Raises:
        ValueError: As for `centred_spectra`, or if `rank` is out of range.

    Example:
        >>> moment = SecondMoment(np.diag([5.0, 3.0])[None], 10, np.array([2.0, 0.0]))
        >>> encoder, decoder, bias = factorize_pca(np.eye(2), moment, 1)
        >>> np.abs(encoder @ decoder).round(6).tolist(), bias.round(6).tolist()
        ([[0.0, 0.0], [0.0, 1.0]], [2.0, 0.0])
    """
    most = full_rank(kernel.shape, 1)
    if not 1 <= rank <= most:
        raise ValueError(
            f"Expected a rank from 1 to {most}, the full rank of a slice of a kernel of shape "
            f"{kernel.shape} in 1 slices. Received: rank={rank}"
        )
    with single_threaded_blas():
        components = np.linalg.eigh(_covariance(kernel, moment)[0])[1][:, : -rank - 1 : -1]
        rows = unfold(kernel, 1)[0].astype(np.float64)
        old = np.zeros(rows.shape[1]) if bias is None else np.asarray(bias, np.float64)
        mean = np.asarray(moment.mean) @ rows + old
        shift = mean + (old - mean) @ components @ components.T
        left, right = balance((rows @ components)[None], components.T[None])
    dtype = kernel.dtype if kernel.dtype.kind not in "biu" else np.dtype(np.float64)
    encoder = fold_encoder(left, kernel.shape[:-2]).astype(dtype)
    return encoder, right[0].astype(dtype), shift.astype(dtype)


def _covariance(kernel: Array, moment: SecondMoment) -> tuple[Float64, float]:
    """Cov(y), and E‖y‖² without the bias."""
    kernel = check_moment(kernel, moment)
    if moment.mean is None or moment.block_count > 1:
        raise ValueError(
            "Expected a second moment in one block, with the mean of the inputs. "
            f"Received: {moment.block_count} blocks, mean={moment.mean}"
        )
    rows = unfold(kernel, 1)[0].astype(np.float64)
    mean = moment.mean @ rows
    second = rows.T @ moment.columns(1, 0, rows, ridged=False)
    covariance = second - np.outer(mean, mean)
    return (covariance + covariance.T) / 2, float(np.trace(second))
