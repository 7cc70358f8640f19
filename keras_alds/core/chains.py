"""Convolutions as chains of small ones: the forms beside encoder and decoder, and their sizes.

A tensor decomposition writes the kernel `[*window, c, f]` as a product of several small arrays.
Each of them is one convolution of a chain:

- Tucker-2, `[c, p]`, `[*window, p, j]`, `[j, f]`: 1×1, the window on a small core, 1×1.
- CP, `[c, j]`, one `[n, j]` for each axis of the window, `[j, f]`: 1×1, a depthwise convolution
  along each axis, 1×1.

They count as further fold schemes. p is the rank of the input channels; j is the rank. A kernel
without a window is a matrix, and its decomposition the SVD: fold scheme 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.slicing import Array, factor_weights, kernel_sizes
from keras_alds.core.spectra import Spectra

TUCKER, CP = 4, 5

#: What users read.
NAMES = {TUCKER: "Tucker-2", CP: "CP"}
#: The kernel as an einsum of the arrays.
EQUATIONS = {TUCKER: "cp,hwpj,jf->hwcf", CP: "cj,hj,wj,jf->hwcf"}

# The most ranks of the input channels that are looked at.
_MOST_INPUT_RANKS = 64
# TensorLy's products of all arrays but one, of which each has as many entries at most (1 GB).
_MOST_ENTRIES = 1 << 27


@dataclass(frozen=True)
class Chain:
    """A way to decompose kernels into chains.

    Attributes:
        spectra: Makes the errors of all ranks from a kernel and the second moment of its inputs, if
            it is known: `Spectra` with ranks p of the input channels in place of slices.
        factors: Makes the arrays of the chain, in order, from the same and the ranks p and j.
    """

    spectra: Callable[[Array, SecondMoment | None], Spectra]
    factors: Callable[[Array, SecondMoment | None, int, int], tuple[Array, ...]]


#: How kernels are decomposed, by scheme.
CHAINS: dict[int, Chain] = {}


def is_chain(scheme: int | None) -> bool:
    """Whether a scheme is a chain, not an encoder and a decoder."""
    return scheme in (TUCKER, CP)


def stage_weights(
    kernel_shape: Sequence[int], slices: int, ranks: Any, scheme: int = 0
) -> tuple[Any, ...]:
    """Returns the number of weights of each part of a factorized kernel, in the order of the calls.

    Args:
        kernel_shape: Shape `[*spatial, c, f]` of the dense kernel in the fold scheme.
        slices: Number of channel slices k; in Tucker-2 the rank p of the input channels.
        ranks: Ranks j, an integer or an array.
        scheme: Fold scheme or chain.

    Returns:
        Those of encoder and decoder, or of each convolution of a chain; each as `ranks`.

    Example:
        >>> stage_weights((3, 3, 16, 32), 4, 8, TUCKER)
        (64, 288, 256)
        >>> stage_weights((3, 3, 16, 32), 1, 8, CP)
        (128, 24, 24, 256)
    """
    c, kappa, f = kernel_sizes(kernel_shape)
    if scheme == TUCKER:
        return slices * c + 0 * ranks, slices * kappa * ranks, ranks * f
    if scheme == CP:
        return c * ranks, *(n * ranks for n in kernel_shape[:-2]), ranks * f
    encoder, decoder = factor_weights(kernel_shape, slices, 1)
    return encoder * ranks, decoder * ranks


def form_weights(kernel_shape: Sequence[int], slices: int, ranks: Any, scheme: int = 0) -> Any:
    """Returns the sum of `stage_weights`."""
    return sum(stage_weights(kernel_shape, slices, ranks, scheme))


def chain_ranks(
    kernel_shape: Sequence[int], scheme: int, multiple: int = 1, added: int = 0
) -> dict[int, range]:
    """Returns the ranks j of all chains that are smaller than the dense kernel.

    Args:
        kernel_shape: Shape `[*window, c, f]`.
        scheme: The chain.
        multiple: All ranks are multiples of this.
        added: As for `choices.offered_ranks`.

    Returns:
        Ranges, none of them empty, by the rank p of the input channels; 1 in CP. Of many ranks p,
        only some are listed.

    Example:
        >>> chain_ranks((3, 3, 4, 5), TUCKER, multiple=2)
        {2: range(2, 6, 2), 4: range(2, 4, 2)}
    """
    c, kappa, f = kernel_sizes(kernel_shape)
    most_inputs = 1 if scheme == CP else min(c, kappa * f)
    # A power of two, so that spectra of all ranks have those of every multiple.
    grid = 1 << (-(-most_inputs // _MOST_INPUT_RANKS) - 1).bit_length()
    step = 1 if scheme == CP else math.lcm(grid, multiple)
    offered = {}
    for p in range(step, most_inputs + 1, step):
        least, two = (form_weights(kernel_shape, p, j, scheme) for j in (0, 1))
        most = (math.prod(kernel_shape) - added - 1 - least) // (two - least)
        if scheme == TUCKER:
            most = min(most, f, kappa * p)
        else:
            most = min(most, _MOST_ENTRIES * min(kernel_shape) // math.prod(kernel_shape))
        if ranks := range(multiple, most + 1, multiple):
            offered[p] = ranks
    return offered


@functools.cache
def decomposer(scheme: int) -> Callable[..., list[Spectra]]:
    """Returns `decompose(kernels, moments, ranks)` of a chain, as in `core.methods`."""
    return functools.partial(_each, CHAINS[scheme].spectra)


def _each(
    spectra: Callable[..., Spectra], kernels: Sequence[Array], moments: Sequence[Any], slices: Any
) -> list[Spectra]:
    return [spectra(*pair) for pair in zip(kernels, moments, strict=True)]


def hidden_channels(scheme: int, slices: int, rank: int) -> tuple[int, ...]:
    """Returns the channels between the parts of a factorized kernel, in the order of the calls.

    Args:
        scheme: Fold scheme or chain.
        slices: Number of channel slices k; in Tucker-2 the rank p of the input channels.
        rank: Rank j.
    """
    if scheme == TUCKER:
        return slices, rank
    return (rank,) * 3 if scheme == CP else (slices * rank,)


def chain_kernel(factors: Sequence[Array], scheme: int) -> Array:
    """Multiplies the arrays of a chain to the kernel `[*window, c, f]`, in float64.

    Args:
        factors: The arrays, in order.
        scheme: The chain.

    Example:
        >>> parts = np.ones((2, 1)), np.ones((3, 1)), np.ones((3, 1)), np.ones((1, 4))
        >>> chain_kernel(parts, CP).shape
        (3, 3, 2, 4)
    """
    exact = [np.asarray(part, np.float64) for part in factors]
    return np.einsum(EQUATIONS[scheme], *exact, optimize=True)
