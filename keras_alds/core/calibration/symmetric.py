"""Large symmetric matrices; only the upper half is kept and computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keras_alds.core.slicing import Array
from keras_alds.core.spectra import Float64

#: Rows of a strip. A matrix with at most twice as many is kept whole.
STRIP = 512


class SymmetricMatrix:
    """A symmetric matrix of float64, kept as strips of rows from the diagonal on.

    Args:
        side: Number of rows. All entries are zero at first.
        strips: The strips, if known.

    Example:
        >>> matrix = SymmetricMatrix(2)
        >>> matrix.add(0, np.array([[1.0, 2.0]]))
        >>> matrix.part(0, 2).tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """

    def __init__(self, side: int, strips: list[Float64] | None = None) -> None:
        self.side = side
        self._bounds = strip_bounds(side)
        self._strips = strips or [np.zeros((stop - r, side - r)) for r, stop in self._bounds]

    @classmethod
    def of(cls, matrix: Float64) -> SymmetricMatrix:
        """Makes one from an array `[n, n]`."""
        side = matrix.shape[0]
        return cls(side, [matrix[r:stop, r:].copy() for r, stop in strip_bounds(side)])

    @classmethod
    def sum(cls, matrices: Sequence[SymmetricMatrix], weights: Sequence[float]) -> SymmetricMatrix:
        """The weighted sum of matrices, a new one."""
        strips = [
            sum(weight * strip for weight, strip in zip(weights, parts, strict=True))
            for parts in zip(*(matrix._strips for matrix in matrices), strict=True)
        ]
        return cls(matrices[0].side, strips)

    def __len__(self) -> int:
        """The number of strips."""
        return len(self._strips)

    def add(self, strip: int, rows: Array) -> None:
        """Adds rowsᵀ·rows to one strip, computed in the rows' precision.

        Args:
            strip: Index of the strip.
            rows: Array `[m, n]`.
        """
        start, stop = self._bounds[strip]
        # With a single strip both sides are the same array, and BLAS computes half the product.
        right = rows[:, start:]
        left = right if stop == self.side and start == 0 else rows[:, start:stop]
        self._strips[strip] += left.T @ right

    def add_sum(self, other: SymmetricMatrix) -> None:
        """Adds another matrix."""
        for mine, others in zip(self._strips, other._strips, strict=True):
            mine += others

    def trace(self) -> float:
        """The sum of the diagonal."""
        return float(sum(np.trace(strip) for strip in self._strips))

    def part(self, start: int, stop: int) -> Float64:
        """A new array of rows and columns `start` to `stop`."""
        result = np.empty((stop - start, stop - start))
        for (top, bottom), strip in zip(self._bounds, self._strips, strict=True):
            first, last = max(top, start), min(bottom, stop)
            if first < last:
                found = strip[first - top : last - top, first - top : stop - top]
                result[first - start : last - start, first - start :] = found
                result[last - start :, first - start : last - start] = found[:, last - first :].T
        return result

    def columns(self, start: int, matrix: Float64) -> Float64:
        """S[:, start : start + m] · matrix, for an array `[m, p]`."""
        stop = start + matrix.shape[0]
        result = np.zeros((self.side, matrix.shape[1]))
        for (top, bottom), strip in zip(self._bounds, self._strips, strict=True):
            first = max(top, start)
            if first < stop:
                right = matrix[first - start :]
                result[top:bottom] += strip[:, first - top : stop - top] @ right
            last = min(bottom, stop)
            if first < last and bottom < self.side:
                below = strip[first - top : last - top, bottom - top :]
                result[bottom:] += below.T @ matrix[first - start : last - start]
        return result

    def permuted(self, order: Array) -> SymmetricMatrix:
        """S[order][:, order], a new matrix."""
        return SymmetricMatrix.of(self.part(0, self.side)[np.ix_(order, order)])

    def reordered(self, order: Array, scale: float) -> SymmetricMatrix:
        """Scale · S[order][:, order]; empties this matrix."""
        whole = self.part(0, self.side)
        self._strips = []
        if len(self._bounds) == 1:
            whole = scale * whole[np.ix_(order, order)]
            return SymmetricMatrix(self.side, [(whole + whole.T) / 2])
        strips = [whole[np.ix_(order[r:stop], order[r:])] for r, stop in self._bounds]
        for strip in strips:
            strip *= scale
        return SymmetricMatrix(self.side, strips)


def strip_bounds(side: int) -> list[tuple[int, int]]:
    """First row and end of every strip of a matrix with `side` rows."""
    height = STRIP if side > 2 * STRIP else max(side, 1)
    return [(start, min(start + height, side)) for start in range(0, side, height)]
