r"""Error measures of a choice (k, j): how much a factorized layer differs from its dense kernel.

σ_m(W_i) are the singular values of slice i, and σ_1(W) is the largest of the whole unfolding:

| name | formula |
|---|---|
| `"slice"` | max_i σ_{j+1}(W_i) / σ_1(W) |
| `"bound"` | √k · `"slice"`, Theorem 1 of arXiv 2107.11442 |
| `"spectral"` | √λ_max(Σ_i Σ_{m>j} σ²_{i,m} v_{i,m} v_{i,m}ᵀ) / σ_1(W), exact |
| `"energy"` | Σ_i Σ_{m>j} σ²_{i,m} / ‖W‖²_F, exact |
| `"residual"` | Σ_i Σ_{m>j} σ²_{i,m}, exact; the only one that is not relative |

The others are relative. They are 0 at the full rank of every slice, and for a kernel of zeros.
Each fold scheme has its own unfolding W and W_i: ‖W‖_F is the same in all schemes, σ_1 is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from keras_alds.core.checks import did_you_mean
from keras_alds.core.parallel import single_threaded_blas
from keras_alds.core.slicing import Array, unfold
from keras_alds.core.spectra import Float64, SliceSpectrum, Spectra, check_kernel, slice_vectors

# Up to this size, computing all eigenvalues is as fast as computing the largest one.
_DENSE_SIDE = 160
_LANCZOS_STEPS = 60
_LANCZOS_RESTARTS = 8
_LANCZOS_TOLERANCE = 1e-8


@dataclass(frozen=True)
class ErrorMeasure:
    """One way to measure the error of a choice.

    Attributes:
        name: Its name in `ERRORS`.
        curve: `curve(spectra, k, kernel, max_rank)` returns the errors for j = 0 … max_rank.
        needs_kernel: Whether `curve` needs the kernel, not just its spectra.
        summary: One line for messages and documentation.
    """

    name: str
    curve: Callable[[Spectra, int, Array | None, int], Float64]
    needs_kernel: bool
    summary: str


def _relative(values: Float64, scale: float) -> Float64:
    return values / scale if scale > 0 else np.zeros_like(values)


def _slice_error(spectra: Spectra, k: int, kernel: Array | None, max_rank: int) -> Float64:
    return _relative(spectra.slices[k].residual_norm[: max_rank + 1], spectra.norm)


def _bound_error(spectra: Spectra, k: int, kernel: Array | None, max_rank: int) -> Float64:
    return np.sqrt(k) * _slice_error(spectra, k, kernel, max_rank)


def _energy_error(spectra: Spectra, k: int, kernel: Array | None, max_rank: int) -> Float64:
    return _relative(spectra.slices[k].residual_energy[: max_rank + 1], spectra.energy)


def _residual_error(spectra: Spectra, k: int, kernel: Array | None, max_rank: int) -> Float64:
    return spectra.slices[k].residual_energy[: max_rank + 1]


def _spectral_error(spectra: Spectra, k: int, kernel: Array | None, max_rank: int) -> Float64:
    if k == 1:
        # One slice: the norm of the residual is its first dropped singular value.
        return _slice_error(spectra, k, kernel, max_rank)
    if kernel is None:
        raise ValueError(
            'Expected the kernel for the error "spectral": it needs singular vectors. '
            "Received: kernel=None"
        )
    if tuple(kernel.shape) != spectra.kernel_shape:
        raise ValueError(
            f"Expected the kernel of shape {spectra.kernel_shape} that the spectra belong to. "
            f"Received: kernel.shape={tuple(kernel.shape)}"
        )
    if spectra.norm == 0:
        return np.zeros(max_rank + 1)
    with single_threaded_blas():
        norms = _residual_norms(check_kernel(kernel), k, max_rank, spectra.slices[k])
    return norms / spectra.norm


def _residual_norms(kernel: Array, k: int, max_rank: int, spectrum: SliceSpectrum) -> Float64:
    """Spectral norms of the joint residual of all slices, for j = 0 … max_rank."""
    matrices = unfold(kernel, k).astype(np.float64, copy=False)
    rows, f = matrices.shape[0] * matrices.shape[1], matrices.shape[2]
    if rows < f:
        # W = L Qᵀ with orthonormal Q, so the residuals of W and L have the same norms.
        _, right_factor = np.linalg.qr(matrices.reshape(rows, f).T)
        matrices = right_factor.T.reshape(k, -1, rows)
        f = rows
    rank = spectrum.rank
    # columns[m] = σ_{i,m+1} v_{i,m+1} of all slices i side by side
    columns = np.empty((rank, f, k))
    for i, matrix in enumerate(matrices):
        vectors, right = slice_vectors(matrix)
        if right:
            vectors = vectors * np.linalg.norm(matrix @ vectors, axis=0)
        columns[:, :, i] = (vectors if right else matrix.T @ vectors).T[:rank]
    norms = np.zeros(max_rank + 1)
    # Start from the smallest singular values, so that the summands have similar sizes.
    tail = columns[max_rank:].transpose(1, 0, 2).reshape(f, -1)
    gram = tail @ tail.T
    vector = None
    for j in range(max_rank, -1, -1):
        if j < max_rank:
            gram += columns[j] @ columns[j].T
        # Once every slice is out of singular values, the residual is exactly zero, not noise.
        if spectrum.residual_norm[j] > 0:
            value, vector = largest_eigenvalue(gram, start=vector)
            norms[j] = np.sqrt(max(value, 0.0))
    # Each residual contains the next one, so only rounding can break the order.
    return np.maximum.accumulate(norms[::-1])[::-1]


def largest_eigenvalue(
    matrix: Float64, *, start: Float64 | None = None
) -> tuple[float, Float64 | None]:
    """Returns the largest eigenvalue of a positive semidefinite matrix.

    Uses Lanczos with full reorthogonalization, restarted from the Ritz vector. Computes all
    eigenvalues if the matrix is small or Lanczos does not converge.

    Args:
        matrix: Symmetric array `[n, n]`.
        start: A guess of the eigenvector, `[n]`.

    Returns:
        `(eigenvalue, vector)`: the eigenvalue to a relative 1e-8 or better, and an approximate
        eigenvector for the next `start`, or `None` if none was computed.

    Example:
        >>> round(largest_eigenvalue(np.diag([1.0, 3.0, 2.0]))[0], 6)
        3.0
    """
    n = matrix.shape[0]
    if n <= _DENSE_SIDE:
        return float(np.linalg.eigvalsh(matrix)[-1]), None
    # Add a bit of every direction: the guess may be an eigenvector that no longer leads.
    noise = np.random.default_rng(n).standard_normal(n)
    noise *= 0.1 / np.linalg.norm(noise)
    guess = noise if start is None else start + noise
    for _ in range(_LANCZOS_RESTARTS):
        basis = np.zeros((_LANCZOS_STEPS, n))
        diagonal, off = np.zeros(_LANCZOS_STEPS), np.zeros(_LANCZOS_STEPS)
        basis[0] = guess / np.linalg.norm(guess)
        for m in range(_LANCZOS_STEPS):
            image = matrix @ basis[m]
            diagonal[m] = basis[m] @ image
            for _ in range(2):
                image -= (basis[: m + 1] @ image) @ basis[: m + 1]
            off[m] = np.linalg.norm(image)
            exhausted = off[m] <= 1e-14 * np.abs(diagonal[: m + 1]).max()
            if exhausted or m % 8 == 7 or m == _LANCZOS_STEPS - 1:
                small = np.diag(diagonal[: m + 1])
                small += np.diag(off[:m], 1) + np.diag(off[:m], -1)
                values, vectors = np.linalg.eigh(small)
                value, guess = float(values[-1]), vectors[:, -1] @ basis[: m + 1]
                if exhausted or off[m] * abs(vectors[-1, -1]) <= _LANCZOS_TOLERANCE * value:
                    return value, guess
            if m + 1 < _LANCZOS_STEPS:
                basis[m + 1] = image / off[m]
    return float(np.linalg.eigvalsh(matrix)[-1]), guess


ERRORS: Mapping[str, ErrorMeasure] = MappingProxyType(
    {
        measure.name: measure
        for measure in (
            ErrorMeasure(
                "slice", _slice_error, False, "largest dropped singular value of any slice"
            ),
            ErrorMeasure("bound", _bound_error, False, "√k times the slice error (Theorem 1)"),
            ErrorMeasure("spectral", _spectral_error, True, "operator norm of the residual"),
            ErrorMeasure(
                "energy", _energy_error, False, "squared Frobenius norm of the residual, relative"
            ),
            ErrorMeasure("residual", _residual_error, False, "the same, not relative"),
        )
    }
)


def get_error(name: str) -> ErrorMeasure:
    """Returns an error measure by its name.

    Args:
        name: One of the keys of `ERRORS`.

    Raises:
        ValueError: If no measure has that name.

    Example:
        >>> get_error("energy").needs_kernel
        False
    """
    try:
        return ERRORS[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"Expected an error measure, one of {sorted(ERRORS)}. "
            f"Received: error_measure={name!r}{did_you_mean(name, ERRORS)}"
        ) from None


def error_curve(
    spectra: Spectra,
    name: str,
    k: int,
    kernel: Array | None = None,
    *,
    max_rank: int | None = None,
) -> Float64:
    """Returns the error of a kernel in k slices for every rank j.

    Args:
        spectra: Spectra of the kernel, including k.
        name: One of `"slice"`, `"bound"`, `"spectral"`, `"energy"`, `"residual"`.
        k: Number of channel slices.
        kernel: The kernel itself, `[*spatial, c, f]`; needed by `"spectral"` only.
        max_rank: The last rank of the curve. Defaults to the full rank r of a slice. A smaller one
            saves work with `"spectral"`.

    Returns:
        Array `[max_rank + 1]` of errors for j = 0 … max_rank; not increasing, 0 at j = r.

    Raises:
        ValueError: If the name or k is unknown, `max_rank` is not in 0 … r, or a required kernel
            is missing or does not match the spectra.

    Example:
        >>> from keras_alds.core.spectra import spectra
        >>> kernel = np.eye(4)
        >>> error_curve(spectra(kernel), "energy", 2).tolist()
        [1.0, 0.5, 0.0]
    """
    measure = get_error(name)
    if k not in spectra.slices:
        raise ValueError(
            f"Expected a number of slices that the spectra hold, one of {list(spectra.slices)}. "
            f"Received: k={k}"
        )
    rank = spectra.slices[k].rank
    if max_rank is None:
        max_rank = rank
    if not 0 <= max_rank <= rank:
        raise ValueError(f"Expected max_rank from 0 to {rank}. Received: max_rank={max_rank}")
    return measure.curve(spectra, k, kernel, max_rank)
