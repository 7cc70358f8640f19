"""Separable convolutions: the depthwise part stays, the pointwise one is factorized."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import keras

from keras_alds import _backend
from keras_alds._backend import tensors
from keras_alds._backend.layers import dtype_policy
from keras_alds.core.checks import positive_int
from keras_alds.core.slicing import Array, Unfolding, convolution_unfolding
from keras_alds.kinds import forms
from keras_alds.kinds.base import Shape, Writer, register, size_of
from keras_alds.kinds.convolution import (
    BaseConvolution,
    BaseFactorizedConv,
    encoder_convolution,
    pointwise,
)
from keras_alds.kinds.factorized import PARTS


class BaseFactorizedSeparableConv(BaseFactorizedConv):
    """A depthwise convolution over `_dimensions` spatial axes, then a factorized pointwise one."""

    _folds = False
    _parts = (*PARTS, "depthwise")

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        slices: int,
        rank: int,
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = 1,
        depth_multiplier: int = 1,
        depthwise_initializer: Any = "glorot_uniform",
        depthwise_regularizer: Any = None,
        depthwise_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filters,
            kernel_size,
            slices,
            rank,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            **kwargs,
        )
        if len(set(self.strides)) > 1:
            raise ValueError(
                "Expected equal `strides` along all axes of a separable convolution. "
                f"Received: strides={self.strides}"
            )
        self.depth_multiplier = positive_int(depth_multiplier, "depth_multiplier")
        self._set_parts(
            {
                "depthwise_initializer": depthwise_initializer,
                "depthwise_regularizer": depthwise_regularizer,
                "depthwise_constraint": depthwise_constraint,
            }
        )

    def _dense_shape(self, channels: int) -> tuple[int, ...]:
        return (*(1,) * self._dimensions, channels * self.depth_multiplier, self.filters)

    def _factor_shapes(
        self, per_slice: int, hidden: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ones = (1,) * self._dimensions
        return (*ones, per_slice, hidden), (*ones, hidden, self.filters)

    def _add_weights(self, channels: int) -> None:
        self._add_factors(self._dense_shape(channels))
        self._add_part("depthwise", (*self.kernel_size, channels, self.depth_multiplier))
        self._add_bias(self.filters)

    @property
    def depthwise_kernel(self) -> Any:
        """The depthwise kernel, `[*kernel_size, channels, depth_multiplier]`."""
        return self.depthwise

    @property
    def pointwise_kernel(self) -> Any:
        """The dense pointwise kernel that the factors represent: `kernel` under its stock name."""
        return self.kernel

    def _convolve(self, x: Any, data_format: str, training: Any) -> Any:
        x = tensors.depthwise_convolution(
            x,
            tensors.cast(tensors.tensor(self.depthwise), x.dtype),
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=data_format,
        )
        last = data_format == "channels_last"
        ones = (1,) * self._dimensions
        form = self._form(
            channels=x.shape[-1] if last else x.shape[1],
            filters=self.filters,
            kernel_size=ones,
            positions=forms.count_positions(
                [x.shape[0], *(x.shape[1:-1] if last else x.shape[2:])]
            ),
            training=training,
        )
        encoder, decoder = self._factors(x.dtype)
        return forms.factorized_convolution(
            x,
            encoder,
            decoder,
            slices=self.slices,
            form=form,
            strides=ones,
            padding="valid",
            dilation_rate=ones,
            data_format=data_format,
        )

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "depth_multiplier": self.depth_multiplier}


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedSeparableConv1D(BaseFactorizedSeparableConv, keras.layers.Layer):
    """A one-dimensional separable convolution whose pointwise kernel is held as two factors.

    The layer computes `activation(decoder(encoder(depthwise(x))) + bias)`: the depthwise
    convolution of the stock layer, then a pointwise encoder over `slices` groups of its channels
    and a pointwise decoder. It equals a stock `SeparableConv1D` with the pointwise kernel
    `layer.pointwise_kernel`.

    Weights, in this order: `encoder` `[..., n / slices, slices * rank]` for n = channels ·
    depth_multiplier (slice i owns the outputs `i * rank` to `(i + 1) * rank - 1`), `decoder`
    `[..., slices * rank, filters]`, both with a window of 1, `depthwise` `[*kernel_size, channels,
    depth_multiplier]`, `bias` `[filters]`.

    Args:
        filters: int, number of output channels.
        kernel_size: int or tuple of 1 int, the depthwise window.
        slices: int, number of contiguous slices of the depthwise outputs, k. Must divide their
            number, channels · `depth_multiplier`.
        rank: int, rank per slice, j; at most `min(n / slices, filters)`.
        strides: int or tuple of 1 int, equal along all axes. Default 1. Above 1 it excludes
            `dilation_rate` above 1.
        padding: `"valid"`, `"same"` or, in tf_keras, `"causal"`. Default `"valid"`.
        data_format: `"channels_last"` or `"channels_first"`. Default: the Keras configuration's.
        dilation_rate: int or tuple of 1 int. Default 1.
        depth_multiplier: int, depthwise outputs of every channel. Default 1.
        depthwise_initializer: initializer of the depthwise kernel. Default `"glorot_uniform"`.
        depthwise_regularizer: optional regularizer of the depthwise kernel.
        depthwise_constraint: optional constraint of the depthwise kernel.
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
        As a stock `SeparableConv1D`.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the depthwise
            outputs, if `rank` exceeds the full rank of a slice, or if the input is smaller than
            the window.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedSeparableConv1D
        >>> layer = FactorizedSeparableConv1D(8, 3, slices=2, rank=2, padding="same")
        >>> layer(np.ones((1, 5, 4), "float32")).shape
        TensorShape([1, 5, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(1, 2, 4), (1, 4, 8), (3, 4, 1), (8,)]
    """

    _dimensions = 1


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedSeparableConv2D(BaseFactorizedSeparableConv, keras.layers.Layer):
    """A two-dimensional separable convolution whose pointwise kernel is held as two factors.

    The layer computes `activation(decoder(encoder(depthwise(x))) + bias)`: the depthwise
    convolution of the stock layer, then a pointwise encoder over `slices` groups of its channels
    and a pointwise decoder. It equals a stock `SeparableConv2D` with the pointwise kernel
    `layer.pointwise_kernel`.

    Weights, in this order: `encoder` `[..., n / slices, slices * rank]` for n = channels ·
    depth_multiplier (slice i owns the outputs `i * rank` to `(i + 1) * rank - 1`), `decoder`
    `[..., slices * rank, filters]`, both with a window of 1, `depthwise` `[*kernel_size, channels,
    depth_multiplier]`, `bias` `[filters]`.

    Args:
        filters: int, number of output channels.
        kernel_size: int or tuple of 2 int, the depthwise window.
        slices: int, number of contiguous slices of the depthwise outputs, k. Must divide their
            number, channels · `depth_multiplier`.
        rank: int, rank per slice, j; at most `min(n / slices, filters)`.
        strides: int or tuple of 2 int, equal along all axes. Default 1. Above 1 it excludes
            `dilation_rate` above 1.
        padding: `"valid"` or `"same"`. Default `"valid"`.
        data_format: `"channels_last"` or `"channels_first"`. Default: the Keras configuration's.
        dilation_rate: int or tuple of 2 int. Default 1.
        depth_multiplier: int, depthwise outputs of every channel. Default 1.
        depthwise_initializer: initializer of the depthwise kernel. Default `"glorot_uniform"`.
        depthwise_regularizer: optional regularizer of the depthwise kernel.
        depthwise_constraint: optional constraint of the depthwise kernel.
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
        As a stock `SeparableConv2D`.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the depthwise
            outputs, if `rank` exceeds the full rank of a slice, or if the input is smaller than
            the window.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedSeparableConv2D
        >>> layer = FactorizedSeparableConv2D(8, 3, slices=2, rank=2, padding="same")
        >>> layer(np.ones((1, 5, 5, 4), "float32")).shape
        TensorShape([1, 5, 5, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(1, 1, 2, 4), (1, 1, 4, 8), (3, 3, 4, 1), (8,)]
    """

    _dimensions = 2


class Separable(BaseConvolution):
    """`SeparableConv1D` and `SeparableConv2D`."""

    kernel: ClassVar[str] = "pointwise_kernel"
    part: ClassVar[str] = "pointwise"
    kept: ClassVar[dict[str, str]] = {"depthwise_kernel": "depthwise", "bias": "bias"}
    kept_back: ClassVar[dict[str | None, str]] = {
        "depthwise": "depthwise_kernel",
        None: "pointwise_kernel",
        "bias": "bias",
    }
    copied: ClassVar[tuple[str, ...]] = (
        *BaseConvolution.copied,
        "depth_multiplier",
        "depthwise_initializer",
        "depthwise_regularizer",
        "depthwise_constraint",
    )
    output_axes = (-1,)

    def unfolding(self, layer: Any) -> Unfolding:
        return convolution_unfolding(len(layer.kernel_size))

    def channels(self, layer: Any) -> int:
        return int(layer.depthwise_kernel.shape[-2])

    def patches(self, layer: Any, inputs: Array) -> Iterator[Array]:
        # The pointwise kernel's inputs are the depthwise outputs.
        kernel = _backend.backend_of(layer).value(layer.depthwise_kernel)
        *_, channels, multiplier = kernel.shape
        taps = kernel.reshape(-1, channels, multiplier).transpose(1, 0, 2).astype(inputs.dtype)
        for chunk in super().patches(layer, inputs):  # [rows, window, channels]
            outputs = chunk.transpose(2, 0, 1) @ taps
            yield outputs.transpose(1, 0, 2).reshape(len(chunk), 1, channels * multiplier)

    def before_kernel(self, layer: Any, inputs: Shape, outputs: Shape) -> int:
        # The output of the depthwise convolution.
        return size_of(layer, self.positions(layer, inputs, outputs)) * self.shape(layer)[-2]

    def weights_per_position(self, layer: Any) -> int:
        return super().weights_per_position(layer) + math.prod(layer.depthwise_kernel.shape)

    def factor_weights_per_position(self, layer: Any) -> tuple[int, int]:
        encoder, decoder = super().factor_weights_per_position(layer)
        return encoder, decoder + math.prod(layer.depthwise.shape)

    def written_out(self, writer: Writer, layer: Any, axes: int) -> list[Any]:
        dimensions = len(layer.kernel_size)
        decoder = getattr(writer.layers, f"Conv{dimensions}D")(
            layer.filters, **pointwise(layer), **writer.decoder_options(layer)
        )
        depthwise = getattr(writer.layers, f"DepthwiseConv{dimensions}D")(
            kernel_size=layer.kernel_size,
            strides=layer.strides,
            padding=layer.padding,
            depth_multiplier=layer.depth_multiplier,
            data_format=layer.data_format,
            dilation_rate=layer.dilation_rate,
            use_bias=False,
            depthwise_initializer=writer.copied(layer.depthwise_initializer),
            depthwise_regularizer=layer.depthwise_regularizer,
            depthwise_constraint=layer.depthwise_constraint,
            trainable=layer.trainable,
            dtype=dtype_policy(layer),
            name=writer.unique(f"{layer.name}_depthwise"),
        )
        writer.record(layer, depthwise, [writer.value(layer.depthwise)], [layer.depthwise])
        encoder = encoder_convolution(writer, layer, axes, **pointwise(layer))
        return [depthwise, *writer.pair(layer, encoder, decoder)]


register(
    Separable(
        "SeparableConv1D",
        FactorizedSeparableConv1D,
        in_tf_keras={"_paddings": ("valid", "same", "causal")},
    ),
    Separable("SeparableConv2D", FactorizedSeparableConv2D),
)
