"""Second moments S = E[x xᵀ] of a layer's unfolded inputs x.

With x one unfolded input of a layer (a patch of a convolution's input, a row of a dense layer's),
S gives the error at the layer's output for an error of the kernel:

    E‖x W − x Ŵ‖² = tr((W − Ŵ)ᵀ S (W − Ŵ)) = ‖C (W − Ŵ)‖²_F,  S = Cᵀ C.

Inputs after a ReLU, dead channels and few images make S singular. So S + ρI replaces S wherever
errors, factors or targets are computed. For many inputs, ρ is a tiny part of the mean eigenvalue.
For few inputs it is a large part (`default_ridge`): other inputs may use a direction that is
missing in these few.

A wide dense layer gets one input per example, often fewer than S has rows. Then the inputs
themselves are kept (`FewInputs`), which saves memory and time, and S is never formed.

In the fold schemes 1 to 3 of a convolution, the encoder sees only a part of the window, at each of
the p positions that the decoder combines. All these parts together are x, so S serves every scheme.
Its rows are then ordered by position first (`folded`), and each part of a slice is like a slice of
its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from keras_alds.core.calibration.symmetric import SymmetricMatrix
from keras_alds.core.slicing import Array, divisors, kernel_sizes
from keras_alds.core.spectra import Float64, check_kernel

#: Largest side of a block of a second moment (200 MB). A layer with more unfolded inputs keeps only
#: diagonal blocks, and its numbers of slices are multiples of their number.
MAX_SIDE = 5120
#: Smallest side for which a second moment of low rank is treated as such.
WIDE_SIDE = 1024
#: ρ as a part of the mean eigenvalue of S, where S is the mean of many inputs.
RIDGE = 1e-5
#: The same for few inputs, times the rows of S per input. Errors agreed with those on other inputs
#: for ρ of 1 to 3 mean eigenvalues at 5 rows of S per input, and of 0.1 to 0.2 at 1 row.
RIDGE_OF_FEW = 0.2
#: Inputs per row of S: fewer than `FEW` are few, `MANY` or more are many.
FEW, MANY = 5.0, 7.5


class SecondMoment:
    """The second moment S = E[x xᵀ] of a layer's unfolded inputs, or its diagonal blocks.

    Args:
        blocks: Array `[b, n/b, n/b]` of float64, n = c·κ, with b = 1 for all of S; or the blocks
            as `SymmetricMatrix`. Rows are channel-major as in `keras_alds.core.slicing.unfold`.
        count: Number of averaged inputs x.
        mean: E[x], array `[n]` of float64 in the same order, or None if unknown.

    Attributes:
        relative_ridge: ρ as a part of the mean eigenvalue of S.
        ridge: ρ itself.
        held_out: The second moment of the inputs that judge, which S includes, or None.
        positions: Number p of window positions that the decoder combines; see `folded`.

    Raises:
        ValueError: If `blocks` are not square matrices, or `mean` has another length.
    """

    held_out: SecondMoment | None = None
    positions: int = 1

    def __init__(
        self, blocks: Float64 | Sequence[SymmetricMatrix], count: int, mean: Float64 | None = None
    ) -> None:
        if isinstance(blocks, np.ndarray):
            if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
                raise ValueError(
                    "Expected the blocks of a second moment, [b, n/b, n/b]. "
                    f"Received: blocks.shape={blocks.shape}"
                )
            blocks = [SymmetricMatrix.of(block) for block in blocks]
        self._matrices = tuple(blocks)
        self.count = count
        self.mean = mean
        self.block_count, self.block_side = len(blocks), blocks[0].side
        self._set_ridge(default_ridge(self.side, count))
        self._check_mean()

    def _check_mean(self) -> None:
        if self.mean is not None and self.mean.shape != (self.side,):
            raise ValueError(
                f"Expected the mean of {self.side} unfolded inputs. "
                f"Received: mean.shape={self.mean.shape}"
            )

    def _set_ridge(self, relative: float) -> None:
        self.relative_ridge = relative
        self.ridge = relative * self._trace() / self.side

    def _trace(self) -> float:
        return sum(matrix.trace() for matrix in self._matrices)

    def with_ridge(self, relative: float) -> SecondMoment:
        """The same moment with another ρ, a part of the mean eigenvalue of S."""
        result = copy.copy(self)
        result._set_ridge(relative)
        return result

    def folded(self, window: Sequence[int], axes: Sequence[int]) -> SecondMoment:
        """The same moment for a fold scheme, without means.

        Rows of a block are ordered by the position along the decoder's axes, then by channel, then
        by the position along the encoder's axes.

        Args:
            window: The kernel size κ of the convolution.
            axes: Axes of the window that the decoder owns; see `slicing.decoder_axes`.

        Raises:
            ValueError: If the moment is already folded, or the window does not fit it.
        """
        kappa = math.prod(window)
        if self.positions > 1 or self.block_side % kappa:
            raise ValueError(
                f"Expected a moment that is not folded, in blocks of a multiple of {kappa} rows. "
                f"Received: {self.positions} positions, blocks of {self.block_side} rows"
            )
        if not axes:
            return self
        rows = np.arange(self.block_side).reshape(-1, *window)
        order = np.moveaxis(rows, [axis + 1 for axis in axes], range(len(axes))).ravel()
        result = self._permuted(order)
        result.mean = None
        result.positions = math.prod(window[axis] for axis in axes)
        if self.held_out is not None:
            result.held_out = self.held_out.folded(window, axes)
        return result

    def _permuted(self, order: NDArray[np.intp]) -> SecondMoment:
        """The same moment with the rows of every block in another order."""
        result = copy.copy(self)
        result._matrices = tuple(matrix.permuted(order) for matrix in self._matrices)
        return result

    def with_held_out(self, other: SecondMoment) -> SecondMoment:
        """The moment of these inputs and others, which become the held-out ones."""
        if isinstance(self, FewInputs) and isinstance(other, FewInputs):
            rows = np.concatenate([self.rows, other.rows])
            result: SecondMoment = FewInputs(rows, self.block_count, mean=self.mean is not None)
        else:
            parts = (self, other)
            count = self.count + other.count
            matrices = [
                SymmetricMatrix.sum([p.matrix(i) for p in parts], [p.count / count for p in parts])
                for i in range(self.block_count)
            ]
            mean = None
            if self.mean is not None and other.mean is not None:
                mean = (self.count * self.mean + other.count * other.mean) / count
            result = SecondMoment(matrices, count, mean)
        result.held_out = other
        return result

    def without_held_out(self) -> SecondMoment:
        """The moment of the inputs that do not judge, with the same relative ρ."""
        other = self.held_out
        if other is None:
            return self
        count = self.count - other.count
        weights = [self.count / count, -other.count / count]
        matrices = [
            SymmetricMatrix.sum([part.matrix(i) for part in (self, other)], weights)
            for i in range(self.block_count)
        ]
        result = SecondMoment(matrices, count)
        result._set_ridge(self.relative_ridge)
        result.positions = self.positions
        return result

    def matrix(self, block: int) -> SymmetricMatrix:
        """One block of S."""
        return self._matrices[block]

    @property
    def side(self) -> int:
        """The number n of unfolded inputs."""
        return self.block_count * self.block_side

    @property
    def blocks(self) -> Float64:
        """The blocks as a new array `[b, n/b, n/b]`; large for wide layers."""
        return np.stack([self._part(i, 0, self.block_side) for i in range(self.block_count)])

    def slice_block(self, slices: int, index: int) -> Float64:
        """S_ii + ρI of one slice, a new array `[n/k, n/k]`.

        If all inputs are zero it is the identity: nothing is known, so all inputs count equally.

        Args:
            slices: Number of slices k, a multiple of the number of blocks.
            index: Which slice i.
        """
        width = self.side // slices
        if self.ridge == 0:
            return np.eye(width)
        part = self._part(*self._place(slices, index))
        part[np.diag_indices(width)] += self.ridge
        return part

    def encoder_block(self, slices: int, index: int) -> Float64:
        """S_ii + ρI of what the encoder of one slice sees: the mean over all positions.

        Args:
            slices: Number of channel slices k.
            index: Which slice i.
        """
        each = slices // self.block_count
        block, i = divmod(index, each)
        parts = slices * self.positions
        first = block * each * self.positions + i
        total = self.slice_block(parts, first)
        for position in range(1, self.positions):
            total += self.slice_block(parts, first + position * each)
        total /= self.positions
        return total

    def columns(self, slices: int, index: int, matrix: Float64, *, ridged: bool = True) -> Float64:
        """The columns of S + ρI for one slice, times a matrix.

        Args:
            slices: Number of slices k.
            index: Which slice i.
            matrix: Array `[n/k, m]`.
            ridged: Whether to include ρI.

        Returns:
            Array `[n/b, m]`: the rows of the block that contains the slice.
        """
        block, start, stop = self._place(slices, index)
        result = self._columns(block, start, matrix)
        if ridged:
            result[start:stop] += (self.ridge or 1.0) * matrix
        return result

    def encoded(self, slices: int, first: int, encoders: Float64) -> Float64:
        """(S + ρI) E for the block-diagonal E of consecutive slices: all slices of one block.

        Args:
            slices: Number of slices k.
            first: Which slice is the first one.
            encoders: Array `[k/b, n/k, j]`.

        Returns:
            Array `[n/b, k/b·j]`.
        """
        parts = [self.columns(slices, first + i, encoder) for i, encoder in enumerate(encoders)]
        return np.concatenate(parts, axis=1)

    def gram(self, encoders: Float64, first: int = 0) -> Float64:
        """Eᵀ (S + ρI) E for the block-diagonal E of consecutive slices: all slices of one block.

        Args:
            encoders: Array `[k/b, n/k, j]`.
            first: Which slice is the first one.

        Returns:
            Array `[j·k/b, j·k/b]`, the columns of all slices' encoders ordered by rank.
        """
        count, rows, rank = encoders.shape
        transposed = encoders.transpose(0, 2, 1)
        gram = np.empty((rank, count, rank, count))
        for i, encoder in enumerate(encoders):
            columns = self.columns(self.side // rows, first + i, encoder)
            gram[:, :, :, i] = (transposed @ columns.reshape(count, rows, -1)).transpose(1, 0, 2)
        return gram.reshape(rank * count, -1)

    def product(self, slices: int, first: int, matrices: Float64) -> Product:
        """An updatable (S + ρI) M for consecutive slices: all slices of one block.

        Args:
            slices: Number of slices k.
            first: Which slice is the first one.
            matrices: M, array `[k/b, n/k, m]`.
        """
        return Product(self, slices, first, matrices)

    def energy(self, block: int, matrix: Float64) -> float:
        """tr(Mᵀ (S + ρI) M) for the rows M `[n/b, m]` of one block."""
        return float(np.vdot(matrix, self.columns(self.block_count, block, matrix)))

    def times(self, matrix: Float64) -> Float64:
        """(S + ρI)·matrix for an array `[n, m]`."""
        parts = np.split(matrix, self.block_count)
        return np.concatenate(
            [self.columns(self.block_count, i, part) for i, part in enumerate(parts)]
        )

    def thin_root(self, slices: int, index: int) -> Float64 | None:
        """C_i with fewer rows than columns, for a wide slice with few inputs.

        C_iᵀ C_i = S_ii: ρ is left out.

        Args:
            slices: Number of slices k.
            index: Which slice i.

        Returns:
            Array `[m, n/k]`, or None if there is no such C_i.
        """
        return None

    def _place(self, slices: int, index: int) -> tuple[int, int, int]:
        width = self.side // slices
        block, start = divmod(index * width, self.block_side)
        return block, start, start + width

    def _part(self, block: int, start: int, stop: int) -> Float64:
        return self._matrices[block].part(start, stop)

    def _columns(self, block: int, start: int, matrix: Float64) -> Float64:
        return self._matrices[block].columns(start, matrix)


class Product:
    """(S + ρI) M of one block, updated while the rows of M change slice by slice."""

    def __init__(self, moment: SecondMoment, slices: int, first: int, matrices: Float64) -> None:
        self._moment, self._slices, self._first = moment, slices, first
        block = first * moment.block_count // slices
        rows = matrices.reshape(-1, matrices.shape[-1])
        self._product = moment.columns(moment.block_count, block, rows).reshape(matrices.shape)

    def rows(self, index: int) -> Float64:
        """The rows `[n/k, m]` of one slice, counted from the first one."""
        return self._product[index]

    def subtract(self, index: int, matrix: Float64) -> None:
        """Subtracts a matrix `[n/k, m]` from one slice of M."""
        columns = self._moment.columns(self._slices, self._first + index, matrix)
        self._product -= columns.reshape(self._product.shape)


class FewInputs(SecondMoment):
    """The second moment of few inputs, represented by the inputs themselves.

    Args:
        rows: The inputs, array `[m, n]`, columns channel-major.
        blocks: Number b of diagonal blocks of S to use.
        mean: Whether E[x] is known.
    """

    def __init__(self, rows: Array, blocks: int, *, mean: bool = True) -> None:
        self.rows = rows
        self.count = rows.shape[0]
        self.block_count, self.block_side = blocks, rows.shape[1] // blocks
        self.mean = rows.mean(axis=0, dtype=np.float64) if mean else None
        self._squares = float(np.square(rows, dtype=np.float64).sum())
        self._set_ridge(default_ridge(self.side, self.count))

    def _trace(self) -> float:
        return self._squares / self.count

    def without_held_out(self) -> SecondMoment:
        """As for `SecondMoment`."""
        if self.held_out is None:
            return self
        result = FewInputs(self.rows[: self.count - self.held_out.count], self.block_count)
        result._set_ridge(self.relative_ridge)
        result.positions = self.positions
        return result

    def _permuted(self, order: NDArray[np.intp]) -> SecondMoment:
        result = copy.copy(self)
        parts = self.rows.reshape(self.count, self.block_count, self.block_side)
        result.rows = parts[:, :, order].reshape(self.count, -1)
        return result

    def matrix(self, block: int) -> SymmetricMatrix:
        """As for `SecondMoment`."""
        return SymmetricMatrix.of(self._part(block, 0, self.block_side))

    # The outputs of every slice are computed once: separate calls of `columns` would use all inputs
    # again each time.

    def encoded(self, slices: int, first: int, encoders: Float64) -> Float64:
        """As for `SecondMoment`."""
        block, _, _ = self._place(slices, first)
        seen = self._seen(slices, first, encoders)
        result = self._inputs(block, 0, self.block_side).T @ (seen / self.count)
        width, rank = encoders.shape[1:]
        for i, encoder in enumerate(encoders):
            own = result[i * width : (i + 1) * width, i * rank : (i + 1) * rank]
            own += (self.ridge or 1.0) * encoder
        return result

    def gram(self, encoders: Float64, first: int = 0) -> Float64:
        """As for `SecondMoment`."""
        count, rows, rank = encoders.shape
        seen = self._seen(self.side // rows, first, encoders)
        seen = seen.reshape(-1, count, rank).swapaxes(1, 2).reshape(self.count, -1)
        gram = seen.T @ seen
        gram /= self.count
        own = (self.ridge or 1.0) * (encoders.transpose(0, 2, 1) @ encoders)
        for i, each in enumerate(own):
            gram[i::count, i::count] += each
        return gram

    def product(self, slices: int, first: int, matrices: Float64) -> Product:
        """As for `SecondMoment`."""
        return _ProductOfFew(self, slices, first, matrices)

    def inputs_of(self, slices: int, index: int) -> Float64:
        """The inputs of one slice, a new array `[m, n/k]`."""
        return self._inputs(*self._place(slices, index))

    def _seen(self, slices: int, first: int, encoders: Float64) -> Float64:
        """The encoders' outputs for the inputs, `[m, k/b·j]`."""
        parts = [self.inputs_of(slices, first + i) @ e for i, e in enumerate(encoders)]
        return np.concatenate(parts, axis=1)

    def energy(self, block: int, matrix: Float64) -> float:
        """As for `SecondMoment`."""
        seen = self._inputs(block, 0, self.block_side) @ matrix
        ridge = self.ridge or 1.0
        return float(np.vdot(seen, seen) / self.count + ridge * np.vdot(matrix, matrix))

    def thin_root(self, slices: int, index: int) -> Float64 | None:
        """As for `SecondMoment`."""
        width = self.side // slices
        if not are_few(self.count, width) or self.ridge == 0:
            return None
        root = self.inputs_of(slices, index)
        root /= np.sqrt(self.count)
        return root

    def _inputs(self, block: int, start: int, stop: int) -> Float64:
        first = block * self.block_side
        return self.rows[:, first + start : first + stop].astype(np.float64)

    def _part(self, block: int, start: int, stop: int) -> Float64:
        rows = self._inputs(block, start, stop)
        return rows.T @ rows / self.count

    def _columns(self, block: int, start: int, matrix: Float64) -> Float64:
        seen = self._inputs(block, start, start + matrix.shape[0]) @ matrix
        return self._inputs(block, 0, self.block_side).T @ (seen / self.count)


