"""Accumulates second moments over chunks of a layer's unfolded inputs, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor

import numpy as np

from keras_alds.core.calibration.moments import FewInputs, SecondMoment, are_few, moment_blocks
from keras_alds.core.calibration.patches import CHUNK_ROWS
from keras_alds.core.calibration.symmetric import SymmetricMatrix, strip_bounds
from keras_alds.core.parallel import single_threaded_blas
from keras_alds.core.slicing import Array
from keras_alds.core.spectra import Float64


class MomentAccumulator:
    """Adds up x xᵀ over chunks of unfolded inputs.

    Products of a chunk are computed in the inputs' precision, float32 or float64, and summed in
    float64, so that rounding does not grow with the amount of data. Sums follow the order of the
    calls: the same inputs give the same bits for any number of threads.

    If there are few inputs for their number of columns, the inputs themselves are kept.

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
        self._blocks = moment_blocks(channels, kappa)
        self._count = 0
        # Position-major while adding: copying a patch copies κ runs of c channels.
        self._sums: list[SymmetricMatrix] = []
        self._total = np.zeros((kappa, channels))
        self._pending: list[Array] = []
        self._pending_rows = 0

    @property
    def side(self) -> int:
        """Rows of a block of the second moment."""
        return self.channels // self._blocks * self.kappa

    def add(self, patches: Array) -> None:
        """Adds a few unfolded inputs.

        Args:
            patches: Array `[m, κ, c]` as `patch_chunks` yields it, or `[m, c]` for κ = 1. It is
                kept until there are enough rows, so it must not be changed.
        """
        self._pending.append(patches.reshape(patches.shape[0], -1))
        self._pending_rows += patches.shape[0]
        enough = self._pending_rows >= min(CHUNK_ROWS, self.channels * self.kappa)
        if enough and not are_few(self._count + self._pending_rows, self.side):
            self._add_pending()

    def add_parts(self, parts: Sequence[Iterable[Array]], executor: Executor) -> None:
        """Adds many unfolded inputs, several parts in parallel.

        Args:
            parts: Chunks as for `add`; the thread that adds a part also makes its chunks.
            executor: A pool of threads.
        """
        self._add_pending()
        if len(strip_bounds(self.side)) > 1:
            # Separate sums for every part would be large: threads share the strips instead.
            for chunk in itertools.chain.from_iterable(parts):
                self._add_chunk(chunk, executor)
            return
        for sums, total, count in executor.map(self._part_sum, parts):
            self._count += count
            self._total += total
            for mine, part in zip(self._summed(), sums, strict=True):
                mine.add_sum(part)

    def _empty(self) -> list[SymmetricMatrix]:
        return [SymmetricMatrix(self.side) for _ in range(self._blocks)]

    def _summed(self) -> list[SymmetricMatrix]:
        if not self._sums:
            self._sums = self._empty()
        return self._sums

    def _part_sum(self, chunks: Iterable[Array]) -> tuple[list[SymmetricMatrix], Float64, int]:
        sums, total, count = self._empty(), np.zeros_like(self._total), 0
        with single_threaded_blas():
            for chunk in chunks:
                for matrix, rows in zip(sums, self._split(chunk), strict=True):
                    for strip in range(len(matrix)):
                        matrix.add(strip, rows)
                total += self._sum_of(chunk)
                count += chunk.shape[0]
        return sums, total, count

    def _add_chunk(self, chunk: Array, executor: Executor | None = None) -> None:
        sums = self._summed()
        rows = self._split(chunk)
        work = [(i, strip) for i, matrix in enumerate(sums) for strip in range(len(matrix))]

        def add(item: tuple[int, int]) -> None:
            i, strip = item
            with single_threaded_blas():  # in the worker: some libraries count by thread
                sums[i].add(strip, rows[i])

        run = map if executor is None else executor.map
        for _ in run(add, work):
            pass
        self._total += self._sum_of(chunk)
        self._count += chunk.shape[0]

    def _add_pending(self) -> None:
        if self._pending:
            chunk, self._pending, self._pending_rows = np.concatenate(self._pending), [], 0
            self._add_chunk(chunk)

    def _split(self, chunk: Array) -> list[Array]:
        """Splits a chunk into the inputs of every block."""
        rows = chunk.shape[0]
        blocks = chunk.reshape(rows, self.kappa, self._blocks, -1)
        return [blocks[:, :, i].reshape(rows, -1) for i in range(self._blocks)]

    def _sum_of(self, chunk: Array) -> Float64:
        parts = chunk.reshape(chunk.shape[0], *self._total.shape)
        return np.asarray(parts.sum(axis=0, dtype=np.float64))

    def moment(self) -> SecondMoment:
        """The second moment of all inputs added, rows channel-major; ends the accumulation.

        Raises:
            ValueError: If nothing was added.
        """
        if self._pending and not self._count and are_few(self._pending_rows, self.side):
            rows = np.concatenate(self._pending)
            self._pending = []
            parts = rows.reshape(len(rows), self.kappa, self.channels)
            return FewInputs(parts.swapaxes(1, 2).reshape(len(rows), -1), self._blocks)
        self._add_pending()
        if self._count == 0:
            raise ValueError("Expected at least one unfolded input. Received: none")
        order = np.arange(self.side).reshape(self.kappa, -1).T.ravel()
        blocks = [matrix.reordered(order, 1 / self._count) for matrix in self._sums]
        self._sums = []
        return SecondMoment(blocks, self._count, self._total.T.ravel() / self._count)
