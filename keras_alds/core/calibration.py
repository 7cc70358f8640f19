"""Activation-aware choices: errors and factors that are measured on a layer's real inputs.

With x one unfolded input of a layer (a patch of a convolution's input, a row of a dense layer's)
and S = E[x xᵀ] its second moment, the expected squared error of the layer's output is

    E‖x W − x Ŵ‖² = tr((W − Ŵ)ᵀ S (W − Ŵ)) = ‖C (W − Ŵ)‖²_F,  S = Cᵀ C.

So the best Ŵ_i of rank j of one slice follows from the SVD of C_i W_i, with C_iᵀ C_i = S_ii: with
its leading right singular vectors V it is W_i V Vᵀ, whatever root C_i is taken, and S is never
inverted. With all encoders fixed, least squares gives the best decoder of all slices together,
D = (Eᵀ S E)⁻¹ Eᵀ S W, and a SVD of every E_i D_i gives both factors the same scale. Before that
every slice is fitted anew, by the same SVD, to what all others leave to it.

Inputs after a ReLU, dead channels and few images make S singular. Then ρI is added to it, ρ being
a small part of its mean eigenvalue: directions that the data do not show count as little as that.

Sources: BALF (arXiv 2509.25136) for the whitening; Zhang et al., "Accelerating Very Deep
Convolutional Networks", TPAMI 2016 (arXiv 1505.06798), for reconstructing outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from keras_alds.core.blas import single_threaded_blas
from keras_alds.core.slicing import (
    Array,
    check_slices,
    divisors,
    fold_encoder,
    full_rank,
    kernel_sizes,
    unfold,
    weights,
)
from keras_alds.core.spectra import Float64, SliceSpectrum, Spectra, check_kernel

#: Largest side of a block of a second moment (200 MB). A layer with more unfolded inputs keeps only
#: diagonal blocks, and its numbers of slices are multiples of theirs.
MAX_SIDE = 5120
#: ρ as a part of the mean eigenvalue of S.
RIDGE = 1e-5
#: Candidates of the same for the regression on changed inputs; held-out inputs choose.
TARGET_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)
#: How often every slice's factors are fitted anew given those of all other slices.
SWEEPS = 2
#: Rows of patches below which their product is not worth adding up yet.
CHUNK_ROWS = 2048
# Floating-point operations of one piece of work: some tens of milliseconds.
_ITEM_COST = 5e8
# From this side on a second moment of low rank is decomposed as such.
_WIDE_SIDE = 1024
# Bytes of one chunk of patches.
_CHUNK_BYTES = 1 << 23


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
                target[i] = _solve(block, self._cross[i] / count + ridge * mean * rows)
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


def patch_chunks(
    inputs: Array,
    kernel_size: Sequence[int] = (),
    *,
    strides: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    padding: str = "valid",
) -> Iterator[Array]:
    """Yields the patches that a convolution multiplies with its kernel (im2col), in chunks.

    Args:
        inputs: Array `[batch, *spatial, c]`.
        kernel_size: The kernel's size along each spatial axis; `()` for a dense layer, whose
            `inputs` are `[batch, c]`.
        strides: Strides along each spatial axis. Defaults to 1.
        dilation: Dilation along each spatial axis. Defaults to 1.
        padding: `"valid"`, `"same"` (zeros, as TensorFlow places them) or `"causal"`.

    Yields:
        Arrays `[m, κ, c]` of the inputs' dtype, spatial positions in the kernel's order.

    Raises:
        ValueError: If the numbers of axes do not fit or the padding is unknown.

    Example:
        >>> [chunk.shape for chunk in patch_chunks(np.zeros((2, 5, 5, 3)), (3, 3))]
        [(18, 9, 3)]
    """
    dimensions = len(kernel_size)
    size = tuple(int(n) for n in kernel_size)
    stride = (1,) * dimensions if strides is None else tuple(strides)
    spread = (1,) * dimensions if dilation is None else tuple(dilation)
    if inputs.ndim != dimensions + 2 or len(stride) != dimensions or len(spread) != dimensions:
        raise ValueError(
            f"Expected inputs [batch, *spatial, channels] with {dimensions} spatial axes, and as "
            "many strides and dilations as the kernel has axes. Received: "
            f"inputs.shape={inputs.shape}, strides={stride}, dilation={spread}"
        )
    reach = [d * (k - 1) + 1 for d, k in zip(spread, size, strict=True)]
    pads = [(0, 0)] * dimensions
    if padding == "same":
        for axis, (n, s, r) in enumerate(zip(inputs.shape[1:], stride, reach, strict=False)):
            total = max((-(-n // s) - 1) * s + r - n, 0)
            pads[axis] = (total // 2, total - total // 2)
    elif padding == "causal":
        pads = [(r - 1, 0) for r in reach]
    elif padding != "valid":
        raise ValueError(
            f"Expected padding to be 'valid', 'same' or 'causal'. Received: padding={padding!r}"
        )
    outputs = [
        (n + sum(pad) - r) // s + 1
        for n, pad, r, s in zip(inputs.shape[1:], pads, reach, stride, strict=False)
    ]
    c, kappa = inputs.shape[-1], math.prod(size)
    limit = max(_CHUNK_BYTES // (kappa * c * inputs.itemsize), CHUNK_ROWS)
    per_line = math.prod(outputs[1:])
    lines = max(1, min(limit // max(per_line, 1), outputs[0])) if outputs else 1
    images = max(1, limit // max(lines * per_line, 1)) if lines == (outputs or [1])[0] else 1
    for first in range(0, inputs.shape[0], images):
        group = inputs[first : first + images]
        if any(map(any, pads)):
            group = np.pad(group, [(0, 0), *pads, (0, 0)])
        for top in range(0, outputs[0] if outputs else 1, lines):
            count = [min(lines, outputs[0] - top), *outputs[1:]] if outputs else []
            shape = (group.shape[0], *count, kappa, c)
            chunk = np.empty(shape, inputs.dtype)
            for position, offset in enumerate(np.ndindex(*size)):
                start = [o * d for o, d in zip(offset, spread, strict=True)]
                if start:
                    start[0] += top * stride[0]
                window = [slice(None)]
                window += [
                    slice(o, o + (n - 1) * s + 1, s)
                    for o, n, s in zip(start, count, stride, strict=True)
                ]
                chunk[..., position, :] = group[tuple(window)]
            yield chunk.reshape(-1, kappa, c)


# ---------------------------------------------------------------------------------------------


def output_spectra(
    kernel: Array, moment: SecondMoment, *, slices: Iterable[int] | None = None
) -> Spectra:
    """Returns the spectra of C_i W_i for every slice: what the outputs lose at every rank.

    Their `"energy"` error is the expected squared error of the layer's output after the decoder is
    refitted jointly over all slices (as `factorize_outputs` does with `sweeps=0`), relative to that
    of the whole output, tr(Wᵀ S W). Where only diagonal blocks of S are known, and for ranks that
    are no smaller than the dense kernel, the slices' errors are taken as uncorrelated.

    Args:
        kernel: Real array `[*spatial, c, f]`.
        moment: Second moment of the layer's unfolded inputs.
        slices: Numbers of slices k. Defaults to all divisors of c that are multiples of the
            moment's blocks.

    Returns:
        The `Spectra`; `norm` is the largest singular value of any slice of the coarsest k.

    Raises:
        ValueError: If kernel and moment do not fit together, or the kernel is not finite.

    Example:
        >>> moment = SecondMoment(np.diag([4.0, 1.0, 0.0])[None], 10)
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
    """Returns `output_spectra` of several layers, their slices computed side by side.

    Args:
        kernels: Real arrays `[*spatial, c, f]`.
        moments: Their second moments.
        slices: As for `output_spectra`.
        executor: Any `concurrent.futures.Executor`. Defaults to a pool of threads.

    Returns:
        One `Spectra` a kernel, in order.

    Raises:
        ValueError: As `output_spectra`.
    """
    arrays = [check_moment(kernel, moment) for kernel, moment in zip(kernels, moments, strict=True)]
    wanted = None if slices is None else tuple(slices)
    with single_threaded_blas(), contextlib.ExitStack() as stack:
        if executor is None:
            executor = stack.enter_context(
                ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="keras_alds")
            )
        weighted = list(executor.map(_weighted, arrays, moments))
        works: list[tuple[int, int, int, int]] = []  # slices, layer, first slice, last slice
        for n, (array, moment) in enumerate(zip(arrays, moments, strict=True)):
            b = moment.blocks.shape[0]
            for k in wanted or divisors(array.shape[-2]):
                if k % b == 0 and array.shape[-2] % k == 0:
                    works += [(k, n, *part) for part in _parts_of_slices(array.shape, k, b)]
        works.sort()  # the largest matrices first
        pieces = executor.map(
            _slice_values,
            [arrays[n] for _, n, *_ in works],
            [moments[n] for _, n, *_ in works],
            [weighted[n] for _, n, *_ in works],
            [k for k, *_ in works],
            [range(*part) for _, _, *part in works],
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
    """(S + ρI) W where S is whole, and tr(Wᵀ (S + ρI) W)."""
    b = moment.blocks.shape[0]
    product, total = None, 0.0
    with single_threaded_blas():
        for i, part in enumerate(unfold(kernel, b)):  # wide layers have large blocks
            rows = part.astype(np.float64)
            product = moment.slice_block(b, i) @ rows
            total += float(np.vdot(rows, product))
    return (product if b == 1 else None), max(total, 0.0)


def _parts_of_slices(shape: Sequence[int], slices: int, blocks: int) -> list[tuple[int, int]]:
    """Ranges of slices that are one piece of work each; all together where they are joined."""
    if slices > 1 and blocks == 1:
        return [(0, slices)]
    c, kappa, f = kernel_sizes(shape)
    side = c // slices * kappa
    step = max(1, int(_ITEM_COST // (side * min(side, f) * (side + f))))
    return [(i, min(i + step, slices)) for i in range(0, slices, step)]


def _slice_values(
    kernel: Array,
    moment: SecondMoment,
    weighted: tuple[Float64 | None, float],
    slices: int,
    part: range,
) -> tuple[Float64, Float64 | None]:
    """What is lost of some slices.

    Returns:
        Squared singular values `[len(part), r]`, ascending, of C_i W_i; and, if these are all
        slices, what is lost of the output after the joint refit, `[m]` for j = 1 … m.
    """
    matrices = unfold(kernel, slices)
    values = np.zeros((len(part), full_rank(kernel.shape, slices)))
    most = min(values.shape[1], (math.prod(kernel.shape) - 1) // weights(kernel.shape, slices, 1))
    joint = slices > 1 and moment.blocks.shape[0] == 1 and most > 0
    bases = []
    with single_threaded_blas():
        for row, i in zip(values, part, strict=True):
            matrix = matrices[i].astype(np.float64)
            found, basis = _slice_spectrum(
                matrix,
                moment.slice_block(slices, i),
                _thin_root(moment, slices, i),
                most if joint else 0,
            )
            row[row.size - found.size :] = found
            bases.append(basis)
        if not joint or weighted[0] is None:
            return values, None
        # Without any input but zeros S + ρI is the identity, as in `SecondMoment`.
        ridge = moment.ridge or 1.0
        try:
            explained = _explained(np.stack(bases), moment.blocks[0], ridge, weighted[0])
        except np.linalg.LinAlgError:  # float32 inputs, much more of them than ρ can cover
            return values, None
    return values, np.maximum(weighted[1] - explained, 0.0)


def _slice_spectrum(
    matrix: Float64, block: Float64, root: Float64 | None, rank: int
) -> tuple[Float64, Float64]:
    """Squared singular values of C_i W_i, ascending, and encoders for all ranks up to one.

    The first j columns of the orthonormal basis `[n/k, rank]` are the encoder of rank j.
    """
    whitened: Float64 | None
    if root is not None and rank <= root.shape[0]:
        whitened = root @ matrix
        if whitened.shape[0] > whitened.shape[1]:
            gram, whitened = whitened.T @ whitened, None
        else:
            gram = whitened @ whitened.T
    else:
        gram, whitened = _gram(matrix, block)
    if not rank:
        found = gram[0] if gram.size == 1 else np.linalg.eigvalsh(gram)
        return found, np.empty((matrix.shape[0], 0))
    values, vectors = np.linalg.eigh(gram)
    vectors = vectors[:, : -rank - 1 : -1]
    if whitened is not None:
        vectors = whitened.T @ vectors
        vectors /= np.maximum(np.linalg.norm(vectors, axis=0), np.finfo(np.float64).tiny)
    return values, np.linalg.qr(matrix @ vectors)[0]


def _explained(bases: Float64, S: Float64, ridge: float, weighted: Float64) -> Float64:
    """tr(Dᵀ Eᵀ S E D) of the jointly refitted decoder D for all ranks j = 1 … m.

    With the columns of all slices' encoders ordered by rank, Eᵀ S E = L Lᵀ holds that of every
    smaller rank in its corner, and L⁻¹ Eᵀ S W says what every column adds.

    Args:
        bases: Encoders `[k, n/k, m]`, the columns of rank j before those of rank j + 1.
        S: Second moment `[n, n]`.
        ridge: What is added to its diagonal.
        weighted: (S + ρI) W, `[n, f]`.
    """
    slices, rows, most = bases.shape
    transposed = bases.transpose(0, 2, 1)
    gram = np.empty((most, slices, most, slices))
    for m, basis in enumerate(bases):
        columns = S[:, m * rows : (m + 1) * rows] @ basis
        columns[m * rows : (m + 1) * rows] += ridge * basis
        gram[:, :, :, m] = (transposed @ columns.reshape(bases.shape)).transpose(1, 0, 2)
    right = (transposed @ weighted.reshape(slices, rows, -1)).transpose(1, 0, 2)
    size = most * slices
    triangle = scipy.linalg.cholesky(gram.reshape(size, size), lower=True, overwrite_a=True)
    added = scipy.linalg.solve_triangular(triangle, right.reshape(size, -1), lower=True)
    return np.cumsum(np.square(added).sum(axis=1).reshape(most, slices).sum(axis=1))


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


def _thin_root(moment: SecondMoment, slices: int, index: int) -> Float64 | None:
    """For a wide slice that few inputs were seen of: C_i with fewer rows than columns, or None.

    A wide dense layer sees one input an example, so that S_ii has a low rank. C_iᵀ C_i = S_ii
    then comes from a Cholesky decomposition with pivots that ends there, and ρ is left out.
    """
    side = moment.side // slices
    if side < _WIDE_SIDE or 2 * moment.count > side or moment.ridge == 0:
        return None
    width = moment.blocks.shape[1]
    block, start = divmod(index * side, width)
    part = moment.blocks[block, start : start + side, start : start + side]
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(part, lower=0)
    rank = min(rank, moment.count)
    root = np.empty((rank, side))
    root[:, pivots - 1] = np.triu(factor[:rank])
    return root


def _gram(matrix: Float64, block: Float64) -> tuple[Float64, Float64 | None]:
    """The smaller Gram matrix of C_i W_i, and C_i W_i itself if that is on the row side."""
    if matrix.shape[0] >= matrix.shape[1]:
        gram = matrix.T @ (block @ matrix)
        return (gram + gram.T) / 2, None
    whitened = _root(block) @ matrix
    return whitened @ whitened.T, whitened


def _root(block: Float64) -> Float64:
    """A square C with Cᵀ C = S_ii + ρI."""
    try:
        return np.linalg.cholesky(block).T
    except np.linalg.LinAlgError:  # float32 inputs, much more of them than ρ can cover
        values, vectors = np.linalg.eigh(block)
        return np.sqrt(np.maximum(values, RIDGE * values[-1]))[:, None] * vectors.T


def _curves(squares: Float64, entries: int, joint: Float64 | None) -> SliceSpectrum:
    resolution = entries * np.finfo(np.float64).eps * squares.max(initial=0.0)
    squares = np.where(squares > resolution, squares, 0.0)
    energy = np.append(np.cumsum(squares.sum(axis=0))[::-1], 0.0)
    if joint is not None:
        # Larger ranks are no smaller than the dense kernel; zero stays exactly zero.
        refitted = np.where(energy[1 : joint.size + 1] > 0, joint, 0.0)
        energy[1 : joint.size + 1] = refitted
        energy[joint.size + 1 :] = np.minimum(energy[joint.size + 1 :], refitted[-1])
    return SliceSpectrum(np.append(np.sqrt(squares.max(axis=0))[::-1], 0.0), energy)


# ---------------------------------------------------------------------------------------------


def factorize_outputs(
    kernel: Array, moment: SecondMoment, slices: int, rank: int, *, sweeps: int = SWEEPS
) -> tuple[Array, Array]:
    """Returns the factors of a kernel that keep a layer's outputs best, for one choice (k, j).

    Encoders are the best of every slice by itself, then of every slice given the others, then the
    decoder is refitted to all slices jointly, and then every pair is balanced; see the module's
    text.

    Args:
        kernel: Array `[*spatial, c, f]` of floating-point numbers.
        moment: Second moment of the layer's unfolded inputs.
        slices: Number of channel slices k, a divisor of c.
        rank: Rank j of every slice, from 1 to min((c/k)·κ, f).
        sweeps: How often every slice is fitted anew given all others. Defaults to 2.

    Returns:
        `(encoder, decoder)` in the kernel's dtype: `[*spatial, c/k, k·j]` and `[k·j, f]`.

    Raises:
        ValueError: If `slices` does not divide c or is no multiple of the moment's blocks, `rank`
            is out of its range, or the kernel holds NaN or infinity.

    Example:
        >>> moment = SecondMoment(np.diag([4.0, 1.0, 1.0, 0.0])[None], 10)
        >>> encoder, decoder = factorize_outputs(np.eye(4), moment, 2, 1)
        >>> encoder.shape, decoder.shape
        ((2, 2), (2, 4))
    """
    kernel = check_moment(kernel, moment)
    check_slices(slices, kernel.shape[-2])
    if slices % moment.blocks.shape[0]:
        raise ValueError(
            f"Expected a multiple of {moment.blocks.shape[0]} slices, the blocks of the second "
            f"moment. Received: slices={slices}"
        )
    most = full_rank(kernel.shape, slices)
    if not 1 <= rank <= most:
        raise ValueError(
            f"Expected a rank from 1 to {most}, the full rank of a slice of a kernel of shape "
            f"{kernel.shape} in {slices} slices. Received: rank={rank}"
        )
    dtype = kernel.dtype if kernel.dtype.kind not in "biu" else np.dtype(np.float64)
    matrices = unfold(kernel, slices).astype(np.float64)
    with single_threaded_blas():
        encoders = np.stack(
            [
                _slice_encoder(
                    matrix,
                    moment.slice_block(slices, i),
                    rank,
                    _thin_root(moment, slices, i),
                )
                for i, matrix in enumerate(matrices)
            ]
        )
        encoders = _refined(encoders, matrices, moment, sweeps)
        decoders = refit_decoder(encoders, matrices, moment)
        encoders, decoders = balance(encoders, decoders)
    encoder = fold_encoder(encoders, kernel.shape[:-2]).astype(dtype)
    return encoder, decoders.reshape(slices * rank, -1).astype(dtype)


def _slice_encoder(
    matrix: Float64, block: Float64, rank: int, root: Float64 | None = None
) -> Float64:
    """An orthonormal basis `[n/k, j]` of what the best rank-j approximation takes of its input."""
    return _slice_spectrum(matrix, block, root, rank)[1]


def _refined(encoders: Float64, matrices: Float64, moment: SecondMoment, sweeps: int) -> Float64:
    """Encoders that are the best of every slice given the factors of all others.

    Block coordinate descent on ‖C (W − E D)‖²: what slice i has to give is
    T_i = W_i + S_ii⁻¹ Σ_m S_im (W_m − E_m D_m) over the other slices m, and its best
    approximation of rank j follows from the SVD of C_i T_i. The error never grows.
    """
    slices, rows, rank = encoders.shape
    b = moment.blocks.shape[0]
    if slices == b or sweeps < 1:
        return encoders
    decoders = refit_decoder(encoders, matrices, moment)
    encoders = encoders.copy()
    for index in range(b):
        S = moment.slice_block(b, index)
        part = slice(index * slices // b, (index + 1) * slices // b)
        E, products = encoders[part], encoders[part] @ decoders[part]
        blocks = [moment.slice_block(slices, i) for i in range(part.start, part.stop)]
        rest = S @ (matrices[part] - products).reshape(S.shape[0], -1)
        for _ in range(sweeps):
            for i, block in enumerate(blocks):
                here = slice(i * rows, (i + 1) * rows)
                target = products[i] + _solve(block, rest[here])
                E[i] = _slice_encoder(target, block, rank)
                weighted = E[i].T @ block
                product = E[i] @ _solve(weighted @ E[i], weighted @ target)
                rest -= S[:, here] @ (product - products[i])
                products[i] = product
    return encoders


def refit_decoder(encoders: Float64, matrices: Float64, moment: SecondMoment) -> Float64:
    """Returns the decoders that are best for given encoders, all slices together.

    D = (Eᵀ S E)⁻¹ Eᵀ S W with the block-diagonal E of all slices: least squares on the outputs.

    Args:
        encoders: Array `[k, (c/k)·κ, j]` of float64.
        matrices: The unfolded kernel, `[k, (c/k)·κ, f]` of float64.
        moment: Second moment of the layer's unfolded inputs.

    Returns:
        Array `[k, j, f]`.

    Example:
        >>> moment = SecondMoment(np.eye(4)[None], 10)
        >>> basis = np.eye(4)[:, :2].reshape(1, 4, 2)
        >>> refit_decoder(basis, np.eye(4)[None], moment)[0].round(6).tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    """
    slices, rows, rank = encoders.shape
    b = moment.blocks.shape[0]
    decoders = np.empty((slices, rank, matrices.shape[2]))
    for index in range(b):
        block = moment.slice_block(b, index)
        part = slice(index * slices // b, (index + 1) * slices // b)
        E, W = encoders[part], matrices[part]
        columns = block.reshape(block.shape[0], -1, rows)
        SE = np.concatenate([columns[:, i] @ e for i, e in enumerate(E)], axis=1)
        SW = (block @ W.reshape(block.shape[0], -1)).reshape(W.shape)
        gram = E.transpose(0, 2, 1) @ SE.reshape(*E.shape[:2], -1)
        right = E.transpose(0, 2, 1) @ SW
        solution = _solve(gram.reshape(SE.shape[1], -1), right.reshape(SE.shape[1], -1))
        decoders[part] = solution.reshape(right.shape)
    return decoders


def _solve(gram: Float64, right: Float64) -> Float64:
    """Solves a positive semidefinite system; what it does not determine is zero."""
    gram = (gram + gram.T) / 2
    try:
        return scipy.linalg.cho_solve(scipy.linalg.cho_factor(gram), right)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(gram)
        kept = values > gram.shape[0] * np.finfo(np.float64).eps * max(values[-1], 0.0)
        inverse = np.divide(1.0, values, out=np.zeros_like(values), where=kept)
        return vectors @ (inverse[:, None] * (vectors.T @ right))


def balance(encoders: Float64, decoders: Float64) -> tuple[Float64, Float64]:
    """Splits √σ of every product E_i D_i to both sides; the product stays.

    Args:
        encoders: Array `[k, (c/k)·κ, j]`.
        decoders: Array `[k, j, f]`.

    Returns:
        The balanced encoders and decoders; signs are fixed as in `spectra.factorize`.
    """
    left, right = np.empty_like(encoders), np.empty_like(decoders)
    for i, (encoder, decoder) in enumerate(zip(encoders, decoders, strict=True)):
        basis, triangle = np.linalg.qr(encoder)
        inner, sigma, outer = np.linalg.svd(triangle @ decoder, full_matrices=False)
        columns = basis @ inner
        peak = columns[np.abs(columns).argmax(axis=0), np.arange(sigma.size)]
        root = np.sqrt(sigma) * np.where(peak < 0, -1.0, 1.0)
        left[i], right[i] = columns * root, outer * root[:, None]
    return left, right


def output_error(kernel: Array, approximation: Array, moment: SecondMoment) -> float:
    """Returns the expected squared error of a layer's output, relative to the output's square.

    Args:
        kernel: Array `[*spatial, c, f]`.
        approximation: Array of the same shape.
        moment: Second moment of the layer's unfolded inputs.

    Returns:
        tr(Rᵀ S R) / tr(Wᵀ S W) with R = W − Ŵ and ρI in S; 0 for a kernel of zeros.

    Raises:
        ValueError: If the shapes do not fit together.

    Example:
        >>> moment = SecondMoment(np.diag([3.0, 1.0])[None], 10)
        >>> round(output_error(np.eye(2), np.diag([1.0, 0.0]), moment), 4)
        0.25
    """
    kernel = check_moment(kernel, moment)
    if approximation.shape != kernel.shape:
        raise ValueError(
            f"Expected an approximation of shape {kernel.shape}. "
            f"Received: approximation.shape={approximation.shape}"
        )
    rows = unfold(kernel, 1)[0].astype(np.float64)
    rest = rows - unfold(approximation, 1)[0].astype(np.float64)
    total = float(np.vdot(rows, moment.times(rows)))
    return float(np.vdot(rest, moment.times(rest))) / total if total > 0 else 0.0