class _ProductOfFew(Product):
    """The same, computed from the outputs X M."""

    def __init__(self, moment: FewInputs, slices: int, first: int, matrices: Float64) -> None:
        self._few, self._slices, self._first = moment, slices, first
        self._matrices = matrices.copy()
        self._outputs = np.zeros((moment.count, matrices.shape[-1]))
        for i, matrix in enumerate(matrices):
            self._outputs += moment.inputs_of(slices, first + i) @ matrix

    def rows(self, index: int) -> Float64:
        inputs = self._few.inputs_of(self._slices, self._first + index)
        ridge = self._few.ridge or 1.0
        return inputs.T @ self._outputs / self._few.count + ridge * self._matrices[index]

    def subtract(self, index: int, matrix: Float64) -> None:
        self._outputs -= self._few.inputs_of(self._slices, self._first + index) @ matrix
        self._matrices[index] -= matrix


def default_ridge(side: int, count: int) -> float:
    """Returns the default ρ as a part of the mean eigenvalue of S.

    Below 5 inputs per row of S it is 0.2 · side / count: ρ = 0.2 · tr(S) / count. It fades out
    linearly from 5 to 7.5, to avoid a sudden drop from 0.04 to 10⁻⁵.

    Args:
        side: Number n of unfolded inputs, the rows of S.
        count: Number of averaged inputs x.

    Example:
        >>> default_ridge(1280, 256), default_ridge(64, 512)
        (1.0, 1e-05)
    """
    faded = (MANY - count / side) / (MANY - FEW)
    return max(RIDGE, RIDGE_OF_FEW * side / count * min(max(faded, 0.0), 1.0))


