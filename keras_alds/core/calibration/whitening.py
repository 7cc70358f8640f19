"""A layer's output error at every rank: spectra of its slices, whitened by their inputs.

Let S = Cᵀ C be the second moment of a layer's unfolded inputs (`moments`). The best approximation
of rank j of one slice W_i follows from the SVD of C_i W_i, with C_iᵀ C_i = S_ii. With its leading
right singular vectors V it is W_i V Vᵀ, for any root C_i, and S is never inverted.

Source: BALF (arXiv 2509.25136) for the whitening; the joint errors of all slices are original to
this library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor

import numpy as np
import scipy.linalg

from keras_alds.core.calibration.moments import RIDGE, SecondMoment, are_few, check_moment
from keras_alds.core.calibration.semidefinite import square_root
from keras_alds.core.parallel import map_within, single_threaded_blas, threads
from keras_alds.core.slicing import Array, divisors, full_rank, kernel_sizes, largest_rank, unfold
from keras_alds.core.spectra import Float64, SliceSpectrum, Spectra

# Floating-point operations per work item: some tens of milliseconds.
_ITEM_COST = 5e8


def output_spectra(
    kernel: Array, moment: SecondMoment, *, slices: Iterable[int] | None = None
) -> Spectra:
    """Returns the spectra of C_i W_i for every slice: the output error at every rank.

    Their `"energy"` error is the expected squared error of the layer's output after the decoder is
    refitted jointly over all slices (as `factorize_outputs` does with `sweeps=0`), relative to the
    squared output, tr(Wᵀ S W). If only diagonal blocks of S are known, or a rank makes the layer no
    smaller than the dense kernel, the slices' errors are assumed to be uncorrelated.

    Args:
        kernel: Real array `[*spatial, c, f]`.
        moment: Second moment of the layer's unfolded inputs.
        slices: Numbers of slices k. Defaults to all divisors of c that are multiples of the
            moment's blocks.

    Returns:
        The `Spectra`; `norm` is the largest singular value of any slice of the coarsest k.

    Raises:
        ValueError: If kernel and moment do not match, or the kernel is not finite.

    Example:
        >>> moment = SecondMoment(np.diag([4.0, 1.0, 0.0])[None], 100)
        >>> round(output_spectra(np.eye(3), moment).norm, 4)
        2.0
    """
    wanted = None if slices is None else tuple(slices)
    return output_spectra_many([kernel], [moment], slices=wanted)[0]


def output_spectra_many(
    kernels: Sequence[Array],
    moments: Sequence[SecondMoment],
    *,
    slices: Iterable[int] | None = None,
    executor: Executor | None = None,
) -> list[Spectra]:
    """Returns `output_spectra` of several layers, computing slices in parallel.

    Args:
        kernels: Real arrays `[*spatial, c, f]`.
        moments: Their second moments.
        slices: As for `output_spectra`.
        executor: Any `concurrent.futures.Executor`. Defaults to a pool of threads.

    Returns:
        One `Spectra` per kernel, in order.

    Raises:
        ValueError: As for `output_spectra`.
    """
    arrays = [check_moment(kernel, moment) for kernel, moment in zip(kernels, moments, strict=True)]
    wanted = None if slices is None else tuple(slices)
    with single_threaded_blas(), threads(executor) as executor:
        layers = list(zip(arrays, moments, strict=True))
        sizes = [_bytes_of_slice(a.shape, moment, moment.block_count) for a, moment in layers]
        weighted = map_within(executor, _weighted, layers, sizes)
        works: list[tuple[int, int, int, int]] = []  # slices, layer, first slice, last slice
        for n, (array, moment) in enumerate(zip(arrays, moments, strict=True)):
            b = moment.block_count
            for k in wanted or divisors(array.shape[-2]):
                if k % b == 0 and array.shape[-2] % k == 0:
                    works += [(k, n, *part) for part in _parts_of_slices(array.shape, k, b)]
        works.sort()  # the largest matrices first
        pieces = map_within(
            executor,
            _slice_values,
            [(arrays[n], moments[n], weighted[n], k, range(*part)) for k, n, *part in works],
            [_bytes_of_slices(arrays[n].shape, moments[n], k) for k, n, *_ in works],
        )
        values: list[dict[int, list[tuple[Float64, Float64 | None]]]] = [{} for _ in arrays]
        for (k, n, *_), piece in zip(works, pieces, strict=True):
            values[n].setdefault(k, []).append(piece)
    result = []
    for array, (_, energy), found in zip(arrays, weighted, values, strict=True):
        entries = math.prod(array.shape)
        curves = {
            k: _curves(np.concatenate([v for v, _ in found[k]]), entries, found[k][0][1])
            for k in sorted(found)
        }
        norm = next((float(curve.residual_norm[0]) for curve in curves.values()), 0.0)
        result.append(Spectra(tuple(array.shape), norm, energy, curves))
    return result


def _weighted(kernel: Array, moment: SecondMoment) -> tuple[Float64 | None, float]:
    """(S + ρI) W if S is in one block, else None; and tr(Wᵀ (S + ρI) W)."""
    b = moment.block_count
    product, total = None, 0.0
    with single_threaded_blas():
        for i, part in enumerate(unfold(kernel, b)):  # wide layers have large blocks
            rows = part.astype(np.float64)
            if b == 1:
                product = moment.columns(b, i, rows)
                total = float(np.vdot(rows, product))
            else:
                total += moment.energy(i, rows)
    return product, max(total, 0.0)


def _parts_of_slices(shape: Sequence[int], slices: int, blocks: int) -> list[tuple[int, int]]:
    """Ranges of slices, one per work item; a single range if slices are refitted jointly."""
    if slices > 1 and blocks == 1:
        return [(0, slices)]
    c, kappa, f = kernel_sizes(shape)
    side = c // slices * kappa
    step = max(1, int(_ITEM_COST // (side * min(side, f) * (side + f))))
    return [(i, min(i + step, slices)) for i in range(0, slices, step)]


def _bytes_of_slice(shape: Sequence[int], moment: SecondMoment, slices: int) -> int:
    """Approximate bytes to compute the spectrum of one slice."""
    c, kappa, f = kernel_sizes(shape)
    width = c // slices * kappa
    seen = moment.count if are_few(moment.count, width) else width
    return 8 * (width * (2 * f + seen) + seen * f + 3 * min(width, f) ** 2)


def _bytes_of_slices(shape: Sequence[int], moment: SecondMoment, slices: int) -> int:
    """The same for one work item."""
    needed = _bytes_of_slice(shape, moment, slices)
    if (most := _joint_ranks(shape, moment, slices)) > 0:
        size = slices * most
        inputs = moment.count if are_few(moment.count, moment.side) else 0
        needed += 8 * (2 * size * (moment.side // slices + shape[-1]) + size * inputs + size**2)
    return needed


def _joint_ranks(shape: Sequence[int], moment: SecondMoment, slices: int) -> int:
    """The largest rank whose error after the joint refit is needed; 0 without a joint refit."""
    return 0 if slices == 1 or moment.block_count > 1 else largest_rank(shape, slices)


def _slice_values(
    kernel: Array,
    moment: SecondMoment,
    weighted: tuple[Float64 | None, float],
    slices: int,
    part: range,
) -> tuple[Float64, Float64 | None]:
    """The errors of some slices.

    Returns:
        Squared singular values `[len(part), r]`, ascending, of C_i W_i; and, if these are all
        slices, the output error after the joint refit, `[m]` for j = 1 … m.
    """
    matrices = unfold(kernel, slices)
    values = np.zeros((len(part), full_rank(kernel.shape, slices)))
    most = _joint_ranks(kernel.shape, moment, slices)
    bases = []
    with single_threaded_blas():
        for row, i in zip(values, part, strict=True):
            matrix = matrices[i].astype(np.float64)
            found, basis = seen_spectrum(matrix, moment, slices, i, most)
            row[row.size - found.size :] = found
            bases.append(basis)
        if not most or weighted[0] is None:
            return values, None
        try:
            explained = _explained(np.stack(bases), moment, weighted[0])
        except np.linalg.LinAlgError:  # rounding of many float32 inputs exceeds ρ
            return values, None
    return values, np.maximum(weighted[1] - explained, 0.0)


def _explained(bases: Float64, moment: SecondMoment, weighted: Float64) -> Float64:
    """tr(Dᵀ Eᵀ S E D) of the jointly refitted decoder D for all ranks j = 1 … m.

    With the columns of all slices' encoders ordered by rank, the leading block of Eᵀ S E = L Lᵀ is
    that of a smaller rank, and L⁻¹ Eᵀ S W gives the contribution of every column.

    Args:
        bases: Encoders `[k, n/k, m]`, the columns of rank j before those of rank j + 1.
        moment: Second moment in one block.
        weighted: (S + ρI) W, `[n, f]`.
    """
    slices, rows, most = bases.shape
    right = bases.transpose(0, 2, 1) @ weighted.reshape(slices, rows, -1)
    # The transpose of the symmetric matrix is in Fortran order, so it is not copied.
    triangle = scipy.linalg.cholesky(
        moment.gram(bases).T, lower=True, overwrite_a=True, check_finite=False
    )
    added = scipy.linalg.solve_triangular(
        triangle,
        right.transpose(1, 0, 2).reshape(most * slices, -1),
        lower=True,
        check_finite=False,
    )
    return np.cumsum(np.square(added).sum(axis=1).reshape(most, slices).sum(axis=1))


def _curves(squares: Float64, entries: int, joint: Float64 | None) -> SliceSpectrum:
    resolution = entries * np.finfo(np.float64).eps * squares.max(initial=0.0)
    squares = np.where(squares > resolution, squares, 0.0)
    energy = np.append(np.cumsum(squares.sum(axis=0))[::-1], 0.0)
    if joint is not None:
        # Larger ranks save nothing over the dense kernel; zero stays exactly zero.
        refitted = np.where(energy[1 : joint.size + 1] > 0, joint, 0.0)
        energy[1 : joint.size + 1] = refitted
        energy[joint.size + 1 :] = np.minimum(energy[joint.size + 1 :], refitted[-1])
    return SliceSpectrum(np.append(np.sqrt(squares.max(axis=0))[::-1], 0.0), energy)


def seen_spectrum(
    matrix: Float64, moment: SecondMoment, slices: int, index: int, rank: int
) -> tuple[Float64, Float64]:
    """`slice_spectrum` of one slice for a layer's inputs.

    Args:
        matrix: One slice W_i, `[n/(k·p), p·f]`, with p the positions of the fold scheme.
        moment: Second moment of the layer's unfolded inputs.
        slices: Number of slices k.
        index: Which slice i.
        rank: The largest rank j that needs an encoder; 0 for none.

    Returns:
        As for `slice_spectrum`.
    """
    root = _thin_root(moment, slices, index)
    if root is None:
        return slice_spectrum(matrix, moment.encoder_block(slices, index), rank)
    return _spectrum(matrix, *_gram_of_few(matrix, root, moment.ridge), rank)


def seen_basis(
    matrix: Float64, moment: SecondMoment, slices: int, index: int, rank: int
) -> Float64:
    """Only the encoders of `seen_spectrum`; for wide slices, no other vectors are computed."""
    root = _thin_root(moment, slices, index)
    if root is None:
        return seen_spectrum(matrix, moment, slices, index, rank)[1]
    gram, whitened = _gram_of_few(matrix, root, moment.ridge)
    leading = [len(gram) - rank, len(gram) - 1]
    vectors = scipy.linalg.eigh(gram, subset_by_index=leading, check_finite=False)[1]
    return _basis(matrix, whitened, vectors[:, ::-1])


def _thin_root(moment: SecondMoment, slices: int, index: int) -> Float64 | None:
    return moment.thin_root(slices, index) if moment.positions == 1 else None


def slice_spectrum(matrix: Float64, block: Float64, rank: int) -> tuple[Float64, Float64]:
    """Squared singular values of C_i W_i, ascending, and encoders for all ranks up to `rank`.

    Args:
        matrix: One slice W_i, `[n/k, f]`.
        block: S_ii + ρI, `[n/k, n/k]`.
        rank: The largest rank j that needs an encoder; 0 for none.

    Returns:
        The squares, and an orthonormal basis `[n/k, rank]`: its first j columns are the encoder of
        the best approximation of rank j.
    """
    return _spectrum(matrix, *_gram(matrix, block), rank)


def _spectrum(
    matrix: Float64, gram: Float64, whitened: Float64 | None, rank: int
) -> tuple[Float64, Float64]:
    if not rank:
        found = gram[0] if gram.size == 1 else np.asarray(np.linalg.eigvalsh(gram), np.float64)
        return found, np.empty((matrix.shape[0], 0))
    values, vectors = np.linalg.eigh(gram)
    return values, _basis(matrix, whitened, vectors[:, : -rank - 1 : -1])


def _basis(matrix: Float64, whitened: Float64 | None, vectors: Float64) -> Float64:
    """The orthonormal encoders for the leading eigenvectors of the Gram matrix."""
    if whitened is not None:
        vectors = whitened.T @ vectors
        vectors /= np.maximum(np.linalg.norm(vectors, axis=0), np.finfo(np.float64).tiny)
    return np.linalg.qr(matrix @ vectors)[0]


def _gram(matrix: Float64, block: Float64) -> tuple[Float64, Float64 | None]:
    """The smaller Gram matrix of C_i W_i; and C_i W_i itself if it is that of the rows."""
    if matrix.shape[0] >= matrix.shape[1]:
        gram = matrix.T @ (block @ matrix)
        return (gram + gram.T) / 2, None
    whitened = square_root(block, RIDGE) @ matrix
    return whitened @ whitened.T, whitened


def _gram_of_few(matrix: Float64, root: Float64, ridge: float) -> tuple[Float64, Float64 | None]:
    """The same if S_ii = Aᵀ A has a root A with few rows."""
    seen = root @ matrix
    if matrix.shape[0] >= matrix.shape[1]:
        return seen.T @ seen + ridge * (matrix.T @ matrix), None
    # With A Aᵀ = P Λ Pᵀ, √ρ I + Aᵀ P (√(Λ + ρI) + √ρ I)⁻¹ Pᵀ A is a root of S_ii + ρI.
    values, vectors = np.linalg.eigh(root @ root.T)
    scale = 1 / (np.sqrt(np.maximum(values, 0.0) + ridge) + np.sqrt(ridge))
    whitened = root.T @ ((vectors * scale) @ (vectors.T @ seen))
    whitened += np.sqrt(ridge) * matrix
    return whitened @ whitened.T, whitened
