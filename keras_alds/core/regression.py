"""Regression of a layer's original outputs on its inputs in a network that has changed.

Source: Zhang et al., "Accelerating Very Deep Convolutional Networks", TPAMI 2016 (arXiv
1505.06798), for reconstructing outputs from the inputs of now.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor

import numpy as np

from keras_alds.core.blas import single_threaded_blas
from keras_alds.core.moments import MomentAccumulator, SecondMoment, moment_blocks
from keras_alds.core.semidefinite import solve
from keras_alds.core.slicing import Array, kernel_sizes
from keras_alds.core.spectra import Float64

#: Candidates of ρ, as a part of the mean eigenvalue of Ŝ; held-out inputs choose.
TARGET_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)


class PairAccumulator:
    """Adds up what is needed to fit a layer's original outputs to its inputs of now.

    With x̂ an unfolded input in a network that has changed and x the same one in the original
    network, the dense kernel that gives the original outputs best is that of ridge regression,

        W* = (Ŝ + ρI)⁻¹ (E[x̂ xᵀ] + ρI) W,  Ŝ = E[x̂ x̂ᵀ].

    ρ, as a part of tr(Ŝ)/n, is one of `TARGET_RIDGES`; ρ = ∞ leaves W. E[x̂ xᵀ] W = E[x̂ yᵀ] with
    y = Wᵀx is added up, which has f columns instead of n. Where Ŝ is kept in diagonal blocks so is
    E[x̂ xᵀ]. Precision and order are those of `MomentAccumulator`.

    Args:
        kernel: The original kernel W, `[*spatial, c, f]`.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> pairs = PairAccumulator(np.eye(2))
        >>> x = np.array([[1.0, 2.0], [3.0, 1.0]])
        >>> pairs.add_parts([([2 * x], [x])], ThreadPoolExecutor(1))
        >>> np.abs(pairs.result(1e-4)[1]).round(3).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """

    def __init__(self, kernel: Array) -> None:
        self.kernel = kernel
        c, kappa, f = kernel_sizes(kernel.shape)
        self._moments = MomentAccumulator(c, kappa)
        b = moment_blocks(c, kappa)
        # Position-major as the patches are: [b, κ·c/b, f].
        rows = kernel.reshape(kappa, b, c // b, f).swapaxes(0, 1)
        self._columns = np.ascontiguousarray(rows).reshape(b, -1, f)
        self._cross = np.zeros(self._columns.shape)
        self._differ = False
        self._targets: list[Array] = []

    @property
    def side(self) -> int:
        """The number of unfolded inputs."""
        return self._moments.channels * self._moments.kappa

    def add_parts(
        self, parts: Sequence[tuple[Iterable[Array], Iterable[Array] | None]], executor: Executor
    ) -> None:
        """Adds unfolded inputs, several parts side by side.

        Args:
            parts: `(chunks of x̂, chunks of x)` as `MomentAccumulator.add` takes them; None in
                place of the second where x is x̂.
            executor: A pool of threads.
        """
        for sums, cross, count in executor.map(self._part, parts):
            self._moments.sums += sums
            self._moments.count += count
            self._cross += cross

    def _part(
        self, part: tuple[Iterable[Array], Iterable[Array] | None]
    ) -> tuple[Float64, Float64, int]:
        sums, cross = np.zeros_like(self._moments.sums), np.zeros_like(self._cross)
        count = 0
        self._differ = self._differ or part[1] is not None
        for i, x_hat, y in self._blocks(part):
            sums[i] += x_hat.T @ x_hat
            cross[i] += x_hat.T @ y
            count += x_hat.shape[0] if i == 0 else 0
        return sums, cross, count

    def _blocks(
        self, part: tuple[Iterable[Array], Iterable[Array] | None]
    ) -> Iterator[tuple[int, Array, Array]]:
        """Every block's inputs x̂ and what they are to give, Wᵀx."""
        now, before = part
        b, side = self._moments.sums.shape[:2]
        kappa = self._moments.kappa
        pairs: Iterable[tuple[Array, Array]] = (
            ((chunk, chunk) for chunk in now) if before is None else zip(now, before, strict=True)
        )
        with single_threaded_blas():
            for pair in pairs:
                rows = pair[0].shape[0]
                split = [chunk.reshape(rows, kappa, b, -1) for chunk in pair]
                for i in range(b):
                    x_hat, x = (chunk[:, :, i].reshape(rows, side) for chunk in split)
                    yield i, x_hat, x @ self._columns[i].astype(x.dtype, copy=False)

    def held_out_errors(
        self,
        parts: Sequence[tuple[Iterable[Array], Iterable[Array] | None]],
        executor: Executor,
    ) -> Float64:
        """Σ‖y − W*ᵀx̂‖² over inputs that were not added, for the W* of all `TARGET_RIDGES`.

        Args:
            parts: As for `add_parts`; no more is to be added before the last of these calls.
            executor: A pool of threads.
        """
        if not self._differ:
            return np.zeros(len(TARGET_RIDGES))
        if not self._targets:
            self._targets = [self._target(ridge) for ridge in TARGET_RIDGES]

        def errors(part: tuple[Iterable[Array], Iterable[Array] | None]) -> Float64:
            found = np.zeros(len(self._targets))
            for i, x_hat, y in self._blocks(part):
                for n, target in enumerate(self._targets):
                    rest = y - x_hat @ target[i]
                    found[n] += float(np.vdot(rest, rest))
            return found

        return sum(executor.map(errors, parts), start=np.zeros(len(TARGET_RIDGES)))

    def _target(self, ridge: float) -> Array:
        """W* of the sums so far, `[b, κ·c/b, f]`, in the kernel's dtype."""
        b, side = self._moments.sums.shape[:2]
        count = self._moments.count
        mean = float(np.trace(self._moments.sums, axis1=1, axis2=2).sum()) / (count * b * side)
        if mean == 0 or ridge == math.inf:
            return self._columns
        target = np.empty_like(self._columns)
        diagonal = np.diag_indices(side)
        with single_threaded_blas():
            for i, rows in enumerate(self._columns):
                block = self._moments.sums[i] / count
                block[diagonal] += ridge * mean
                target[i] = solve(block, self._cross[i] / count + ridge * mean * rows)
        return target

    def result(self, ridge: float) -> tuple[SecondMoment, Array]:
        """Ŝ and the target kernel W* in the kernel's dtype; ends the adding.

        Args:
            ridge: ρ as a part of the mean eigenvalue of Ŝ, `math.inf` for W* = W.

        Raises:
            ValueError: If nothing was added.
        """
        if self._moments.count == 0 or not self._differ:
            return self._moment(), self.kernel
        c, kappa, f = kernel_sizes(self.kernel.shape)
        target = self._target(ridge).reshape(-1, kappa, c // len(self._columns), f)
        return self._moment(), target.swapaxes(0, 1).reshape(self.kernel.shape)

    def _moment(self) -> SecondMoment:
        return dataclasses.replace(self._moments.moment(), mean=None)  # means are not added up
