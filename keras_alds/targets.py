"""Targets: which slices and ranks run, and run fast, in the runtime that a model is meant for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from keras_alds.core.checks import did_you_mean
from keras_alds.core.slicing import factor_weights, full_rank


@dataclass(frozen=True)
class Target:
    """A runtime, as constraints on the slices k and the rank j of a layer.

    Every allowed choice converts and runs there, in float and in int8. Measurements found none of
    the allowed forms slow on a processor without int8 matrix units. With such units, slices of
    fewer than 32 channels are slow. For the GPU, the source code shows that it runs them as they
    are. Conv3D layers run in float only, compressed or not: LiteRT has no int8 operator for them.
    The constraints apply to each layer on its own. Layers other than 1D and 2D convolutions get
    k = 1: their sliced forms are batched matrix products or several convolutions. Fold schemes
    1 to 3 also get k = 1, which makes their factors plain convolutions.

    Attributes:
        name: Its name in `TARGETS`.
        rank_multiple: Ranks are multiples of this.
        narrow: Layers with fewer channels or fewer filters than this are narrow.
        narrow_rank_multiple: Ranks of narrow layers are multiples of this.
        slice_channels: Smallest number c/k of channels per slice, for 1 < k < c. None: such
            grouped convolutions are not allowed.
        slice_channel_multiple: For 1 < k < c, c/k is a multiple of this.
        multipliers: Depth multipliers j allowed for k = c, the depthwise form of a 2D convolution:
            pairs (smallest number of channels, largest j), ascending. These ranks need not be
            multiples of `rank_multiple`, since the vector lanes run along the channels.
        least_width: Layers with fewer channels or fewer filters than this stay whole.
        least_width_split: The same where encoder and decoder share the window: in the fold schemes
            1 and 2.
        most_work: Largest part of the dense layer's multiply–accumulates.
    """

    name: str
    rank_multiple: int
    narrow: int
    narrow_rank_multiple: int
    slice_channels: int | None
    slice_channel_multiple: int
    multipliers: tuple[tuple[int, int], ...]
    least_width: int = 0
    least_width_split: int = 0
    most_work: float = math.inf

    def ranks(
        self,
        kernel_shape: tuple[int, ...],
        slices: int,
        *,
        depthwise: bool = True,
        blocks: int = 1,
        positions: int = 1,
        strides: int = 1,
    ) -> range:
        """The ranks j allowed for a number of slices k.

        Args:
            kernel_shape: Shape `(*spatial, c, f)` of the dense kernel.
            slices: Number of slices k, a divisor of c.
            depthwise: Whether k = c has a depthwise form. It has none if the strides are unequal.
            blocks: Smallest available number of slices. It exceeds 1 for a wide layer whose input
                second moment is stored as diagonal blocks, and is then allowed in place of k = 1.
            positions: Window positions that the decoder has in the fold scheme: it has f /
                positions filters.
            strides: Positions of the encoder for each one of the decoder.

        Returns:
            A range, empty if `slices` is not allowed.

        Example:
            >>> list(TARGETS["litert"].ranks((3, 3, 32, 24), 2))
            [4, 8, 12, 16, 20, 24]
            >>> list(TARGETS["litert"].ranks((3, 3, 32, 24), 32))
            [1]
            >>> list(TARGETS["litert-reference"].ranks((3, 3, 32, 24), 2))
            []
        """
        *spatial, channels, filters = kernel_shape
        width = min(channels, filters // positions)
        is_split = bool(spatial) and positions > 1
        if width < (self.least_width_split if is_split else self.least_width):
            return range(0)
        encoder, decoder = factor_weights(kernel_shape, slices, 1)
        work = self.most_work * math.prod(kernel_shape) / (encoder * strides + decoder)
        most = int(min(full_rank(kernel_shape, slices), work))
        narrow = width < self.narrow
        step = self.narrow_rank_multiple if narrow else self.rank_multiple
        if slices == 1 or (slices == blocks and len(spatial) not in (1, 2)):
            return range(step, most + 1, step)
        if len(spatial) not in (1, 2):
            return range(0)
        if slices == channels and len(spatial) == 2 and depthwise:
            multiplier = max((j for least, j in self.multipliers if channels >= least), default=0)
            return range(1, min(multiplier, most) + 1)
        share = channels // slices
        if (
            self.slice_channels is None
            or share < self.slice_channels
            or share % self.slice_channel_multiple
        ):
            return range(0)
        return range(step, most + 1, step)


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            # CPUs without int8 matrix units, with LiteRT or Keras. Measured: these forms were not
            # slower than the dense layer, except in int8 on a processor with such units.
            Target(
                "cpu",
                rank_multiple=8,
                narrow=64,
                narrow_rank_multiple=4,
                slice_channels=64,
                slice_channel_multiple=1,
                multipliers=((32, 1),),
                least_width=32,
                least_width_split=16,
                most_work=0.75,
            ),
            # LiteRT on a CPU with XNNPACK, the delegate that it takes by itself. Measured: slices
            # of fewer than 16 channels, and depth multipliers above 1, take up to 11 times the
            # dense layer's time in int8.
            Target(
                "litert",
                rank_multiple=8,
                narrow=64,
                narrow_rank_multiple=4,
                slice_channels=16,
                slice_channel_multiple=1,
                multipliers=((32, 1),),
            ),
            # LiteRT's built-in kernels without delegate, and LiteRT for Microcontrollers. Measured:
            # grouped convolutions have reference kernels only, 3.5 to 24 times as slow as the dense
            # layer in int8; depthwise ones are optimized.
            Target(
                "litert-reference",
                rank_multiple=8,
                narrow=64,
                narrow_rank_multiple=4,
                slice_channels=None,
                slice_channel_multiple=1,
                multipliers=((32, 1), (128, 2)),
            ),
            # LiteRT's GPU delegate, which leaves what it cannot run to XNNPACK. Its source code
            # says: groups run as they are if channels and ranks of a slice are multiples of 4,
            # depthwise convolutions with multiplier 1. Not measured here.
            Target(
                "gpu-delegate",
                rank_multiple=8,
                narrow=64,
                narrow_rank_multiple=4,
                slice_channels=16,
                slice_channel_multiple=4,
                multipliers=((32, 1),),
            ),
        )
    }
)


#: The default target, and the name for no constraints at all.
CPU, SIZE = "cpu", "size"
#: Other names of targets.
ALIASES = {"tflite": "litert"}


def canonical(name: Any) -> Any:
    """A target's name in `TARGETS`, for one of `ALIASES`; anything else as it is."""
    return ALIASES.get(name, name) if isinstance(name, str) else name


def get_target(name: Any) -> Target | None:
    """Returns a target by its name.

    Args:
        name: One of the keys of `TARGETS` or `ALIASES`, or None.

    Returns:
        The `Target`; None for None.

    Raises:
        ValueError: If there is no such target.

    Example:
        >>> get_target("tflite").name
        'litert'
    """
    if name is None:
        return None
    try:
        return TARGETS[canonical(name)]
    except (KeyError, TypeError):
        raise ValueError(
            f"Expected `target` to be None or one of {', '.join(map(repr, [*TARGETS, SIZE]))}. "
            f"Received: target={name!r}{did_you_mean(name, [*TARGETS, *ALIASES, SIZE])}"
        ) from None
