"""Channel slices of a kernel: unfolding to matrices, folding back, and counting weights.

A kernel is an array `[*spatial, c, f]` with any number of spatial axes (none for a dense layer),
`c` input channels and `f` filters. κ is the number of spatial positions, e.g. `kh * kw`.
Notation and formulas: Liebenwein et al., "Compressing Neural Networks: Towards Determining the
Optimal Layer-wise Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_alds.core.checks import positive_int

Array = NDArray[Any]

#: Fold schemes: which window axes a convolution's decoder owns, see `decoder_axes`.
SCHEMES = (0, 1, 2, 3)


def divisors(n: int) -> tuple[int, ...]:
    """Returns the divisors of a positive integer in ascending order.

    Raises:
        ValueError: If `n` is not positive.

    Example:
        >>> divisors(12)
        (1, 2, 3, 4, 6, 12)
    """
    return _divisors(positive_int(n, "n"))


@functools.lru_cache(maxsize=1024)
def _divisors(n: int) -> tuple[int, ...]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(small + [n // d for d in reversed(small) if d * d != n])


def kernel_sizes(kernel_shape: Sequence[int]) -> tuple[int, int, int]:
    """Returns `(c, κ, f)` of a kernel shape: channels, spatial positions, filters.

    Args:
        kernel_shape: Shape `[*spatial, c, f]`; every axis is at least 1.

    Raises:
        ValueError: If there are fewer than two axes or an axis is empty.

    Example:
        >>> kernel_sizes((3, 3, 16, 32))
        (16, 9, 32)
    """
    return _kernel_sizes(tuple(kernel_shape))


@functools.lru_cache(maxsize=1024)
def _kernel_sizes(kernel_shape: tuple[int, ...]) -> tuple[int, int, int]:
    shape = tuple(int(n) for n in kernel_shape)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            "Expected a kernel shape [*spatial, channels, filters] without empty axes. "
            f"Received: kernel_shape={shape}"
        )
    return shape[-2], math.prod(shape[:-2]), shape[-1]


def check_slices(slices: int, channels: int) -> None:
    """Raises `ValueError` unless `slices` is a divisor of `channels`."""
    if slices < 1 or channels % slices:
        raise ValueError(
            f"Expected slices to be a divisor of the {channels} input channels, one of "
            f"{divisors(channels)}. Received: slices={slices}"
        )


def full_rank(kernel_shape: Sequence[int], slices: int) -> int:
    """Returns the largest rank of one slice, min((c/k)·κ, f).

    Args:
        kernel_shape: Shape `[*spatial, c, f]`.
        slices: Number of channel slices k, a divisor of c.

    Raises:
        ValueError: If `slices` does not divide the channels.

    Example:
        >>> full_rank((3, 3, 16, 32), 8)
        18
    """
    c, kappa, f = kernel_sizes(kernel_shape)
    check_slices(slices, c)
    return min(c // slices * kappa, f)


def weights(kernel_shape: Sequence[int], slices: int, rank: int) -> int:
    """Returns the number of weights of a factorized kernel, j·(k·f + c·κ).

    The encoder holds c·κ·j weights and the decoder k·j·f. The dense kernel holds f·c·κ.
    Biases are not counted; they stay.

    Args:
        kernel_shape: Shape `[*spatial, c, f]` of the dense kernel.
        slices: Number of channel slices k.
        rank: Rank j of every slice.

    Example:
        >>> weights((3, 3, 16, 32), 2, 4)
        832
    """
    return sum(factor_weights(kernel_shape, slices, rank))


def largest_rank(kernel_shape: Sequence[int], slices: int) -> int:
    """Returns the largest rank of one slice with fewer weights than the kernel; it may be 0.

    Example:
        >>> largest_rank((6, 6), 2)
        1
    """
    fewer = (math.prod(kernel_shape) - 1) // weights(kernel_shape, slices, 1)
    return min(full_rank(kernel_shape, slices), fewer)


def factor_weights(kernel_shape: Sequence[int], slices: int, rank: int) -> tuple[int, int]:
    """Returns the number of weights of the encoder, j·c·κ, and of the decoder, j·k·f.

    In a fold scheme, κ counts only the encoder's part of the window. f is the number of filters
    times the decoder's part of the window.

    Args:
        kernel_shape: Shape `[*spatial, c, f]` of the dense kernel in the fold scheme.
        slices: Number of channel slices k.
        rank: Rank j of every slice.

    Returns:
        `(encoder, decoder)`.

    Example:
        >>> factor_weights(convolution_unfolding(2, 3).shape((3, 3, 16, 32)), 2, 4)
        (64, 2304)
    """
    c, kappa, f = kernel_sizes(kernel_shape)
    return rank * c * kappa, rank * slices * f


def unfold(kernel: Array, slices: int) -> Array:
    """Unfolds a kernel to one matrix per channel slice.

    Rows are channel-major (channel first, then spatial position), so that finer slices are
    consecutive blocks of rows.

    Args:
        kernel: Array `[*spatial, c, f]`.
        slices: Number of channel slices k, a divisor of c.

    Returns:
        Array `[k, (c/k)·κ, f]` of the kernel's dtype.

    Raises:
        ValueError: If `slices` does not divide the channels.

    Example:
        >>> unfold(np.zeros((3, 3, 16, 32)), 4).shape
        (4, 36, 32)
    """
    c, kappa, f = kernel_sizes(kernel.shape)
    check_slices(slices, c)
    return np.moveaxis(kernel, -2, 0).reshape(slices, c // slices * kappa, f)


def fold_encoder(matrices: Array, spatial: Sequence[int]) -> Array:
    """Folds the left factors of all slices into one grouped-convolution kernel.

    Args:
        matrices: Array `[k, (c/k)·κ, j]`, with channel-major rows as in `unfold`.
        spatial: Spatial shape of the kernel, with product κ; `()` for a dense layer.

    Returns:
        Array `[*spatial, c/k, k·j]`; slice i owns the output channels i·j … i·j+j−1.

    Raises:
        ValueError: If the number of rows is not a multiple of κ.

    Example:
        >>> fold_encoder(np.zeros((4, 36, 5)), (3, 3)).shape
        (3, 3, 4, 20)
    """
    spatial = tuple(spatial)
    slices, rows, rank = matrices.shape
    kappa = math.prod(spatial)
    if rows % kappa:
        raise ValueError(
            f"Expected the number of rows to be a multiple of the {kappa} spatial positions. "
            f"Received: matrices.shape={matrices.shape}, spatial={spatial}"
        )
    # [k, c/k, *spatial, j] -> [*spatial, c/k, k, j]
    folded = np.moveaxis(matrices.reshape(slices, rows // kappa, *spatial, rank), (0, 1), (-2, -3))
    return folded.reshape(*spatial, rows // kappa, slices * rank)


def unfold_encoder(kernel: Array, slices: int) -> Array:
    """Unfolds a grouped-convolution kernel into the left factors of all slices.

    The inverse of `fold_encoder`.

    Args:
        kernel: Array `[*spatial, c/k, k·j]`.
        slices: Number of channel slices k.

    Returns:
        Array `[k, (c/k)·κ, j]`.

    Raises:
        ValueError: If `slices` does not divide the output channels.

    Example:
        >>> unfold_encoder(np.zeros((3, 3, 4, 20)), 4).shape
        (4, 36, 5)
    """
    *spatial, channels, outputs = kernel.shape
    if slices < 1 or outputs % slices:
        raise ValueError(
            f"Expected slices to be a divisor of the encoder's {outputs} output channels. "
            f"Received: slices={slices}"
        )
    split = kernel.reshape(*spatial, channels, slices, outputs // slices)
    matrices = np.moveaxis(split, (-2, -3), (0, 1))
    return matrices.reshape(slices, channels * math.prod(spatial), outputs // slices)


def recompose(encoder: Array, decoder: Array, slices: int) -> Array:
    """Multiplies an encoder and a decoder to recover the dense kernel.

    Args:
        encoder: Array `[*spatial, c/k, k·j]`.
        decoder: Array `[k·j, f]`.
        slices: Number of channel slices k.

    Returns:
        The dense kernel `[*spatial, c, f]` in the encoder's dtype.

    Raises:
        ValueError: If the encoder's output channels and the decoder's rows differ, or `slices`
            does not divide them.

    Example:
        >>> recompose(np.zeros((3, 3, 4, 20)), np.zeros((20, 32)), 4).shape
        (3, 3, 16, 32)
    """
    if decoder.ndim != 2 or decoder.shape[0] != encoder.shape[-1]:
        raise ValueError(
            f"Expected a decoder with {encoder.shape[-1]} rows, one for each output channel of "
            f"the encoder. Received: decoder.shape={decoder.shape}"
        )
    *spatial, channels, outputs = encoder.shape
    left = unfold_encoder(encoder, slices)
    right = decoder.reshape(slices, outputs // slices, decoder.shape[1])
    dense = (left @ right).reshape(slices * channels, *spatial, decoder.shape[1])
    return np.moveaxis(dense, 0, -2).astype(encoder.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class Unfolding:
    """How to read a kernel of any layout as `[*spatial, c, f]`: the role of each axis.

    The encoder owns the `spatial` axes. The `channels` axes together are the c input channels. All
    other axes together are the f filters: outputs, and spatial axes that the decoder owns.

    Attributes:
        spatial: Axes of the kernel, in order.
        channels: Axes of the kernel, in order.
        filters: Axes of the kernel, in order.
        rank_axis: Position of the rank axis among the `filters` axes in the decoder's weights.

    Raises:
        ValueError: If an axis is missing or named twice, or there are no channels or filters.

    Example:
        >>> convolution_unfolding(2)
        Unfolding(spatial=(0, 1), channels=(2,), filters=(3,), rank_axis=0)
    """

    spatial: tuple[int, ...]
    channels: tuple[int, ...]
    filters: tuple[int, ...]
    rank_axis: int = 0

    def __post_init__(self) -> None:
        if (
            sorted(self.axes) != list(range(len(self.axes)))
            or not self.channels
            or not self.filters
        ):
            raise ValueError(
                "Expected every axis of a kernel once, channels and filters among them. "
                f"Received: {self}"
            )

    @property
    def axes(self) -> tuple[int, ...]:
        """The kernel's axes in the order spatial, channels, filters."""
        return (*self.spatial, *self.channels, *self.filters)

    def shape(self, kernel_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape `(*spatial, c, f)` of a kernel once it is read.

        Args:
            kernel_shape: Shape of the kernel in the layer's own layout.
        """
        spatial, channels, filters = (
            [int(kernel_shape[axis]) for axis in axes]
            for axes in (self.spatial, self.channels, self.filters)
        )
        return (*spatial, math.prod(channels), math.prod(filters))

    def read(self, kernel: Array) -> Array:
        """The kernel as `[*spatial, c, f]`."""
        return np.transpose(kernel, self.axes).reshape(self.shape(kernel.shape))

    def write(self, kernel: Array, kernel_shape: Sequence[int]) -> Array:
        """The inverse of `read`: returns the kernel in the layer's own layout.

        Args:
            kernel: Array `[*spatial, c, f]`.
            kernel_shape: Shape of the kernel in the layer's own layout.
        """
        sizes = [int(kernel_shape[axis]) for axis in self.axes]
        return np.transpose(kernel.reshape(sizes), np.argsort(self.axes))

    def read_decoder(self, decoder: Array, kernel_shape: Sequence[int]) -> Array:
        """A decoder's weights as the matrix `[k·j, f]`.

        Args:
            decoder: The weights in the layer's own layout; axes of length 1 do not matter.
            kernel_shape: Shape of the dense kernel in the layer's own layout.
        """
        sizes = [int(kernel_shape[axis]) for axis in self.filters]
        f = math.prod(sizes)
        sizes.insert(self.rank_axis, decoder.size // f)
        return np.moveaxis(decoder.reshape(sizes), self.rank_axis, 0).reshape(-1, f)

    def write_decoder(self, decoder: Array, kernel_shape: Sequence[int]) -> Array:
        """The inverse of `read_decoder`, without the axes of length 1.

        Args:
            decoder: Array `[k·j, f]`.
            kernel_shape: Shape of the dense kernel in the layer's own layout.
        """
        sizes = [int(kernel_shape[axis]) for axis in self.filters]
        return np.moveaxis(decoder.reshape(-1, *sizes), 0, self.rank_axis)


def decoder_axes(scheme: int, dimensions: int) -> tuple[int, ...]:
    """Returns the window axes that a convolution's decoder owns in a fold scheme.

    The encoder owns the others. Encoder and decoder run one after the other. Each slides along its
    own axes, with their strides, padding and dilation. The schemes are from the paper's supplement:
    a kernel `[kh, kw, c, f]` unfolds to f × (c, kh, kw) in scheme 0, (f, kh) × (kw, c) in 1,
    (f, kw) × (kh, c) in 2, and (f, kh, kw) × c in 3. One or three axes only have 0 and 3.

    Args:
        scheme: The fold scheme.
        dimensions: Number of window axes, 0 for a dense layer.

    Returns:
        Axes of the window, ascending.

    Raises:
        ValueError: If the scheme does not exist for this number of axes.

    Example:
        >>> [decoder_axes(scheme, 2) for scheme in SCHEMES]
        [(), (0,), (1,), (0, 1)]
    """
    axes: dict[int, tuple[int, ...]] = {0: ()}
    if dimensions:
        axes[3] = tuple(range(dimensions))
    if dimensions == 2:
        axes.update({1: (0,), 2: (1,)})
    if scheme not in axes:
        raise ValueError(
            f"Expected a fold scheme of a window of {dimensions} axes, one of "
            f"{tuple(sorted(axes))}. Received: scheme={scheme!r}"
        )
    return axes[scheme]


def distinct_schemes(window: Sequence[int]) -> dict[int, int]:
    """Maps each fold scheme of a window to the smallest scheme with the same unfolding.

    Axes of length 1 do not change the matrix. Among equal schemes, the smallest one leaves the
    most axes to the encoder, and their strides with them.

    Args:
        window: The kernel size, `()` for a dense layer.

    Returns:
        For every scheme of a window with this many axes, the scheme that replaces it. For a
        window of one position that is always scheme 0.

    Example:
        >>> distinct_schemes((3, 3))
        {0: 0, 1: 1, 2: 2, 3: 3}
        >>> distinct_schemes((1, 5))
        {0: 0, 1: 0, 2: 2, 3: 2}
        >>> distinct_schemes((5,))
        {0: 0, 3: 3}
        >>> distinct_schemes(())
        {0: 0, 1: 0, 2: 0, 3: 0}
    """
    if math.prod(window) == 1:
        return dict.fromkeys(SCHEMES, 0)
    known = SCHEMES if len(window) == 2 else (0, 3)
    moved = {
        scheme: tuple(axis for axis in decoder_axes(scheme, len(window)) if window[axis] > 1)
        for scheme in known
    }
    return {
        scheme: next(first for first in known if moved[first] == moved[scheme]) for scheme in known
    }


@functools.lru_cache(maxsize=64)
def convolution_unfolding(dimensions: int, scheme: int = 0) -> Unfolding:
    """Returns how to read the kernel `[*window, c, f]` of a convolution or dense layer.

    Args:
        dimensions: Number of spatial axes, 0 for a dense layer.
        scheme: Fold scheme: which spatial axes the decoder owns, see `decoder_axes`. Defaults to
            0: none.

    Raises:
        ValueError: If the scheme does not exist for this number of axes.

    Example:
        >>> convolution_unfolding(0).shape((12, 5))
        (12, 5)
        >>> convolution_unfolding(2, 1).shape((5, 3, 8, 16))
        (3, 8, 80)
    """
    moved = decoder_axes(scheme, dimensions)
    kept = tuple(axis for axis in range(dimensions) if axis not in moved)
    return Unfolding(kept, (dimensions,), (*moved, dimensions + 1), rank_axis=len(moved))


def transposed_unfolding(dimensions: int) -> Unfolding:
    """Returns how to read the kernel `[*window, f, c]` of a transposed convolution.

    The decoder owns the window and is itself a transposed convolution. Both factors thus work on
    the smaller feature map, at the input's positions.

    Args:
        dimensions: Number of spatial axes.

    Returns:
        The `Unfolding` to the matrix `[c, window·f]`.

    Example:
        >>> transposed_unfolding(2).shape((3, 3, 8, 16))
        (16, 72)
    """
    filters = tuple(range(dimensions + 1))
    return Unfolding((), (dimensions + 1,), filters, rank_axis=len(filters))


@functools.lru_cache
def einsum_terms(equation: str) -> tuple[str, str, str]:
    """Returns the three terms of an einsum layer's equation.

    Args:
        equation: `"inputs,kernel->outputs"`, as for `EinsumDense`.

    Raises:
        ValueError: If it does not have three terms.

    Example:
        >>> einsum_terms("ab, bc -> ac")
        ('ab', 'bc', 'ac')
    """
    inputs, kernel, outputs = re.split(",|->", re.sub(r"\s", "", equation))
    return inputs, kernel, outputs


def einsum_unfolding(equation: str) -> Unfolding:
    """Returns how to read the kernel of an einsum layer.

    Kernel axes shared only with the input are channels. Kernel axes shared only with the output
    are filters.

    Args:
        equation: `"inputs,kernel->outputs"`, as for `EinsumDense`.

    Raises:
        ValueError: If the kernel is not a matrix from inputs to outputs: it has another kind of
            axis, no channels or no filters. The message says which.

    Example:
        >>> einsum_unfolding("abc,cde->abde").shape((16, 4, 8))
        (16, 32)
    """
    inputs, kernel, outputs = einsum_terms(equation)
    for axis in kernel:
        if axis in inputs and axis in outputs:
            raise ValueError(
                f"axis '{axis}' of its kernel is in inputs and outputs (equation {equation!r}): it "
                "holds many matrices, not one"
            )
        if axis not in inputs and axis not in outputs:
            raise ValueError(
                f"axis '{axis}' of its kernel is neither in inputs nor in outputs "
                f"(equation {equation!r})"
            )
    if len(set(kernel)) < len(kernel) or len(set(inputs) - {"."}) < len(inputs.replace(".", "")):
        raise ValueError(f"an axis is named twice in one term (equation {equation!r})")
    channels = tuple(n for n, axis in enumerate(kernel) if axis in inputs)
    filters = tuple(n for n, axis in enumerate(kernel) if axis in outputs)
    if not channels or not filters:
        raise ValueError(f"its kernel maps no inputs to outputs (equation {equation!r})")
    return Unfolding((), channels, filters)
