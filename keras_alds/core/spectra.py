"""Singular values of the channel slices for every number of slices, and a choice's factors.

The singular values of a slice are the square roots of the eigenvalues of the Gram matrix of its
smaller side, in float64. This is several times faster than an SVD, and exact to about 1e-8·σ_1,
below the resolution of float32 weights. Two facts save most of the Gram products:

- on the filter side, a slice's Gram matrix is the sum of the Gram matrices of its parts;
- on the row side, a part's Gram matrix is a diagonal block of the slice's Gram matrix.

Source: arXiv 2107.11442, section 2 (the local step); the Gram matrices are this library's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_alds.core.parallel import map_within, single_threaded_blas, threads
from keras_alds.core.slicing import (
    Array,
    check_slices,
    divisors,
    fold_encoder,
    full_rank,
    kernel_sizes,
    unfold,
)

Float64 = NDArray[np.float64]

# Cost of one work item in floating-point operations of an eigenvalue solver (about 20 ms): small
# enough to balance the threads, large enough to hide the submission overhead.
_ITEM_COST = 3e8
# If a layer's filter side exceeds this share of all the work, it is split over the workers.
_SPLIT_SHARE = 1 / 16
# Entries of one float64 working copy (128 MB).
_COPY_ENTRIES = 1 << 24
# Entries of all Gram matrices of one layer that wait for their eigenvalues (1 GB).
_GRAM_ENTRIES = 1 << 27
# Entries of one work item of tiny matrices, which memory limits instead of time.
_BATCH_ENTRIES = 1 << 22


@dataclass(frozen=True, eq=False)
class SliceSpectrum:
    """Residuals of all slices for one k after truncation to rank j, for j = 0 … r.

    Attributes:
        residual_norm: Array `[r + 1]`: max_i σ_{j+1}(W_i), the largest singular value
            dropped in any slice; 0 at r = min((c/k)·κ, f).
        residual_energy: Array `[r + 1]`: Σ_i Σ_{m>j} σ_m(W_i)², summed from the small end.
    """

    residual_norm: Float64
    residual_energy: Float64

    def __post_init__(self) -> None:
        self.residual_norm.setflags(write=False)
        self.residual_energy.setflags(write=False)

    @property
    def rank(self) -> int:
        """The full rank r of a slice."""
        return self.residual_norm.size - 1

    @property
    def singular_values(self) -> Float64:
        """Array `[r]`, descending; of several slices, the largest of each index."""
        return self.residual_norm[:-1]


@dataclass(frozen=True, eq=False)
class Spectra:
    """The spectra of one kernel, reduced to what the error measures need.

    Attributes:
        kernel_shape: Shape `[*spatial, c, f]`.
        norm: σ_1 of the whole unfolding `[c·κ, f]`.
        energy: ‖W‖²_F.
        slices: Read-only mapping from each number of slices k, ascending, to its `SliceSpectrum`.
    """

    kernel_shape: tuple[int, ...]
    norm: float
    energy: float
    slices: Mapping[int, SliceSpectrum] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slices", MappingProxyType(dict(self.slices)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy cannot be pickled.
        return Spectra, (self.kernel_shape, self.norm, self.energy, dict(self.slices))


@dataclass(frozen=True)
class _Item:
    """One piece of work: `function(*arguments)` in any thread or process."""

    cost: float
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keep: Callable[[Any], None]


def spectra(
    kernel: Array, *, slices: Iterable[int] | None = None, executor: Executor | None = None
) -> Spectra:
    """Returns the spectra of every channel slice of one kernel.

    Args:
        kernel: Real array `[*spatial, c, f]`.
        slices: Numbers of slices k to compute, divisors of c. Defaults to all of them.
        executor: Runs the work items; see `spectra_many`.

    Raises:
        ValueError: If the kernel holds NaN or infinity, has fewer than two axes or an empty one,
            or if an entry of `slices` does not divide c.

    Example:
        >>> kernel = np.random.default_rng(0).normal(size=(3, 3, 8, 16))
        >>> sorted(spectra(kernel).slices)
        [1, 2, 4, 8]
    """
    return spectra_many([kernel], slices=slices, executor=executor)[0]


def spectra_many(
    kernels: Sequence[Array],
    *,
    executor: Executor | None = None,
    slices: Iterable[int] | None = None,
) -> list[Spectra]:
    """Returns the spectra of several kernels, computed in parallel.

    BLAS is limited to one thread meanwhile, and the executor runs the work items in parallel.
    That is faster. It also makes the result the same bit for bit in every process, for any number
    of workers and BLAS threads. (Other `slices` sum the Gram matrices of other parts, so results
    may differ by rounding.)

    Args:
        kernels: Real arrays `[*spatial, c, f]`.
        executor: Any `concurrent.futures.Executor`; work items and their results can be
            pickled. Defaults to a pool of `os.cpu_count()` threads.
        slices: Numbers of slices k to compute; each kernel uses those that divide its c. Defaults
            to all divisors. With a single kernel every entry must divide c.

    Returns:
        One `Spectra` per kernel, in order.

    Raises:
        ValueError: If a kernel holds NaN or infinity, has fewer than two axes or an empty one, or
            if no entry of `slices` divides its channels.

    Example:
        >>> kernels = [np.ones((8, 4)), np.ones((3, 3, 4, 8))]
        >>> [s.norm > 0 for s in spectra_many(kernels)]
        [True, True]
    """
    wanted = None if slices is None else tuple(slices)
    works = []
    for index, kernel in enumerate(kernels):
        array = check_kernel(kernel, index if len(kernels) > 1 else None)
        works.append(_Work(array, _choose_slices(array.shape, wanted, len(kernels) == 1)))
    if not works:
        return []
    with single_threaded_blas(), threads(executor) as executor:
        _compute(works, executor)
        return [work.result() for work in works]


def spectra_of(kernel: Array, slices: Collection[int]) -> Spectra:
    """The spectra of one kernel for those of some numbers of slices that divide its channels."""
    dividing = [k for k in slices if kernel.shape[-2] % k == 0]
    return spectra_many([kernel], slices=dividing)[0]


def check_kernel(kernel: Array, index: int | None = None) -> Array:
    """Returns the kernel as an array, or raises `ValueError` if it cannot be decomposed.

    Args:
        kernel: Array `[*spatial, c, f]`.
        index: Position of the kernel in a list, for the message.

    Returns:
        `np.asarray(kernel)`.

    Raises:
        ValueError: If the kernel is complex or not numeric, has fewer than two axes or an empty
            one, or holds NaN or infinity.
    """
    array = np.asarray(kernel)
    place = "" if index is None else f" at index {index}"
    if array.dtype.kind in "cOSUMm":
        raise ValueError(f"Expected a kernel of real numbers. Received: dtype={array.dtype}{place}")
    kernel_sizes(array.shape)
    if array.dtype.kind not in "biu":
        finite = np.isfinite(array)
        if not finite.all():
            raise ValueError(
                "Expected a kernel of finite numbers. Received: "
                f"{array.size - int(finite.sum())} NaN or infinite entries of {array.size} "
                f"in a kernel of shape {array.shape}{place}"
            )
    return array


def _choose_slices(
    shape: tuple[int, ...], wanted: tuple[int, ...] | None, strict: bool
) -> tuple[int, ...]:
    channels = shape[-2]
    if wanted is None:
        return divisors(channels)
    if strict:
        for k in wanted:
            check_slices(k, channels)
    chosen = tuple(sorted({k for k in wanted if k >= 1 and channels % k == 0}))
    if not chosen:
        raise ValueError(
            f"Expected slices to hold a divisor of the {channels} input channels. "
            f"Received: slices={wanted}"
        )
    return chosen


# ---------------------------------------------------------------------------------------------
# Work items: module-level functions of arrays, so that any executor can run them.


def _rows(part: Array, slices: int) -> Float64:
    """Unfolds a part of a kernel in float64."""
    return unfold(part, slices).astype(np.float64, copy=False)


def _filter_gram(part: Array) -> Float64:
    """Gram matrix `[f, f]` of one slice on the filter side, in bounded memory."""
    c, kappa, f = kernel_sizes(part.shape)
    step = max(1, _COPY_ENTRIES // (kappa * f))
    gram = np.zeros((f, f))
    for start in range(0, c, step):
        rows = _rows(part[..., start : start + step, :], 1)[0]
        gram += rows.T @ rows
    return gram


def _row_grams(part: Array, slices: int) -> Float64:
    """Gram matrices `[slices, n, n]` on the row side, n = (c/k)·κ, in bounded memory."""
    c, kappa, f = kernel_sizes(part.shape)
    step = max(1, _COPY_ENTRIES // (c * kappa))
    side = c // slices * kappa
    grams = np.zeros((slices, side, side))
    for start in range(0, f, step):
        rows = _rows(part[..., start : start + step], slices)
        grams += rows @ rows.transpose(0, 2, 1)
    return grams


def _eigenvalues(grams: Float64) -> Float64:
    """Eigenvalues of symmetric matrices `[n, s, s]`, ascending."""
    if grams.shape[-1] == 1:
        return grams[..., 0]
    return np.asarray(np.linalg.eigvalsh(grams), np.float64)


def _eigenvalue_item(gram: Float64) -> Float64:
    with single_threaded_blas():
        return _eigenvalues(gram[None])[0]


def _gram_item(part: Array) -> Float64:
    with single_threaded_blas():
        return _filter_gram(part)


def _filter_item(kernel: Array, tree: tuple[tuple[int, int], ...]) -> dict[int, Float64]:
    """The whole filter side of one kernel: eigenvalues `[k, f]` for every k of the tree."""
    with single_threaded_blas():
        values = {}
        grams: dict[int, Float64] = {}
        for k, parent in tree:
            if parent:
                grams[k] = _merge(grams[parent], k)
            else:
                grams[k] = np.stack([_filter_gram(part) for part in _parts(kernel, k)])
            values[k] = _eigenvalues(grams[k])
            _forget(grams, tree, k)
        return values


def _row_item(part: Array, slices: int, pieces: tuple[int, ...]) -> dict[int, Float64]:
    """Row side of some consecutive slices, cut into each number of `pieces`.

    Returns eigenvalues `[slices * pieces, n / pieces]` for every entry of `pieces`.
    """
    with single_threaded_blas():
        grams = _row_grams(part, slices)
        values = {}
        for m in pieces:
            side = grams.shape[-1] // m
            if side == 1:
                values[m] = np.diagonal(grams, axis1=1, axis2=2).reshape(-1, 1)
                continue
            blocks = np.einsum("napaq->napq", grams.reshape(slices, m, side, m, side))
            values[m] = _eigenvalues(blocks.reshape(slices * m, side, side))
        return values


def _column_item(kernel: Array, slices: tuple[int, ...]) -> dict[int, Float64]:
    """With a single filter, the only singular value of a slice is its norm."""
    finest = max(kernel.shape[-2], 1)
    squares = np.square(_rows(kernel, finest)).sum(axis=(1, 2))
    return {k: squares.reshape(k, -1).sum(axis=1, keepdims=True) for k in slices}


def _parts(kernel: Array, slices: int) -> list[Array]:
    """Views of a kernel's channel slices."""
    width = kernel.shape[-2] // slices
    return [kernel[..., i * width : (i + 1) * width, :] for i in range(slices)]


