"""Errors on inputs to which nothing was fitted, and the ridge ρ that makes them smallest.

Factors that are fitted to a few inputs look better on these than on others. So a part of the
inputs is held out. The factors are fitted to the rest, with S + ρI, and their errors are those on
the held-out part, J = E[x xᵀ]: tr(Rᵀ J R) / tr(Wᵀ J W) with R = W − Ŵ. This costs little more than
the errors on the fitted inputs, for all ranks at once. With the encoders E, L Lᵀ = Eᵀ(S + ρI)E and
B = L⁻¹ Eᵀ(S + ρI)W, the jointly refitted approximation is Ŵ = E L⁻ᵀ B. Its leading parts are those
of the smaller ranks, and tr(Rᵀ J R) follows from L⁻¹ Eᵀ J E L⁻ᵀ, L⁻¹ Eᵀ J W and B Bᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor

import numpy as np
import scipy.linalg

from keras_alds.core.calibration.moments import (
    RIDGE,
    SecondMoment,
    at_positions,
    check_moment,
    rows_by_position,
)
from keras_alds.core.calibration.whitening import output_spectra_many, seen_spectrum
from keras_alds.core.parallel import map_within, single_threaded_blas, threads
from keras_alds.core.slicing import Array, divisors, full_rank, largest_rank, unfold, weights
from keras_alds.core.spectra import Float64, SliceSpectrum, Spectra

#: Candidates of ρ, as parts of the mean eigenvalue of S.
RIDGES = (RIDGE, 1e-3, 1e-2, 0.1, 0.5, 2.0)
#: Inputs per row of S from which ρ hardly matters.
PLENTY = 200.0
# Cubed sizes of the systems that are solved for a layer. Above it, numbers of slices are left out,
# as long as more than a few are left.
_MOST_WORK, _FEWEST = 2e10, 6
# The columns of a kernel that are looked at to choose ρ.
_COLUMNS = 256


def held_out_spectra_many(
    kernels: Sequence[Array],
    moments: Sequence[SecondMoment],
    ranks: Sequence[Mapping[int, int]] | None = None,
    *,
    executor: Executor | None = None,
) -> list[Spectra]:
    """`output_spectra_many`, with errors on the held-out inputs of the moments that have some.

    Args:
        kernels: Real arrays `[*spatial, c, f]`.
        moments: Their second moments, folded if the kernels are read in another fold scheme.
        ranks: The largest rank that matters by number of slices k, for every kernel; larger ones
            get its error. Of a wide layer, only some k are looked at. Defaults to all that make a
            kernel smaller. Without held-out inputs, all ranks get their own error.
        executor: As for `output_spectra_many`.

    Returns:
        One `Spectra` per kernel, in order. Errors may grow with the rank, where more factors fit
        the inputs better and others worse.

    Raises:
        ValueError: As for `output_spectra`.
    """
    wanted = [None] * len(kernels) if ranks is None else list(ranks)
    found: dict[int, Spectra] = {}
    judged = [n for n, m in enumerate(moments) if m.held_out is not None or m.positions > 1]
    others = [n for n in range(len(kernels)) if n not in set(judged)]
    with single_threaded_blas(), threads(executor) as executor:
        parts = output_spectra_many(
            [kernels[n] for n in others],
            [moments[n] for n in others],
            slices=_union([wanted[n] for n in others]),
            executor=executor,
        )
        found.update(zip(others, parts, strict=True))
        layers = {n: _Judged(kernels[n], moments[n]) for n in judged}
        works = [
            (k, n, first, most)
            for n, layer in layers.items()
            for k, most in _ranks(
                layer.kernel.shape, layer.fit.block_count, layer.positions, wanted[n]
            ).items()
            for first in range(0, k, k // layer.fit.block_count)
        ]
        works.sort()  # the largest matrices first
        curves = map_within(
            executor,
            _errors_of,
            [(layers[n], k, first, most) for k, n, first, most in works],
            [layers[n].bytes(k, most) for k, n, _, most in works],
        )
        sums: dict[int, dict[int, Float64]] = {n: {} for n in judged}
        for (k, n, *_), curve in zip(works, curves, strict=True):
            sums[n][k] = sums[n].get(k, 0.0) + curve
    for n, layer in layers.items():
        found[n] = layer.spectra(sums[n])
    return [found[n] for n in range(len(kernels))]


def best_ridge(kernel: Array, moment: SecondMoment) -> float:
    """The ρ, as a part of the mean eigenvalue of S, with the least error on held-out inputs.

    The joint refit of all slices depends on ρ most. So its error is computed for several ρ, for one
    choice: about half of the kernel's weights, in slices of medium width.

    Args:
        kernel: Array `[*spatial, c, f]`.
        moment: Second moment of the layer's unfolded inputs, with held-out ones.

    Returns:
        One of `RIDGES`; or the moment's own ρ without held-out inputs, or with plenty of inputs.
    """
    kernel = check_moment(kernel, moment)
    if moment.held_out is None or moment.count >= PLENTY * moment.side:
        return moment.relative_ridge
    shape, blocks = kernel.shape, moment.block_count
    allowed = [k for k, most in _ranks(shape, blocks, 1).items() if most > 1]
    if not allowed:
        return moment.relative_ridge
    slices = min(allowed, key=lambda k: abs(math.log(k * k / (blocks * shape[-2]))))
    columns = np.linspace(0, shape[-1], min(shape[-1], _COLUMNS), endpoint=False).astype(int)
    layer = _Judged(kernel[..., columns], moment)
    rank = max(1, math.prod(shape) // (2 * weights(shape, slices, 1)))
    rank = min(rank, full_rank(layer.kernel.shape, slices))
    with single_threaded_blas():
        errors = sum(
            layer.errors_of_ridges(slices, first, rank)
            for first in range(0, slices, slices // blocks)
        )
    return RIDGES[int(np.argmin(errors))]


def _ranks(
    shape: Sequence[int], blocks: int, positions: int, wanted: Mapping[int, int] | None = None
) -> dict[int, int]:
    """The largest rank that is wanted and makes a kernel smaller, by number of slices.

    Of a wide layer, only some numbers of slices are looked at.
    """
    every = {
        k: largest_rank(shape, k) if wanted is None else min(largest_rank(shape, k), wanted[k])
        for k in (divisors(shape[-2]) if wanted is None else sorted(wanted))
        if k % blocks == 0 and shape[-2] % k == 0
    }
    found = every = {k: most for k, most in every.items() if most}
    left = len(every)
    while left > _FEWEST and _work(found, blocks, positions) > _MOST_WORK:
        left -= 1
        kept = np.linspace(0, len(every) - 1, left).round().astype(int)
        found = {k: every[k] for k in np.array([*every])[kept].tolist()}
    return found


def _union(slices: Sequence[Collection[int] | None]) -> tuple[int, ...] | None:
    if None in slices:
        return None
    return tuple(sorted({k for some in slices for k in some or ()}))


def _work(ranks: Mapping[int, int], blocks: int, positions: int) -> float:
    sides = (k // blocks * positions * most for k, most in ranks.items())
    return sum(float(blocks * side**3) for side in sides)


class _Judged:
    """A kernel, and the moments of the inputs to fit and to judge it."""

    def __init__(self, kernel: Array, moment: SecondMoment) -> None:
        self.kernel = check_moment(kernel, moment)
        self.positions = moment.positions
        self.fit = moment.without_held_out()
        held_out = moment.held_out
        self.judge = moment if held_out is None else held_out.with_ridge(RIDGE)
        self.energy = sum(
            self.judge.energy(i, rows_by_position(part[None].astype(np.float64), self.positions))
            for i, part in enumerate(unfold(kernel, moment.block_count))
        )

    def bytes(self, slices: int, most: int) -> int:
        """Approximate bytes to compute `errors`."""
        parts = slices // self.fit.block_count * self.positions
        size, rows = parts * most, self.fit.block_side
        filters = self.kernel.shape[-1] // self.positions
        return 8 * (rows * filters + size * (4 * size + 2 * rows // parts))

    def errors(self, slices: int, first: int, most: int) -> Float64:
        """tr(Rᵀ J R) of the slices of one block after their joint refit, for ranks 0 to `most`."""
        fit, judge = self.fit, self.judge
        bases, rows, block = self._bases(slices, first, most, fit)
        first *= self.positions
        fitted = _encoded(bases, fit.columns(fit.block_count, block, rows))
        triangle = _triangle(fit.gram(bases, first))
        solve = scipy.linalg.solve_triangular
        B = solve(triangle, fitted, lower=True, check_finite=False)
        if judge is fit:  # L⁻¹ Eᵀ J E L⁻ᵀ = I and C = B
            added = -np.square(B).sum(axis=1)
        else:
            judged = _encoded(bases, judge.columns(fit.block_count, block, rows))
            C = solve(triangle, judged, lower=True, check_finite=False)
            # Its lower half, at half the cost of two triangular systems.
            gram = judge.gram(bases, first).T  # symmetric, and in Fortran order
            G, _ = scipy.linalg.lapack.dsygst(gram, triangle, lower=True, overwrite_a=True)
            G *= B @ B.T
            added = 2 * np.tril(G, -1).sum(axis=1) + G.diagonal() - 2 * (B * C).sum(axis=1)
        total = judge.energy(block, rows)
        steps = np.cumsum(added.reshape(most, -1).sum(axis=1))
        return np.maximum(np.concatenate([[total], total + steps]), 0.0)

    def errors_of_ridges(self, slices: int, first: int, rank: int) -> Float64:
        """tr(Rᵀ J R) of the slices of one block after their joint refit, for all `RIDGES`.

        With orthonormal E and EᵀSE = U Λ Uᵀ, the refit is D = U (Λ + ρI)⁻¹ Uᵀ (EᵀSW + ρ EᵀW).
        """
        fit = self.fit.with_ridge(RIDGES[0])
        bases, rows, block = self._bases(slices, first, rank, fit)
        own = _encoded(bases, rows)
        fitted = _encoded(bases, fit.columns(fit.block_count, block, rows))
        judged = _encoded(bases, self.judge.columns(fit.block_count, block, rows))
        values, U = np.linalg.eigh(fit.gram(bases, first))
        fitted, own = U.T @ fitted, U.T @ own
        total, gram = self.judge.energy(block, rows), self.judge.gram(bases, first)
        mean = fit.ridge / RIDGES[0]
        errors = []
        for relative in RIDGES:
            added = (relative - RIDGES[0]) * mean
            D = U @ ((fitted + added * own) / np.maximum(values + added, 1e-300)[:, None])
            errors.append(total - 2 * np.vdot(D, judged) + np.vdot(D, gram @ D))
        return np.array(errors)

    def _bases(
        self, slices: int, first: int, most: int, fit: SecondMoment
    ) -> tuple[Float64, Float64, int]:
        """The encoders of the slices of one block, the rows of the kernel, and the block."""
        count = slices // fit.block_count
        matrices = unfold(self.kernel, slices)[first : first + count].astype(np.float64)
        bases = np.stack(
            [seen_spectrum(w, fit, slices, first + i, most)[1] for i, w in enumerate(matrices)]
        )
        rows = rows_by_position(matrices, self.positions)
        return at_positions(bases, self.positions), rows, first // count

    def spectra(self, sums: dict[int, Float64]) -> Spectra:
        curves = {}
        for k in sorted(sums):
            rank = full_rank(self.kernel.shape, k)
            energy = np.zeros(rank + 1)
            energy[: len(sums[k])] = sums[k]
            energy[len(sums[k]) : -1] = sums[k][-1]
            curves[k] = SliceSpectrum(np.sqrt(energy), energy)
        norm = math.sqrt(self.energy)
        return Spectra(tuple(self.kernel.shape), norm, self.energy, curves)


def _encoded(bases: Float64, rows: Float64) -> Float64:
    """Eᵀ M for the rows M of one block, ordered by rank."""
    count, width, most = bases.shape
    parts = bases.transpose(0, 2, 1) @ rows.reshape(count, width, -1)
    return parts.transpose(1, 0, 2).reshape(most * count, -1)


def _errors_of(layer: _Judged, slices: int, first: int, most: int) -> Float64:
    with single_threaded_blas():
        return layer.errors(slices, first, most)


def _triangle(gram: Float64, added: float = np.finfo(np.float64).eps) -> Float64:
    """The Cholesky factor of a Gram matrix, with a larger ρ if rounding exceeds it."""
    try:
        return scipy.linalg.cholesky(gram.T, lower=True, check_finite=False)
    except np.linalg.LinAlgError:
        if added > 1:
            raise
        size = max(float(np.trace(gram)), np.finfo(np.float64).tiny)
        return _triangle(gram + added * size * np.eye(len(gram)), 100 * added)
