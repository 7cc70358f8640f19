"""Transposed convolutions: a pointwise encoder and a decoder that is a transposed convolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import keras
import numpy as np

from keras_alds._backend import tensors
from keras_alds.core.calibration.patches import patch_chunks
from keras_alds.core.slicing import Array, Unfolding, transposed_unfolding
from keras_alds.kinds import forms
from keras_alds.kinds.base import Shape, Writer, register, without_channels
from keras_alds.kinds.convolution import (
    BaseConvolution,
    BaseFactorizedConv,
    encoder_convolution,
    pointwise,
)


class BaseFactorizedConvTranspose(BaseFactorizedConv):
    """A factorized transposed convolution over `_dimensions` spatial axes.

    The encoder is pointwise and the decoder is the transposed convolution. Both work at the input's
    positions, which are fewer than those of the upsampled map. So a weight takes the fewest
    multiply–accumulates.
    """

    _folds: ClassVar[bool] = False
    # Whether the stock layer applies its `dilation_rate`.
    _dilates: ClassVar[bool] = True

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        slices: int,
        rank: int,
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        output_padding: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filters, kernel_size, slices, rank, strides=strides, padding=padding, **kwargs
        )
        self.output_padding = self._checked_output_padding(output_padding)
        if not self._dilates:
            self.dilation_rate = (1,) * self._dimensions

    def _checked_output_padding(self, value: Any) -> tuple[int, ...] | None:
        if value is None:
            return None
        items = tuple(value) if isinstance(value, Sequence) else (value,) * self._dimensions
        if (
            len(items) != self._dimensions
            or not all(isinstance(item, int) and item >= 0 for item in items)
            or any(item >= stride for item, stride in zip(items, self.strides, strict=True))
        ):
            raise ValueError(
                "Expected `output_padding` to be None, or an integer from 0 to stride - 1 along "
                f"every axis. Received: output_padding={value!r}, strides={self.strides}"
            )
        return items

    @property
    def unfolding(self) -> Unfolding:
        """How the dense kernel `[*kernel_size, filters, channels]` unfolds; see `core.slicing`."""
        return transposed_unfolding(self._dimensions)

    def _dense_shape(self, channels: int) -> tuple[int, ...]:
        return (*self.kernel_size, self.filters, channels)

    def _factor_shapes(
        self, per_slice: int, hidden: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ones = (1,) * self._dimensions
        return (*ones, per_slice, hidden), (*self.kernel_size, self.filters, hidden)

    def _convolve(self, x: Any, data_format: str, training: Any) -> Any:
        dimensions = self._dimensions
        last = data_format == "channels_last"
        spatial = x.shape[1:-1] if last else x.shape[2:]
        form = self._form(
            channels=x.shape[-1] if last else x.shape[1],
            filters=math.prod(self.kernel_size) * self.filters,
            kernel_size=(1,) * dimensions,
            positions=forms.count_positions([x.shape[0], *spatial]),
            training=training,
        )
        encoder, decoder = self._factors(x.dtype)
        if form == "recomposed":
            kernel = self._recomposed(encoder, decoder)
        else:
            x = forms.convolve_encoder(
                x,
                encoder,
                slices=self.slices,
                form=form,
                strides=(1,) * dimensions,
                padding="valid",
                dilation_rate=(1,) * dimensions,
                data_format=data_format,
            )
            kernel = decoder
        sizes = tensors.known_shape(x, dimensions + 1)
        lengths = sizes[:-1] if last else sizes[1:]
        return tensors.transposed_convolution(
            x,
            kernel,
            [self._output_length(length, axis) for axis, length in enumerate(lengths)],
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=data_format,
        )

    def _output_length(self, length: Any, axis: int) -> Any:
        size = self.dilation_rate[axis] * (self.kernel_size[axis] - 1) + 1
        stride = self.strides[axis]
        if self.output_padding is not None:
            cut = 2 * (size // 2) if self.padding == "same" else 0
            return (length - 1) * stride + size - cut + self.output_padding[axis]
        return length * stride + (max(size - stride, 0) if self.padding == "valid" else 0)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "output_padding": self.output_padding}


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv1DTranspose(BaseFactorizedConvTranspose, keras.layers.Layer):
    """A one-dimensional transposed convolution held as a pointwise encoder and a decoder.

    The layer computes `activation(decoder(encoder(x)) + bias)`. The encoder is a pointwise
    convolution over `slices` groups of channels, `rank` outputs each; the decoder is a transposed
    convolution with the layer's kernel size, strides, padding and dilation. Both work at the
    input's positions, which takes fewer multiply–accumulates per weight than an encoder that
    upsamples. It equals a stock `Conv1DTranspose` whose kernel is `layer.kernel`.

    Weights, in this order: `encoder` `[1, channels / slices, slices * rank]` (slice i owns the
    outputs `i * rank` to `(i + 1) * rank - 1`), `decoder` `[*kernel_size, filters, slices * rank]`,
    `bias` `[filters]`. Together `rank * (channels + slices * filters * window)` parameters and the
    bias, where `window` is the product of `kernel_size`.

    Args:
        filters: int, number of output channels.
        kernel_size: int or tuple of 1 int, the decoder's window.
        slices: int, number of contiguous channel slices, k. Must divide the input's channels.
        rank: int, rank per slice, j; at most `min(channels / slices, filters * window)`.
        strides: int or tuple of 1 int. Default 1. Above 1 it excludes `dilation_rate` above 1.
        padding: `"valid"` or `"same"`. Default `"valid"`.
        output_padding: int or tuple of 1 int, below the strides, or None (default): the output's
            shape is inferred.
        data_format: `"channels_last"` or `"channels_first"`. Default: the Keras configuration's.
        dilation_rate: int or tuple of 1 int. Default 1.
        activation: str, callable or None, applied to the decoder's output.
        use_bias: bool, whether a bias is added after the decoder. Default `True`.
        encoder_initializer: initializer of the encoder. Default `"glorot_uniform"`.
        decoder_initializer: initializer of the decoder. Default `"glorot_uniform"`.
        bias_initializer: initializer of the bias. Default `"zeros"`.
        encoder_regularizer: optional regularizer of the encoder.
        decoder_regularizer: optional regularizer of the decoder.
        bias_regularizer: optional regularizer of the bias.
        activity_regularizer: optional regularizer of the layer's output.
        encoder_constraint: optional constraint of the encoder.
        decoder_constraint: optional constraint of the decoder.
        bias_constraint: optional constraint of the bias.
        encoder_form: str, how the numbers are computed; see `FactorizedDense`. Default `"auto"`.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        `(batch, *spatial, channels)`, or `(batch, channels, *spatial)` for `"channels_first"`.

    Output shape:
        As a stock `Conv1DTranspose`.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the input's
            channels, or if `rank` exceeds the full rank of a slice.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedConv1DTranspose
        >>> layer = FactorizedConv1DTranspose(8, 2, slices=2, rank=2, strides=2)
        >>> layer(np.ones((1, 5, 4), "float32")).shape
        TensorShape([1, 10, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(1, 2, 4), (2, 8, 4), (8,)]
    """

    _dimensions = 1


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv2DTranspose(BaseFactorizedConvTranspose, keras.layers.Layer):
    """A two-dimensional transposed convolution held as a pointwise encoder and a decoder.

    The layer computes `activation(decoder(encoder(x)) + bias)`. The encoder is a pointwise
    convolution over `slices` groups of channels, `rank` outputs each; the decoder is a transposed
    convolution with the layer's kernel size, strides, padding and dilation. Both work at the
    input's positions, which takes fewer multiply–accumulates per weight than an encoder that
    upsamples. It equals a stock `Conv2DTranspose` whose kernel is `layer.kernel`.

    Weights, in this order: `encoder` `[1, 1, channels / slices, slices * rank]` (slice i owns the
    outputs `i * rank` to `(i + 1) * rank - 1`), `decoder` `[*kernel_size, filters, slices * rank]`,
    `bias` `[filters]`. Together `rank * (channels + slices * filters * window)` parameters and the
    bias, where `window` is the product of `kernel_size`.

    Args:
        filters: int, number of output channels.
        kernel_size: int or tuple of 2 int, the decoder's window.
        slices: int, number of contiguous channel slices, k. Must divide the input's channels.
        rank: int, rank per slice, j; at most `min(channels / slices, filters * window)`.
        strides: int or tuple of 2 int. Default 1. Above 1 it excludes `dilation_rate` above 1.
        padding: `"valid"` or `"same"`. Default `"valid"`.
        output_padding: int or tuple of 2 int, below the strides, or None (default): the output's
            shape is inferred.
        data_format: `"channels_last"` or `"channels_first"`. Default: the Keras configuration's.
        dilation_rate: int or tuple of 2 int. Default 1.
        activation: str, callable or None, applied to the decoder's output.
        use_bias: bool, whether a bias is added after the decoder. Default `True`.
        encoder_initializer: initializer of the encoder. Default `"glorot_uniform"`.
        decoder_initializer: initializer of the decoder. Default `"glorot_uniform"`.
        bias_initializer: initializer of the bias. Default `"zeros"`.
        encoder_regularizer: optional regularizer of the encoder.
        decoder_regularizer: optional regularizer of the decoder.
        bias_regularizer: optional regularizer of the bias.
        activity_regularizer: optional regularizer of the layer's output.
        encoder_constraint: optional constraint of the encoder.
        decoder_constraint: optional constraint of the decoder.
        bias_constraint: optional constraint of the bias.
        encoder_form: str, how the numbers are computed; see `FactorizedDense`. Default `"auto"`.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        `(batch, *spatial, channels)`, or `(batch, channels, *spatial)` for `"channels_first"`.

    Output shape:
        As a stock `Conv2DTranspose`.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the input's
            channels, or if `rank` exceeds the full rank of a slice.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedConv2DTranspose
        >>> layer = FactorizedConv2DTranspose(8, 2, slices=2, rank=2, strides=2)
        >>> layer(np.ones((1, 5, 5, 4), "float32")).shape
        TensorShape([1, 10, 10, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(1, 1, 2, 4), (2, 2, 8, 4), (8,)]
    """

    _dimensions = 2


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv3DTranspose(BaseFactorizedConvTranspose, keras.layers.Layer):
    """A three-dimensional transposed convolution held as a pointwise encoder and a decoder.

    The layer computes `activation(decoder(encoder(x)) + bias)`. The encoder is a pointwise
    convolution over `slices` groups of channels, `rank` outputs each; the decoder is a transposed
    convolution with the layer's kernel size, strides, padding and dilation. Both work at the
    input's positions, which takes fewer multiply–accumulates per weight than an encoder that
    upsamples. It equals a stock `Conv3DTranspose` whose kernel is `layer.kernel`.

    Weights, in this order: `encoder` `[1, 1, 1, channels / slices, slices * rank]` (slice i owns
    the outputs `i * rank` to `(i + 1) * rank - 1`), `decoder` `[*kernel_size, filters, slices *
    rank]`, `bias` `[filters]`. Together `rank * (channels + slices * filters * window)` parameters
    and the bias, where `window` is the product of `kernel_size`.

    Args:
        filters: int, number of output channels.
        kernel_size: int or tuple of 3 int, the decoder's window.
        slices: int, number of contiguous channel slices, k. Must divide the input's channels.
        rank: int, rank per slice, j; at most `min(channels / slices, filters * window)`.
        strides: int or tuple of 3 int. Default 1. Above 1 it excludes `dilation_rate` above 1.
        padding: `"valid"` or `"same"`. Default `"valid"`.
        output_padding: int or tuple of 3 int, below the strides, or None (default): the output's
            shape is inferred.
        data_format: `"channels_last"` or `"channels_first"`. Default: the Keras configuration's.
        dilation_rate: int or tuple of 3 int. Default 1.
        activation: str, callable or None, applied to the decoder's output.
        use_bias: bool, whether a bias is added after the decoder. Default `True`.
        encoder_initializer: initializer of the encoder. Default `"glorot_uniform"`.
        decoder_initializer: initializer of the decoder. Default `"glorot_uniform"`.
        bias_initializer: initializer of the bias. Default `"zeros"`.
        encoder_regularizer: optional regularizer of the encoder.
        decoder_regularizer: optional regularizer of the decoder.
        bias_regularizer: optional regularizer of the bias.
        activity_regularizer: optional regularizer of the layer's output.
        encoder_constraint: optional constraint of the encoder.
        decoder_constraint: optional constraint of the decoder.
        bias_constraint: optional constraint of the bias.
        encoder_form: str, how the numbers are computed; see `FactorizedDense`. Default `"auto"`.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        `(batch, *spatial, channels)`, or `(batch, channels, *spatial)` for `"channels_first"`.

    Output shape:
        As a stock `Conv3DTranspose`.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the input's
            channels, or if `rank` exceeds the full rank of a slice.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedConv3DTranspose
        >>> layer = FactorizedConv3DTranspose(8, 2, slices=2, rank=2, strides=2)
        >>> layer(np.ones((1, 5, 5, 5, 4), "float32")).shape
        TensorShape([1, 10, 10, 10, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(1, 1, 1, 2, 4), (2, 2, 2, 8, 4), (8,)]
    """

    _dimensions = 3


class Transposed(BaseConvolution):
    """`Conv1DTranspose`, `Conv2DTranspose` and `Conv3DTranspose`."""

    copied: ClassVar[tuple[str, ...]] = (*BaseConvolution.copied, "output_padding")
    principal = False
    output_axes = (-2,)

    def unfolding(self, layer: Any) -> Unfolding:
        return transposed_unfolding(len(layer.kernel_size))

    def channels(self, layer: Any) -> int:
        return self.shape(layer)[-1]

    def patches(self, layer: Any, inputs: Array) -> Iterator[Array]:
        return patch_chunks(np.reshape(inputs, (-1, inputs.shape[-1])))

    def positions(self, layer: Any, inputs: Shape, outputs: Shape) -> Shape:
        return without_channels(layer, inputs)

    def written_out(self, writer: Writer, layer: Any, axes: int) -> list[Any]:
        encoder = encoder_convolution(writer, layer, axes, **pointwise(layer))
        decoder = getattr(writer.layers, self.name)(
            layer.filters,
            kernel_size=layer.kernel_size,
            strides=layer.strides,
            padding=layer.padding,
            output_padding=layer.output_padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
            **writer.decoder_options(layer),
        )
        return writer.pair(layer, encoder, decoder)


register(
    Transposed("Conv1DTranspose", FactorizedConv1DTranspose),
    Transposed("Conv2DTranspose", FactorizedConv2DTranspose),
    Transposed("Conv3DTranspose", FactorizedConv3DTranspose, in_tf_keras={"_dilates": False}),
)