def _merge(grams: Float64, slices: int) -> Float64:
    """Sums Gram matrices of finer slices into those of `slices` coarser ones."""
    f = grams.shape[-1]
    return grams.reshape(slices, -1, f, f).sum(axis=1)


def _forget(grams: dict[int, Any], tree: Sequence[tuple[int, int]], done: int) -> None:
    """Drops the matrices that no k after `done` needs."""
    after = tree[[k for k, _ in tree].index(done) + 1 :]
    needed = {parent for _, parent in after}
    for k in [k for k in grams if k not in needed]:
        del grams[k]


# ---------------------------------------------------------------------------------------------


def _eigen_cost(side: float, count: float) -> float:
    # The constant is the overhead of one LAPACK call, in the same unit.
    return count * (4 / 3 * side**3 + 2e4)


def _gram_cost(rows: float, columns: float) -> float:
    # The rows · columns² operations run about three times as fast as the eigenvalue solver's.
    return rows * columns**2 / 3


class _Work:
    """The work items of one kernel and their results."""

    def __init__(self, kernel: Array, slices: tuple[int, ...]) -> None:
        self.kernel = kernel
        self.slices = slices
        self.values: dict[int, Float64] = {}
        c, kappa, f = kernel_sizes(kernel.shape)
        self.rows, self.f = c * kappa, f
        # k = 1 is always needed: its largest singular value is the norm of the layer.
        needed = sorted({1, *slices})
        filter_side = [k for k in needed if self.rows // k >= f]
        row_side = [k for k in needed if self.rows // k < f]

        # Filter side, finest first: (k, parent); the matrices of `parent` add up to those of k.
        self.tree: tuple[tuple[int, int], ...] = tuple(
            (k, min((p for p in filter_side if p > k and p % k == 0), default=0))
            for k in reversed(filter_side)
        )
        self.filter_cost = sum(
            _eigen_cost(f, k) + (0.0 if parent else _gram_cost(self.rows, f))
            for k, parent in self.tree
        )
        # Row side: the blocks of each k are cut from the coarsest k that divides it.
        self.roots: dict[int, list[int]] = {}
        for k in row_side:
            root = next(r for r in row_side if k % r == 0)
            self.roots.setdefault(root, []).append(k)

    def filter_items(self) -> list[_Item]:
        if not self.tree:
            return []
        if self.f == 1:
            ks = tuple(k for k, _ in self.tree)
            return [_Item(self.rows, _column_item, (self.kernel, ks), self.values.update)]
        arguments = (self.kernel, self.tree)
        return [_Item(self.filter_cost, _filter_item, arguments, self.values.update)]

    def split_filter(self, executor: Executor) -> list[_Item]:
        """Computes the filter side's Gram matrices and returns one eigenvalue item for each."""
        items: list[_Item] = []
        grams: dict[int, Float64] = {}
        for k, parent in self.tree:
            if len(items) * self.f**2 > _GRAM_ENTRIES:
                _run(executor, items)
                items = []
            if parent:
                grams[k] = _merge(grams[parent], k)
            else:
                grams[k] = np.empty((k, self.f, self.f))
                cost = _gram_cost(self.rows / k, self.f)
                _run(
                    executor,
                    [
                        _Item(cost, _gram_item, (part,), partial(grams[k].__setitem__, i))
                        for i, part in enumerate(_parts(self.kernel, k))
                    ],
                )
            self.values[k] = np.empty((k, self.f))
            for i, gram in enumerate(grams[k]):
                keep = partial(self.values[k].__setitem__, i)
                items.append(_Item(_eigen_cost(self.f, 1), _eigenvalue_item, (gram,), keep))
            _forget(grams, self.tree, k)
        return items

    def row_items(self) -> list[_Item]:
        items = []
        channels = self.kernel.shape[-2]
        for root, ks in self.roots.items():
            side = self.rows // root
            pieces = tuple(k // root for k in ks)
            cost = _gram_cost(self.f, side) + sum(_eigen_cost(side / m, m) for m in pieces)
            for k in ks:
                self.values[k] = np.empty((k, self.rows // k))
            entries = max(side * side, side * self.f)
            step = max(1, min(int(_ITEM_COST / cost), _BATCH_ENTRIES // entries))
            width = channels // root
            for start in range(0, root, step):
                count = min(step, root - start)
                part = self.kernel[..., start * width : (start + count) * width, :]
                keep = partial(self.keep_pieces, root, start)
                items.append(_Item(count * cost, _row_item, (part, count, pieces), keep))
        return items

    def keep_pieces(self, root: int, start: int, pieces: dict[int, Float64]) -> None:
        for m, value in pieces.items():
            self.values[root * m][start * m :][: len(value)] = value

    def result(self) -> Spectra:
        whole = _reduce(self.values[1], max(self.rows, self.f))
        curves = {
            k: whole if k == 1 else _reduce(self.values[k], max(self.rows // k, self.f))
            for k in self.slices
        }
        return Spectra(
            kernel_shape=tuple(self.kernel.shape),
            norm=float(whole.residual_norm[0]),
            energy=float(whole.residual_energy[0]),
            slices=curves,
        )


def _reduce(eigenvalues: Float64, side: int) -> SliceSpectrum:
    """Reduces the ascending eigenvalues `[k, r]` of all slices to the curves over j."""
    # Set what the Gram matrix cannot resolve to 0: a slice without full rank must have error 0.
    resolution = side * np.finfo(np.float64).eps * eigenvalues[:, -1:]
    squares = np.where(eigenvalues > np.maximum(resolution, 0.0), eigenvalues, 0.0)
    norm = np.append(np.sqrt(squares.max(axis=0))[::-1], 0.0)
    energy = np.append(np.cumsum(squares.sum(axis=0))[::-1], 0.0)
    return SliceSpectrum(norm, energy)


def _run(executor: Executor, items: list[_Item]) -> None:
    """Runs the items, the most expensive first, and keeps their results."""
    order = sorted(items, key=lambda item: -item.cost)
    calls = [(item.function, *item.arguments) for item in order]
    for item, result in zip(order, map_within(executor, _call, calls), strict=True):
        item.keep(result)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _compute(works: list[_Work], executor: Executor) -> None:
    items = [item for work in works for item in work.row_items()]
    total = sum(item.cost for item in items) + sum(work.filter_cost for work in works)
    for work in works:
        # Splitting changes which worker computes a number, never the number itself.
        if work.f > 1 and work.filter_cost > max(_SPLIT_SHARE * total, _ITEM_COST):
            items.extend(work.split_filter(executor))
        else:
            items.extend(work.filter_items())
    _run(executor, items)


# ---------------------------------------------------------------------------------------------


def slice_vectors(matrix: Float64) -> tuple[Float64, bool]:
    """Returns the orthonormal singular vectors of a slice on its smaller side.

    Args:
        matrix: Array `[n, f]` in float64.

    Returns:
        `(vectors, right)`: vectors `[min(n, f), min(n, f)]` in columns, the leading one first;
        `right` says whether they are right singular vectors (n ≥ f) or left ones.

    Example:
        >>> vectors, right = slice_vectors(np.eye(4, 3))
        >>> vectors.shape, right
        ((3, 3), True)
    """
    right = matrix.shape[0] >= matrix.shape[1]
    gram = matrix.T @ matrix if right else matrix @ matrix.T
    return np.linalg.eigh(gram)[1][:, ::-1], right


def factorize(kernel: Array, slices: int, rank: int) -> tuple[Array, Array]:
    """Returns the balanced low-rank factors of a kernel for one choice (k, j).

    Every slice W_i = U Σ Vᵀ is truncated to its j leading singular triplets. The encoder takes
    U·√Σ and the decoder √Σ·Vᵀ. The entry of largest magnitude in every encoder column is made
    positive. This fixes the signs, so the same kernel gives the same factors.

    Args:
        kernel: Array `[*spatial, c, f]` of floating-point numbers.
        slices: Number of channel slices k, a divisor of c.
        rank: Rank j of every slice, from 1 to min((c/k)·κ, f).

    Returns:
        `(encoder, decoder)` in the kernel's dtype: `[*spatial, c/k, k·j]`, the kernel of a
        convolution with k groups, and `[k·j, f]`.

    Raises:
        ValueError: If `slices` does not divide c, `rank` is out of its range, or the kernel holds
            NaN or infinity.

    Example:
        >>> kernel = np.random.default_rng(0).normal(size=(3, 3, 8, 16))
        >>> encoder, decoder = factorize(kernel, 2, 5)
        >>> encoder.shape, decoder.shape
        ((3, 3, 4, 10), (10, 16))
    """
    kernel = check_kernel(kernel)
    most = full_rank(kernel.shape, slices)
    if not 1 <= rank <= most:
        raise ValueError(
            f"Expected a rank from 1 to {most}, the full rank of a slice of a kernel of shape "
            f"{kernel.shape} in {slices} slices. Received: rank={rank}"
        )
    c, kappa, f = kernel_sizes(kernel.shape)
    dtype = kernel.dtype if kernel.dtype.kind not in "biu" else np.dtype(np.float64)
    left = np.empty((slices, c // slices * kappa, rank), dtype)
    right = np.empty((slices, rank, f), dtype)
    with single_threaded_blas():
        for i, part in enumerate(_parts(kernel, slices)):
            encoder, decoder = _balanced_factors(_rows(part, 1)[0], rank)
            left[i], right[i] = encoder, decoder
    return fold_encoder(left, kernel.shape[:-2]), right.reshape(slices * rank, f)


def _balanced_factors(matrix: Float64, rank: int) -> tuple[Float64, Float64]:
    # The product with orthonormal vectors is a projection of the slice. It is exact in float64,
    # however coarsely the Gram matrix resolves small singular values.
    vectors, is_right = slice_vectors(matrix)
    vectors = vectors[:, :rank]
    if is_right:
        encoder, decoder = matrix @ vectors, vectors.T.copy()
        sigma = np.linalg.norm(encoder, axis=0)
    else:
        encoder, decoder = vectors.copy(), vectors.T @ matrix
        sigma = np.linalg.norm(decoder, axis=1)
    peak = encoder[np.abs(encoder).argmax(axis=0), np.arange(rank)]
    root = np.sqrt(sigma)
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    scale = np.where(peak < 0, -1.0, 1.0) * np.where(root > 0, 1.0, 0.0)
    large, small = (inverse, root) if is_right else (root, inverse)
    return encoder * (large * scale), decoder * (small * scale)[:, None]
