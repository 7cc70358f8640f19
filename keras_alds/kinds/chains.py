"""Chains of small convolutions in place of one: Tucker-2 and CP; see `core.chains`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import keras

from keras_alds._backend import tensors
from keras_alds.core import tucker as tucker  # adds its decomposition
from keras_alds.core.chains import CP, EQUATIONS, TUCKER
from keras_alds.core.checks import positive_int
from keras_alds.core.slicing import Unfolding, convolution_unfolding
from keras_alds.kinds import forms
from keras_alds.kinds.base import KINDS, Shape, Writer, size_of
from keras_alds.kinds.convolution import (
    BaseFactorizedConv,
    Convolution,
    encoder_convolution,
    pointwise,
)


class BaseChainConv2D(BaseFactorizedConv):
    """A chain of convolutions, the first and the last one pointwise."""

    _dimensions = 2
    _folds = False
    _scheme: ClassVar[int]

    def __init__(
        self, filters: int, kernel_size: int | Sequence[int], rank: int, **kwargs: Any
    ) -> None:
        super().__init__(
            filters, kernel_size, slices=1, rank=rank, encoder_form="auto", scheme=0, **kwargs
        )

    def _checked_scheme(self, value: Any) -> int:
        return self._scheme

    @property
    def unfolding(self) -> Unfolding:
        """How the dense kernel unfolds to a matrix, in fold scheme 0."""
        return convolution_unfolding(2)

    def stages(self) -> list[tuple[int, dict[str, Any]]]:
        """The channel groups of each convolution, and its window with all settings."""
        return [(1, pointwise(self)), *self._middle(), (1, pointwise(self))]

    def _middle(self) -> list[tuple[int, dict[str, Any]]]:
        raise NotImplementedError

    def _part_of_window(self, *axes: int) -> dict[str, Any]:
        """The settings of a convolution along some axes of the window."""
        found = {**pointwise(self), "padding": self.padding}
        for name in ("kernel_size", "strides", "dilation_rate"):
            values = enumerate(getattr(self, name))
            found[name] = tuple(value if axis in axes else 1 for axis, value in values)
        return found

    def _widths(self, channels: int) -> list[int]:
        """The channels before, between and after the convolutions."""
        raise NotImplementedError

    def _add_weights(self, channels: int) -> None:
        self.kernel_shape = self._dense_shape(channels)
        widths = self._widths(channels)
        for name, (groups, settings), before, after in zip(
            self.factor_names, self.stages(), widths[:-1], widths[1:], strict=True
        ):
            shape = (*settings["kernel_size"], before // groups, after)
            self._add_part(name, shape, name if name in self._parts else "encoder")
        self._add_bias(self.filters)

    def _convolve(self, x: Any, data_format: str, training: Any) -> Any:
        for factor, (groups, settings) in zip(self.factors, self.stages(), strict=True):
            x = forms.convolve_encoder(
                x,
                tensors.cast(tensors.tensor(factor), x.dtype),
                slices=groups,
                form="grouped",
                strides=settings["strides"],
                padding=settings["padding"],
                dilation_rate=settings["dilation_rate"],
                data_format=data_format,
            )
        return x

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        config = super().get_config()
        return {key: config[key] for key in config if key not in ("slices", "encoder_form")}


class BaseTuckerConv2D(BaseChainConv2D):
    """Pointwise, the window on a small core, pointwise."""

    factor_names = ("encoder", "core", "decoder")
    _scheme = TUCKER

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        input_rank: int,
        rank: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(filters, kernel_size, rank, **kwargs)
        self.input_rank = positive_int(input_rank, "input_rank")

    def _middle(self) -> list[tuple[int, dict[str, Any]]]:
        return [(1, self._part_of_window(0, 1))]

    def _widths(self, channels: int) -> list[int]:
        kappa = math.prod(self.kernel_size)
        most = min(channels, kappa * self.filters), min(self.filters, kappa * self.input_rank)
        if self.input_rank > most[0] or self.rank > most[1]:
            raise ValueError(
                f"Expected `input_rank` to be at most {most[0]}, and `rank` at most {most[1]}. "
                f"Received: input_rank={self.input_rank}, rank={self.rank}"
            )
        return [channels, self.input_rank, self.rank, self.filters]

    def _recomposed(self, *factors: Any) -> Any:
        encoder, core, decoder = factors
        return tensors.einsum(EQUATIONS[TUCKER], encoder[0, 0], core, decoder[0, 0])

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "input_rank": self.input_rank}


class BaseCPConv2D(BaseChainConv2D):
    """Pointwise, a depthwise convolution along each axis of the window, pointwise."""

    factor_names = ("encoder", "rows", "columns", "decoder")
    _scheme = CP

    def _middle(self) -> list[tuple[int, dict[str, Any]]]:
        return [(self.rank, self._part_of_window(axis)) for axis in (0, 1)]

    def _widths(self, channels: int) -> list[int]:
        return [channels, self.rank, self.rank, self.rank, self.filters]

    def _recomposed(self, *factors: Any) -> Any:
        encoder, rows, columns, decoder = factors
        parts = encoder[0, 0], rows[:, 0, 0], columns[0, :, 0], decoder[0, 0]
        return tensors.einsum(EQUATIONS[CP], *parts)


@keras.saving.register_keras_serializable(package="keras_alds")
class TuckerConv2D(BaseTuckerConv2D, keras.layers.Layer):
    """A two-dimensional convolution held as a Tucker-2 decomposition of its kernel.

    The layer computes `activation(decoder(core(encoder(x))) + bias)`: a pointwise convolution to
    `input_rank` channels, a convolution with the layer's kernel size, strides, padding and dilation
    to `rank` channels, and a pointwise convolution. It equals a stock `Conv2D` whose kernel,
    unfolded by its input channels, has rank `input_rank`, and by its filters rank `rank`; that
    kernel is `layer.kernel`.

    Weights, in this order: `encoder` `[1, 1, channels, input_rank]`, `core` `[kh, kw, input_rank,
    rank]`, `decoder` `[1, 1, rank, filters]`, `bias` `[filters]`.

    Args:
        filters: int, number of output channels.
        kernel_size: int or tuple of 2 int, the core's window.
        input_rank: int, rank of the input channels, p; at most `min(channels, filters * kh * kw)`.
        rank: int, rank of the output channels, j; at most `min(filters, input_rank * kh * kw)`.
        **kwargs: all other arguments of `FactorizedConv2D` but `slices`, `encoder_form` and
            `scheme`. The settings of the encoder hold for the core too.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)` for
        `"channels_first"`.

    Output shape:
        As a stock `Conv2D`: `(batch, new_height, new_width, filters)`, or channels first.

    Raises:
        ValueError: If an argument is out of its range, or if the input is smaller than the window.

    Source:
        Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
        Applications", ICLR 2016 (arXiv 1511.06530).

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import TuckerConv2D
        >>> layer = TuckerConv2D(8, 3, input_rank=2, rank=3, padding="same")
        >>> layer(np.ones((1, 5, 5, 4), "float32")).shape
        TensorShape([1, 5, 5, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(1, 1, 4, 2), (3, 3, 2, 3), (1, 1, 3, 8), (8,)]
    """


@keras.saving.register_keras_serializable(package="keras_alds")
class CPConv2D(BaseCPConv2D, keras.layers.Layer):
    """A two-dimensional convolution held as a canonical polyadic (CP) decomposition of its kernel.

    The layer computes `activation(decoder(columns(rows(encoder(x)))) + bias)`: a pointwise
    convolution to `rank` channels, a depthwise convolution along the height, another along the
    width, and a pointwise convolution. It equals a stock `Conv2D` whose kernel is a sum of `rank`
    outer products of four vectors; that kernel is `layer.kernel`.

    Weights, in this order: `encoder` `[1, 1, channels, rank]`, `rows` `[kh, 1, 1, rank]`, `columns`
    `[1, kw, 1, rank]`, `decoder` `[1, 1, rank, filters]`, `bias` `[filters]`.

    Args:
        filters: int, number of output channels.
        kernel_size: int or tuple of 2 int, the window.
        rank: int, number of outer products.
        **kwargs: all other arguments of `FactorizedConv2D` but `slices`, `encoder_form` and
            `scheme`. The settings of the encoder hold for rows and columns too.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)` for
        `"channels_first"`.

    Output shape:
        As a stock `Conv2D`: `(batch, new_height, new_width, filters)`, or channels first.

    Raises:
        ValueError: If an argument is out of its range, or if the input is smaller than the window.

    Source:
        Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned
        CP-Decomposition", ICLR 2015 (arXiv 1412.6553).

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import CPConv2D
        >>> layer = CPConv2D(8, 3, rank=3, padding="same")
        >>> layer(np.ones((1, 5, 5, 4), "float32")).shape
        TensorShape([1, 5, 5, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(1, 1, 4, 3), (3, 1, 1, 3), (1, 3, 1, 3), (1, 1, 3, 8), (8,)]
    """


class ChainConvolution(Convolution):
    """`Conv2D` as a chain."""

    max_slices: ClassVar[int | None] = 1
    equalized = measured = encodes = decodes = False

    def factorized_macs(self, layer: Any, inputs: Shape, outputs: Shape) -> int:
        """Multiply–accumulates of one call of a factorized layer."""
        where = self.earlier_positions(layer, layer.scheme, inputs, outputs)
        where.append(self.positions(layer, inputs, outputs))
        pairs = zip(layer.factors, where, strict=True)
        return sum(size_of(layer, some) * math.prod(tuple(v.shape)) for v, some in pairs)

    def written_out(self, writer: Writer, layer: Any, axes: int) -> list[Any]:
        stages = zip(layer.factor_names, layer.stages(), strict=True)
        *others, (_, (_, last)) = stages
        found = [
            encoder_convolution(writer, layer, axes, part=part, slices=groups, **settings)
            for part, (groups, settings) in others
        ]
        decoder = writer.layers.Conv2D(layer.filters, **last, **writer.decoder_options(layer))
        return [*found[:-1], *writer.pair(layer, found[-1], decoder)]


KINDS["Conv2D"].chains = {
    TUCKER: ChainConvolution("Conv2D", TuckerConv2D),
    CP: ChainConvolution("Conv2D", CPConv2D),
}
