"""Regression of a layer's original outputs on its inputs in a changed network.

Let x̂ be an unfolded input in the changed network and x the same one in the original network. The
dense kernel that reproduces the original outputs best is that of ridge regression,

    W* = (Ŝ + ρI)⁻¹ (E[x̂ xᵀ] + ρI) W,  Ŝ = E[x̂ x̂ᵀ].

For a wide layer with few inputs x̂, the m rows of X̂, it comes from a system of m equations instead
of n,

    W* = W + X̂ᵀ (X̂ X̂ᵀ + mρI)⁻¹ (Y − X̂ W),  Y = X W.

Source: Zhang et al., "Accelerating Very Deep Convolutional Networks", TPAMI 2016 (arXiv
1505.06798), for reconstructing outputs from the current inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor

import numpy as np

from keras_alds.core.calibration.moments import (
    FewInputs,
    SecondMoment,
    are_few,
    default_ridge,
    moment_blocks,
)
from keras_alds.core.calibration.semidefinite import solve
from keras_alds.core.calibration.symmetric import SymmetricMatrix, strip_bounds
from keras_alds.core.parallel import single_threaded_blas
from keras_alds.core.slicing import Array, kernel_sizes
from keras_alds.core.spectra import Float64

#: Candidates of ρ, as a part of the mean eigenvalue of Ŝ; held-out inputs decide.
TARGET_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)

# Inputs with a smaller mean square count as zero: float32 does not resolve their products.
_LEAST_SQUARE = 1e-30
# Parts of a product that threads compute in parallel.
_PARTS = 4

_Part = tuple[Iterable[Array], Iterable[Array] | None]
# The inputs x̂ of one block, and their target outputs.
_Rows = tuple[Array, Array]


class PairAccumulator:
    """Accumulates the sums to fit a layer's original outputs from its current inputs.

    ρ, as a part of tr(Ŝ)/n, is one of `TARGET_RIDGES`; ρ = ∞ keeps W. E[x̂ xᵀ] W is summed as
    E[x̂ yᵀ] with y = Wᵀx, which has f columns instead of n. If Ŝ is kept in diagonal blocks, so is
    E[x̂ xᵀ]. Precision and order are as in `MomentAccumulator`.

    Args:
        kernel: The original kernel W, `[*spatial, c, f]`.
        overwrite: Whether `result` may overwrite it with W*, to avoid copies of large kernels.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> pairs = PairAccumulator(np.eye(2))
        >>> x = np.repeat([[1.0, 2.0], [3.0, 1.0]], 10, axis=0)
        >>> pairs.add_parts([([2 * x], [x])], ThreadPoolExecutor(1))
        >>> np.abs(pairs.result(1e-4)[1]).round(3).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """

    def __init__(self, kernel: Array, *, overwrite: bool = False) -> None:
        self.kernel = kernel
        self._overwrite = overwrite and kernel.flags.writeable
        self._channels, self._kappa, f = kernel_sizes(kernel.shape)
        self._blocks = b = moment_blocks(self._channels, self._kappa)
        self._side = self.side // b
        # Position-major like the patches: [b, κ·c/b, f].
        rows = kernel.reshape(self._kappa, b, self._channels // b, f).swapaxes(0, 1)
        self._columns = np.ascontiguousarray(rows).reshape(b, -1, f)
        self._count = 0
        self._differ = False
        # For every block, the rows of inputs and outputs, kept while inputs are few.
        self._few: list[list[_Rows]] = [[] for _ in range(b)]
        self._sums: list[SymmetricMatrix] = []
        self._cross = np.zeros((0, 0, 0))
        self._fits: list[_Target] = []

    @property
    def side(self) -> int:
        """The number of unfolded inputs."""
        return self._channels * self._kappa

    def add_parts(self, parts: Sequence[_Part], executor: Executor) -> None:
        """Adds unfolded inputs, several parts in parallel.

        Args:
            parts: `(chunks of x̂, chunks of x)` as for `MomentAccumulator.add`; the second is
                None if x is x̂.
            executor: A pool of threads.
        """
        self._fits = []
        self._differ = self._differ or any(before is not None for _, before in parts)
        if len(strip_bounds(self._side)) > 1:
            with single_threaded_blas():
                for part in parts:
                    for rows in self._split(part, executor):
                        self._add_wide(rows, executor)
            return
        self._start_sums()
        for sums, cross, count in executor.map(self._part_sum, parts):
            self._count += count
            self._cross += cross
            for mine, one in zip(self._sums, sums, strict=True):
                mine.add_sum(one)

    def _start_sums(self) -> None:
        if not self._sums:
            self._sums = [SymmetricMatrix(self._side) for _ in range(self._blocks)]
            self._cross = np.zeros(self._columns.shape)

    def _part_sum(self, part: _Part) -> tuple[list[SymmetricMatrix], Float64, int]:
        """The sums of one part, for a layer that is not wide."""
        sums = [SymmetricMatrix(self._side) for _ in range(self._blocks)]
        cross, count = np.zeros_like(self._cross), 0
        with single_threaded_blas():
            for rows in self._split(part):
                for i, (x_hat, y) in enumerate(rows):
                    sums[i].add(0, x_hat)
                    cross[i] += x_hat.T @ y
                count += rows[0][0].shape[0]
        return sums, cross, count

    def _add_wide(self, rows: list[_Rows], executor: Executor) -> None:
        """Keeps inputs while they are few, else adds them to the sums, strips in parallel."""
        self._count += rows[0][0].shape[0]
        if not self._sums and are_few(self._count, self._side):
            for kept, pair in zip(self._few, rows, strict=True):
                kept.append(pair)
            return
        self._start_sums()
        bounds = strip_bounds(self._side)

        def add(item: tuple[int, int, _Rows]) -> None:
            i, strip, (x_hat, y) = item
            start, stop = bounds[strip]
            with single_threaded_blas():
                self._sums[i].add(strip, x_hat)
                self._cross[i, start:stop] += x_hat[:, start:stop].T @ y

        few, self._few = self._few, [[] for _ in range(self._blocks)]
        for i, pair in enumerate(rows):
            for each in (*few[i], pair):
                work = [(i, strip, each) for strip in range(len(bounds))]
                for _ in executor.map(add, work):
                    pass

    def _split(self, part: _Part, executor: Executor | None = None) -> Iterator[list[_Rows]]:
        """Every chunk's inputs x̂ and their targets Wᵀx, for every block."""
        now, before = part
        pairs: Iterable[tuple[Array, Array]] = (
            ((chunk, chunk) for chunk in now) if before is None else zip(now, before, strict=True)
        )
        for pair in pairs:
            rows = pair[0].shape[0]
            split = [chunk.reshape(rows, self._kappa, self._blocks, -1) for chunk in pair]
            found = []
            for i, columns in enumerate(self._columns):
                x_hat, x = (chunk[:, :, i].reshape(rows, -1) for chunk in split)
                found.append((x_hat, _product(x, columns.astype(x.dtype, copy=False), executor)))
            yield found

    def held_out_errors(self, parts: Sequence[_Part], executor: Executor) -> Float64:
        """Σ‖y − W*ᵀx̂‖² over held-out inputs, for the W* of all `TARGET_RIDGES`.

        Args:
            parts: As for `add_parts`; add no more inputs before the last of these calls.
            executor: A pool of threads.
        """
        if not self._differ:
            return np.zeros(len(TARGET_RIDGES))
        if not self._fits:
            with single_threaded_blas():
                self._fits = [self._fit(i) for i in range(self._blocks)]
                for fit in self._fits:
                    fit.prepare()

        def errors(part: _Part) -> Float64:
            found = np.zeros(len(TARGET_RIDGES))
            with single_threaded_blas():
                for rows in self._split(part):
                    for fit, (x_hat, y) in zip(self._fits, rows, strict=True):
                        found += fit.errors(x_hat, y)
            return found

        return sum(executor.map(errors, parts), start=np.zeros(len(TARGET_RIDGES)))

    def _fit(self, block: int) -> _Target:
        columns = self._columns[block]
        if not self._sums:
            return _FewTarget(columns, *self._few_rows(block), self._mean())
        return _SummedTarget(
            columns, self._sums[block], self._cross[block], self._count, self._mean()
        )

    def _few_rows(self, block: int) -> _Rows:
        x_hat, y = zip(*self._few[block], strict=True)
        if len(x_hat) > 1:
            self._few[block] = [(np.concatenate(x_hat), np.concatenate(y))]
        return self._few[block][0]

    def _mean(self) -> float:
        """The mean eigenvalue of Ŝ, 0 if it is too small to be meaningful."""
        if self._sums:
            trace = sum(matrix.trace() for matrix in self._sums)
        else:
            rows = [x_hat for kept in self._few for x_hat, _ in kept]
            trace = sum(float(np.square(x_hat, dtype=np.float64).sum()) for x_hat in rows)
        mean = trace / (self._count * self.side)
        return mean if mean >= _LEAST_SQUARE else 0.0

    def result(self, ridge: float) -> tuple[SecondMoment, Array]:
        """Ŝ and the target kernel W* in the kernel's dtype; ends the accumulation.

        Args:
            ridge: ρ as a part of the mean eigenvalue of Ŝ, `math.inf` for W* = W. The default
                of Ŝ is used if it is larger.

        Raises:
            ValueError: If nothing was added.
        """
        if self._count == 0:
            raise ValueError("Expected at least one unfolded input. Received: none")
        self._fits = []
        ridge = max(ridge, default_ridge(self.side, self._count))
        target = self.kernel
        if self._differ and ridge != math.inf and self._mean() > 0:
            found = self._columns if self._overwrite else np.empty_like(self._columns)
            with single_threaded_blas():
                for i in range(self._blocks):
                    found[i] = self._fit(i).kernel(ridge)
            parts = found.reshape(self._blocks, self._kappa, self._channels // self._blocks, -1)
            target = parts.swapaxes(0, 1).reshape(self.kernel.shape)
        return self._moment(), target

    def _moment(self) -> SecondMoment:
        """Ŝ, rows channel-major; without means."""
        if not self._sums:
            blocks = [self._few_rows(i)[0] for i in range(self._blocks)]
            self._few = []
            parts = [
                rows.reshape(len(rows), self._kappa, -1).swapaxes(1, 2).reshape(len(rows), -1)
                for rows in blocks
            ]
            return FewInputs(np.concatenate(parts, axis=1), self._blocks, mean=False)
        order = np.arange(self._side).reshape(self._kappa, -1).T.ravel()
        blocks_of = [matrix.reordered(order, 1 / self._count) for matrix in self._sums]
        self._sums = []
        return SecondMoment(blocks_of, self._count)


class _Target:
    """W* of one block for every ρ."""

    def prepare(self) -> None:
        """Prepares `errors`, once."""

    def errors(self, x_hat: Array, y: Array) -> Float64:
        """Σ‖y − W*ᵀx̂‖² for all `TARGET_RIDGES`."""
        raise NotImplementedError

    def kernel(self, ridge: float) -> Array:
        """W* `[n/b, f]` for one ρ."""
        raise NotImplementedError


class _SummedTarget(_Target):
    """W* from the normal equations of the sums."""

    def __init__(
        self, columns: Array, sums: SymmetricMatrix, cross: Float64, count: int, mean: float
    ) -> None:
        self._columns, self._sums, self._cross = columns, sums, cross
        self._count, self._mean = count, mean
        self._kernels: list[Array] = []

    def prepare(self) -> None:
        self._kernels = [self.kernel(ridge) for ridge in TARGET_RIDGES]

    def kernel(self, ridge: float) -> Array:
        if self._mean == 0 or ridge == math.inf:
            return self._columns
        block = self._sums.part(0, self._sums.side)
        block /= self._count
        block[np.diag_indices(len(block))] += ridge * self._mean
        right = self._cross / self._count + ridge * self._mean * self._columns
        return solve(block, right, overwrite=True).astype(self._columns.dtype)

    def errors(self, x_hat: Array, y: Array) -> Float64:
        rests = (y - x_hat @ kernel for kernel in self._kernels)
        return np.array([float(np.vdot(rest, rest)) for rest in rests])


class _FewTarget(_Target):
    """W* from a system with one equation per input."""

    def __init__(self, columns: Array, x_hat: Array, y: Array, mean: float) -> None:
        self._columns, self._x_hat = columns, x_hat
        rows = x_hat.astype(np.float64)
        self._values, self._vectors = np.linalg.eigh(rows @ rows.T)
        self._added = len(rows) * mean
        rest = self._vectors.T @ (y - x_hat @ columns)
        self._rest = rest.astype(columns.dtype)

    def _damped(self, ridge: float) -> Float64:
        """The eigenvalues of (X̂ X̂ᵀ + mρI)⁻¹."""
        if self._added == 0 or ridge == math.inf:
            return np.zeros_like(self._values)
        return 1 / (np.maximum(self._values, 0.0) + ridge * self._added)

    def kernel(self, ridge: float) -> Array:
        solution = (self._vectors * self._damped(ridge)).astype(self._columns.dtype) @ self._rest
        return self._columns + self._x_hat.T @ solution

    def errors(self, x_hat: Array, y: Array) -> Float64:
        rest = y - x_hat @ self._columns
        seen = (x_hat @ self._x_hat.T) @ self._vectors
        found = []
        for ridge in TARGET_RIDGES:
            left = rest - (seen * self._damped(ridge)).astype(rest.dtype) @ self._rest
            found.append(float(np.vdot(left, left)))
        return np.array(found)


def _product(x: Array, columns: Array, executor: Executor | None) -> Array:
    if executor is None or len(x) < _PARTS:
        return x @ columns

    def product(part: Array) -> Array:
        with single_threaded_blas():  # in the worker: some libraries count by thread
            return part @ columns

    return np.concatenate(list(executor.map(product, np.array_split(x, _PARTS))))
