"""Second moments S = E[x xᵀ] of a layer's unfolded inputs x.

With x one unfolded input of a layer (a patch of a convolution's input, a row of a dense layer's),
S says what an error of the kernel costs at the layer's output:

    E‖x W − x Ŵ‖² = tr((W − Ŵ)ᵀ S (W − Ŵ)) = ‖C (W − Ŵ)‖²_F,  S = Cᵀ C.

Inputs after a ReLU, dead channels and few images make S singular. So ρI is added to it, and S + ρI
stands for S wherever errors, factors or targets are computed. Of many inputs ρ is a tiny part of
the mean eigenvalue. Of few it is a large one (`default_ridge`): a direction that few inputs do not
show may still be used by others.

A wide dense layer sees one input an example, fewer than S has rows: then the inputs themselves are
kept (`FewInputs`), which are less to keep and to compute with, and S is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keras_alds.core.calibration.symmetric import SymmetricMatrix
from keras_alds.core.slicing import Array, divisors, kernel_sizes
from keras_alds.core.spectra import Float64, check_kernel

#: Largest side of a block of a second moment (200 MB). A layer with more unfolded inputs keeps only
#: diagonal blocks, and its numbers of slices are multiples of theirs.
MAX_SIDE = 5120
#: From this side on a second moment of low rank is treated as such.
WIDE_SIDE = 1024
#: ρ as a part of the mean eigenvalue of S, where S is the mean of many inputs.
RIDGE = 1e-5
#: The same of few inputs, times the rows of S per input. Errors agreed with those on other inputs
#: at 1 to 3 of the mean eigenvalue where S had 5 rows per input, at 0.1 to 0.2 where it had 1.
RIDGE_OF_FEW = 0.2
#: Inputs per row of S below which they are few, and from which on they are many.
FEW, MANY = 5.0, 7.5


class SecondMoment:
    """The second moment S = E[x xᵀ] of a layer's unfolded inputs, or its diagonal blocks.

    Args:
        blocks: Array `[b, n/b, n/b]` of float64, n = c·κ: b = 1 for all of S; or the blocks as
            `SymmetricMatrix`. Rows are channel-major as those of `keras_alds.core.slicing.unfold`.
        count: Number of inputs x that were averaged.
        mean: E[x], array `[n]` of float64 in the same order, or None if it is not known.

    Attributes:
        relative_ridge: ρ as a part of the mean eigenvalue of S.
        ridge: ρ itself.

    Raises:
        ValueError: If `blocks` are no square matrices, or `mean` has another length.
    """

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
        self.relative_ridge = default_ridge(self.side, count)
        self.ridge = self.relative_ridge * sum(matrix.trace() for matrix in blocks) / self.side
        self._check_mean()

    def _check_mean(self) -> None:
        if self.mean is not None and self.mean.shape != (self.side,):
            raise ValueError(
                f"Expected the mean of {self.side} unfolded inputs. "
                f"Received: mean.shape={self.mean.shape}"
            )

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

        Without any input but zeros it is the identity: nothing is known, so all counts alike.

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

    def columns(self, slices: int, index: int, matrix: Float64, *, ridged: bool = True) -> Float64:
        """The columns of S + ρI that belong to one slice, times a matrix.

        Args:
            slices: Number of slices k.
            index: Which slice i.
            matrix: Array `[n/k, m]`.
            ridged: Whether ρI is part of it.

        Returns:
            Array `[n/b, m]`: the rows are those of the block that the slice is in.
        """
        block, start, stop = self._place(slices, index)
        result = self._columns(block, start, matrix)
        if ridged:
            result[start:stop] += (self.ridge or 1.0) * matrix
        return result

    def encoded(self, slices: int, first: int, encoders: Float64) -> Float64:
        """(S + ρI) E for the block-diagonal E of consecutive slices, all of those in one block.

        Args:
            slices: Number of slices k.
            first: Which slice is the first one.
            encoders: Array `[k/b, n/k, j]`.

        Returns:
            Array `[n/b, k/b·j]`.
        """
        parts = [self.columns(slices, first + i, encoder) for i, encoder in enumerate(encoders)]
        return np.concatenate(parts, axis=1)

    def gram(self, encoders: Float64) -> Float64:
        """Eᵀ (S + ρI) E for the block-diagonal E of all slices, where S is in one block.

        Args:
            encoders: Array `[k, n/k, j]`.

        Returns:
            Array `[j·k, j·k]`, the columns of all slices' encoders ordered by rank.
        """
        slices, rows, rank = encoders.shape
        transposed = encoders.transpose(0, 2, 1)
        gram = np.empty((rank, slices, rank, slices))
        for i, encoder in enumerate(encoders):
            columns = self.columns(slices, i, encoder)
            gram[:, :, :, i] = (transposed @ columns.reshape(slices, rows, -1)).transpose(1, 0, 2)
        return gram.reshape(rank * slices, -1)

    def product(self, slices: int, first: int, matrices: Float64) -> Product:
        """(S + ρI) M for matrices of consecutive slices, all of those in one block, to be updated.

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
        """C_i with fewer rows than columns, for a wide slice that few inputs were seen of.

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
    """(S + ρI) M of one block while the rows of M change slice by slice."""

    def __init__(self, moment: SecondMoment, slices: int, first: int, matrices: Float64) -> None:
        self._moment, self._slices, self._first = moment, slices, first
        block = first * moment.block_count // slices
        rows = matrices.reshape(-1, matrices.shape[-1])
        self._product = moment.columns(moment.block_count, block, rows).reshape(matrices.shape)

    def rows(self, index: int) -> Float64:
        """Its rows `[n/k, m]` that belong to one slice, counted from the first one."""
        return self._product[index]

    def subtract(self, index: int, matrix: Float64) -> None:
        """Takes a matrix `[n/k, m]` off one slice of M."""
        columns = self._moment.columns(self._slices, self._first + index, matrix)
        self._product -= columns.reshape(self._product.shape)


class FewInputs(SecondMoment):
    """The second moment of so few inputs that they themselves say it best.

    Args:
        rows: The inputs, array `[m, n]`, columns channel-major.
        blocks: Number b of diagonal blocks that S is regarded as.
        mean: Whether E[x] is known.
    """

    def __init__(self, rows: Array, blocks: int, *, mean: bool = True) -> None:
        self.rows = rows
        self.count = rows.shape[0]
        self.block_count, self.block_side = blocks, rows.shape[1] // blocks
        self.mean = rows.mean(axis=0, dtype=np.float64) if mean else None
        squares = np.square(rows, dtype=np.float64).sum()
        self.relative_ridge = default_ridge(self.side, self.count)
        self.ridge = self.relative_ridge * float(squares) / (self.count * self.side)

    # What is seen of every slice is computed once: `columns` of every slice by itself would take
    # all inputs again each time.

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

    def gram(self, encoders: Float64) -> Float64:
        """As for `SecondMoment`."""
        slices, _, rank = encoders.shape
        seen = self._seen(slices, 0, encoders).reshape(-1, slices, rank).swapaxes(1, 2)
        seen = seen.reshape(self.count, -1)
        gram = seen.T @ seen
        gram /= self.count
        own = (self.ridge or 1.0) * (encoders.transpose(0, 2, 1) @ encoders)
        for i, each in enumerate(own):
            gram[i::slices, i::slices] += each
        return gram

    def product(self, slices: int, first: int, matrices: Float64) -> Product:
        """As for `SecondMoment`."""
        return _ProductOfFew(self, slices, first, matrices)

    def inputs_of(self, slices: int, index: int) -> Float64:
        """What was seen of one slice, a new array `[m, n/k]`."""
        return self._inputs(*self._place(slices, index))

    def _seen(self, slices: int, first: int, encoders: Float64) -> Float64:
        """What encoders give for the inputs, `[m, k/b·j]`."""
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
    """The same by X M, what the inputs make of M."""

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
    """Returns ρ as a part of the mean eigenvalue of S, where nothing better is known.

    Of fewer than 5 inputs per row of S it is 0.2 · side / count: ρ = 0.2 · tr(S) / count. There it
    would fall from 0.04 to 10⁻⁵ at once, so it fades out linearly from 5 to 7.5.

    Args:
        side: Number n of unfolded inputs, the rows of S.
        count: Number of inputs x that were averaged.

    Example:
        >>> default_ridge(1280, 256), default_ridge(64, 512)
        (1.0, 1e-05)
    """
    faded = (MANY - count / side) / (MANY - FEW)
    return max(RIDGE, RIDGE_OF_FEW * side / count * min(max(faded, 0.0), 1.0))


def are_few(count: int, side: int) -> bool:
    """Whether so many inputs are fewer to keep than a second moment of so many rows."""
    return side >= WIDE_SIDE and 2 * count <= side


def moment_blocks(channels: int, kappa: int) -> int:
    """Returns the number of diagonal blocks that a layer's second moment is kept in.

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
    """Returns the kernel as an array, or raises `ValueError` if the moment is not its inputs'."""
    kernel = check_kernel(kernel)
    c, kappa, _ = kernel_sizes(kernel.shape)
    if moment.side != c * kappa or c % moment.block_count:
        shape = (moment.block_count, moment.block_side, moment.block_side)
        raise ValueError(
            f"Expected a second moment of the {c * kappa} unfolded inputs of a kernel of shape "
            f"{kernel.shape}. Received: blocks.shape={shape}"
        )
    return kernel