def rows_by_position(matrices: Float64, positions: int) -> Float64:
    """The rows `[n/b, f]` of slices `[k/b, n/(k·p), p·f]`, in the order of a folded moment."""
    count, width, columns = matrices.shape
    parts = matrices.reshape(count, width, positions, columns // positions)
    return np.moveaxis(parts, 2, 0).reshape(positions * count * width, -1)


def at_positions(encoders: Float64, positions: int) -> Float64:
    """The encoders `[k/b, n/(k·p), j]` once for each position: `[p·k/b, n/(k·p), j]`."""
    return encoders if positions == 1 else np.tile(encoders, (positions, 1, 1))


def are_few(count: int, side: int) -> bool:
    """Whether to keep `count` inputs instead of a second moment with `side` rows."""
    return side >= WIDE_SIDE and 2 * count <= side


def moment_blocks(channels: int, kappa: int) -> int:
    """Returns the number of diagonal blocks of a layer's second moment that are kept.

    Args:
        channels: Input channels c.
        kappa: Spatial positions κ of the kernel.

    Returns:
        The least divisor b of c with c·κ/b ≤ `MAX_SIDE` (c if there is none).

    Example:
        >>> moment_blocks(512, 9), moment_blocks(25088, 1)
        (1, 7)
    """
    return next((b for b in divisors(channels) if channels // b * kappa <= MAX_SIDE), channels)


def check_moment(kernel: Array, moment: SecondMoment) -> Array:
    """Returns the kernel as an array; raises `ValueError` if the moment does not match it."""
    kernel = check_kernel(kernel)
    c, kappa, f = kernel_sizes(kernel.shape)
    inputs = c * kappa * moment.positions
    if moment.side != inputs or c % moment.block_count or f % moment.positions:
        shape = (moment.block_count, moment.block_side, moment.block_side)
        where = f", {moment.positions} of them in its last axis" if moment.positions > 1 else ""
        raise ValueError(
            f"Expected a second moment of the {inputs} unfolded inputs of a kernel of shape "
            f"{kernel.shape}{where}. Received: blocks.shape={shape}"
        )
    return kernel
