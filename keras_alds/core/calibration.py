"""Activation-aware choices: errors and factors that are measured on a layer's real inputs.

With x one unfolded input of a layer (a patch of a convolution's input, a row of a dense layer's)
and S = E[x xᵀ] its second moment, the expected squared error of the layer's output is

    E‖x W − x Ŵ‖² = tr((W − Ŵ)ᵀ S (W − Ŵ)) = ‖C (W − Ŵ)‖²_F,  S = Cᵀ C.

So the best Ŵ_i of rank j of one slice follows from the SVD of C_i W_i, with C_iᵀ C_i = S_ii: with
its leading right singular vectors V it is W_i V Vᵀ, whatever root C_i is taken, and S is never
inverted. With all encoders fixed, least squares gives the best decoder of all slices together,
D = (Eᵀ S E)⁻¹ Eᵀ S W, and a SVD of every E_i D_i gives both factors the same scale.

Inputs after a ReLU, dead channels and few images make S singular. Then ρI is added to it, ρ being
a small part of its mean eigenvalue: directions that the data do not show count as little as that.

Sources: BALF (arXiv 2509.25136) for the whitening; Zhang et al., "Accelerating Very Deep
Convolutional Networks", TPAMI 2016 (arXiv 1505.06798), for reconstructing outputs.
"""

from __future__ import annotations

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
)
from keras_alds.core.spectra import Float64, SliceSpectrum, Spectra, check_kernel

#: Largest side of a block of a second moment (200 MB). A layer with more unfolded inputs keeps only
#: diagonal blocks, and its numbers of slices are multiples of theirs.
MAX_SIDE = 5120
#: ρ as a part of the mean eigenvalue of S.
RIDGE = 1e-5
#: Rows of patches below which their product is not worth adding up yet.
CHUNK_ROWS = 2048
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
        self._sums = np.zeros((b, side, side))
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
            self._sums += sums
            self._total += total
            self.count += count

    def _add_pending(self) -> None:
        if self._pending:
            chunks = [np.concatenate(self._pending)]
            self.count += self._add_to(self._sums, self._total, chunks)
            self._pending, self._pending_rows = [], 0

    def _part_sum(self, chunks: Iterable[Array]) -> tuple[Float64, Float64, int]:
        sums, total = np.zeros_like(self._sums), np.zeros_like(self._total)
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
        b, side = self._sums.shape[:2]
        order = np.arange(side).reshape(self.kappa, -1).T.ravel()
        blocks, self._sums = self._sums, np.zeros((b, 0, 0))
        for i in range(b):  # one by one and in place: wide layers have large blocks
            block = blocks[i][np.ix_(order, order)] / (2 * self.count)
            np.add(block, block.T, out=blocks[i])
        return SecondMoment(blocks, self.count, self._total.T.ravel() / self.count)


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

    Their `"energy"` error is the expected squared error of the slices' outputs, relative to that
    of the whole output, tr(Wᵀ S W), where the slices' errors are taken as uncorrelated.

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
    kernel = check_moment(kernel, moment)
    b = moment.blocks.shape[0]
    wanted = tuple(k for k in (slices or divisors(kernel.shape[-2])) if k % b == 0)
    with single_threaded_blas():
        values = {k: _slice_values(kernel, moment, k) for k in wanted}
        rows = unfold(kernel, 1)[0].astype(np.float64)
        energy = float(np.vdot(rows, moment.times(rows)))
    curves = {k: _curves(value, math.prod(kernel.shape)) for k, value in values.items()}
    norm = next((float(curve.residual_norm[0]) for curve in curves.values()), 0.0)
    return Spectra(tuple(kernel.shape), norm, max(energy, 0.0), curves)


def output_spectra_many(
    kernels: Sequence[Array],
    moments: Sequence[SecondMoment],
    *,
    executor: Executor | None = None,
) -> list[Spectra]:
    """Returns `output_spectra` of several layers, computed side by side.

    Args:
        kernels: Real arrays `[*spatial, c, f]`.
        moments: Their second moments.
        executor: Any `concurrent.futures.Executor`. Defaults to a pool of threads.

    Returns:
        One `Spectra` a kernel, in order.

    Raises:
        ValueError: As `output_spectra`.
    """
    with single_threaded_blas():
        if executor is not None:
            return list(executor.map(output_spectra, kernels, moments))
        with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="keras_alds") as pool:
            return list(pool.map(output_spectra, kernels, moments))


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


def _slice_values(kernel: Array, moment: SecondMoment, slices: int) -> Float64:
    """Squared singular values `[k, r]`, ascending, of C_i W_i."""
    matrices = unfold(kernel, slices)
    values = np.empty((slices, full_rank(kernel.shape, slices)))
    for i, part in enumerate(matrices):
        gram, _ = _gram(part.astype(np.float64), moment.slice_block(slices, i))
        values[i] = gram[0, 0] if gram.size == 1 else np.linalg.eigvalsh(gram)
    return values


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


def _curves(squares: Float64, entries: int) -> SliceSpectrum:
    resolution = entries * np.finfo(np.float64).eps * squares.max(initial=0.0)
    squares = np.where(squares > resolution, squares, 0.0)
    return SliceSpectrum(
        np.append(np.sqrt(squares.max(axis=0))[::-1], 0.0),
        np.append(np.cumsum(squares.sum(axis=0))[::-1], 0.0),
    )


# ---------------------------------------------------------------------------------------------


def factorize_outputs(
    kernel: Array, moment: SecondMoment, slices: int, rank: int
) -> tuple[Array, Array]:
    """Returns the factors of a kernel that keep a layer's outputs best, for one choice (k, j).

    Encoders are the best of every slice by itself, then the decoder is refitted to all slices
    jointly, and then every pair is balanced; see the module's text.

    Args:
        kernel: Array `[*spatial, c, f]` of floating-point numbers.
        moment: Second moment of the layer's unfolded inputs.
        slices: Number of channel slices k, a divisor of c.
        rank: Rank j of every slice, from 1 to min((c/k)·κ, f).

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
                _slice_encoder(matrix, moment.slice_block(slices, i), rank)
                for i, matrix in enumerate(matrices)
            ]
        )
        decoders = refit_decoder(encoders, matrices, moment)
        encoders, decoders = balance(encoders, decoders)
    encoder = fold_encoder(encoders, kernel.shape[:-2]).astype(dtype)
    return encoder, decoders.reshape(slices * rank, -1).astype(dtype)


def _slice_encoder(matrix: Float64, block: Float64, rank: int) -> Float64:
    """An orthonormal basis `[n/k, j]` of what the best rank-j approximation takes of its input."""
    gram, whitened = _gram(matrix, block)
    vectors = np.linalg.eigh(gram)[1][:, : -rank - 1 : -1]
    if whitened is not None:
        vectors = whitened.T @ vectors
        vectors /= np.maximum(np.linalg.norm(vectors, axis=0), np.finfo(np.float64).tiny)
    return np.linalg.qr(matrix @ vectors)[0]


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
