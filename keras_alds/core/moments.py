"""Second moments S = E[x xᵀ] of a layer's unfolded inputs x, added up over chunks of them.

With x one unfolded input of a layer (a patch of a convolution's input, a row of a dense layer's),
S says what an error of the kernel costs at the layer's output:

    E‖x W − x Ŵ‖² = tr((W − Ŵ)ᵀ S (W − Ŵ)) = ‖C (W − Ŵ)‖²_F,  S = Cᵀ C.

Inputs after a ReLU, dead channels and few images make S singular. Then ρI is added to it, ρ being
a small part of its mean eigenvalue: directions that the data do not show count as little as that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from keras_alds.core.blas import single_threaded_blas
from keras_alds.core.patches import CHUNK_ROWS
from keras_alds.core.slicing import Array, divisors, kernel_sizes
from keras_alds.core.spectra import Float64, check_kernel

#: Largest side of a block of a second moment (200 MB). A layer with more unfolded inputs keeps only
#: diagonal blocks, and its numbers of slices are multiples of theirs.
MAX_SIDE = 5120
#: ρ as a part of the mean eigenvalue of S.
RIDGE = 1e-5


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """The second moment S = E[x xᵀ] of a layer's unfolded inputs, or its diagonal blocks.

    Attributes:
        blocks: Array `[b, n/b, n/b]` of float64, n = c·κ: b = 1 for all of S. Rows are
            channel-major as those of `keras_alds.core.slicing.unfold`.
        count: Number of inputs x that were averaged.
        mean: E[x], array `[n]` of float64 in the same order, or None if it is not known.

    Raises:
        ValueError: If `blocks` are no square matrices, or `mean` has another length.
    """

    blocks: Float64
    count: int
    mean: Float64 | None = None

    def __post_init__(self) -> None:
        if self.blocks.ndim != 3 or self.blocks.shape[1] != self.blocks.shape[2]:
            raise ValueError(
                "Expected the blocks of a second moment, [b, n/b, n/b]. "
                f"Received: blocks.shape={self.blocks.shape}"
            )
        if self.mean is not None and self.mean.shape != (self.side,):
            raise ValueError(
                f"Expected the mean of {self.side} unfolded inputs. "
                f"Received: mean.shape={self.mean.shape}"
            )
        self.blocks.setflags(write=False)

    @property
    def side(self) -> int:
        """The number n of unfolded inputs."""
        return self.blocks.shape[0] * self.blocks.shape[1]

    @property
    def ridge(self) -> float:
        """What is added to the diagonal, ρ."""
        return RIDGE * float(np.trace(self.blocks, axis1=1, axis2=2).sum()) / self.side

    def slice_block(self, slices: int, index: int) -> Float64:
        """S_ii + ρI of one slice, `[n/k, n/k]`.

        Without any input but zeros it is the identity: nothing is known, so all counts alike.

        Args:
            slices: Number of slices k, a multiple of the number of blocks.
            index: Which slice i.
        """
        side = self.blocks.shape[1]
        width = self.side // slices
        block, start = divmod(index * width, side)
        part = self.blocks[block, start : start + width, start : start + width]
        ridge = self.ridge
        if ridge == 0:
            return np.eye(width)
        part = part.copy()
        part[np.diag_indices(width)] += ridge
        return part

    def times(self, matrix: Float64) -> Float64:
        """(S + ρI)·matrix for an array `[n, m]`."""
        ridge = self.ridge
        if ridge == 0:
            return matrix.copy()
        count, side = self.blocks.shape[:2]
        product = (self.blocks @ matrix.reshape(count, side, -1)).reshape(matrix.shape)
        return product + ridge * matrix


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
    if moment.side != c * kappa or c % moment.blocks.shape[0]:
        raise ValueError(
            f"Expected a second moment of the {c * kappa} unfolded inputs of a kernel of shape "
            f"{kernel.shape}. Received: blocks.shape={moment.blocks.shape}"
        )
    return kernel


class MomentAccumulator:
    """Adds up x xᵀ over chunks of unfolded inputs.

    Products of a chunk are taken in the inputs' precision, float32 or float64, and added up in
    float64, so that rounding does not grow with the amount of data. Sums are taken in the order
    of the calls: the same inputs give the same bits, whatever the number of threads.

    Args:
        channels: Input channels c.
        kappa: Spatial positions κ of the kernel.

    Example:
        >>> accumulator = MomentAccumulator(2)
        >>> accumulator.add(np.array([[1.0, 2.0], [3.0, 0.0]]))
        >>> accumulator.moment().blocks[0].tolist()
        [[5.0, 1.0], [1.0, 2.0]]
    """

    def __init__(self, channels: int, kappa: int = 1) -> None:
        self.channels, self.kappa = channels, kappa
        self.count = 0
        b = moment_blocks(channels, kappa)
        side = channels // b * kappa
        # Position-major while adding: a copy of a patch is κ runs of c channels.
        self.sums = np.zeros((b, side, side))
        self._total = np.zeros((kappa, channels))
        self._pending: list[Array] = []
        self._pending_rows = 0

    def add(self, patches: Array) -> None:
        """Adds a few unfolded inputs.

        Args:
            patches: Array `[m, κ, c]` as `patch_chunks` yields them, or `[m, c]` for κ = 1. It
                is kept until enough rows have come together, so it must not be changed.
        """
        self._pending.append(patches.reshape(patches.shape[0], -1))
        self._pending_rows += patches.shape[0]
        if self._pending_rows >= min(CHUNK_ROWS, self.channels * self.kappa):
            self._add_pending()

    def add_parts(self, parts: Sequence[Iterable[Array]], executor: Executor) -> None:
        """Adds many unfolded inputs, several parts side by side.

        Args:
            parts: Chunks such as `add` takes; those of a part are made where they are added.
            executor: A pool of threads.
        """
        self._add_pending()
        for sums, total, count in executor.map(self._part_sum, parts):
            self.sums += sums
            self._total += total
            self.count += count

    def _add_pending(self) -> None:
        if self._pending:
            chunks = [np.concatenate(self._pending)]
            self.count += self._add_to(self.sums, self._total, chunks)
            self._pending, self._pending_rows = [], 0

    def _part_sum(self, chunks: Iterable[Array]) -> tuple[Float64, Float64, int]:
        sums, total = np.zeros_like(self.sums), np.zeros_like(self._total)
        return sums, total, self._add_to(sums, total, chunks)

    def _add_to(self, sums: Float64, total: Float64, chunks: Iterable[Array]) -> int:
        count = 0
        b, side = sums.shape[:2]
        with single_threaded_blas():
            for chunk in chunks:
                rows = chunk.shape[0]
                blocks = chunk.reshape(rows, self.kappa, b, -1)
                for i in range(b):
                    part = blocks[:, :, i].reshape(rows, side)
                    sums[i] += part.T @ part
                total += chunk.reshape(rows, *total.shape).sum(axis=0, dtype=np.float64)
                count += rows
        return count

    def moment(self) -> SecondMoment:
        """The second moment of all that was added, rows channel-major; ends the adding.

        Raises:
            ValueError: If nothing was added.
        """
        self._add_pending()
        if self.count == 0:
            raise ValueError("Expected at least one unfolded input. Received: none")
        b, side = self.sums.shape[:2]
        order = np.arange(side).reshape(self.kappa, -1).T.ravel()
        blocks, self.sums = self.sums, np.zeros((b, 0, 0))
        for i in range(b):  # one by one and in place: wide layers have large blocks
            block = blocks[i][np.ix_(order, order)] / (2 * self.count)
            np.add(block, block.T, out=blocks[i])
        return SecondMoment(blocks, self.count, self._total.T.ravel() / self.count)
