"""Factorized separable convolutions for Keras 3."""

from __future__ import annotations

import keras

from keras_alds.kinds.separable import FactorizedSeparableConvMixin


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedSeparableConv1D(FactorizedSeparableConvMixin, keras.layers.Layer):
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
        encoder_form: `"auto"` (default), `"grouped"`, `"split"`, `"merged"` or `"recomposed"`: how
            the same numbers are computed. `"auto"` chooses by device, phase and sizes; see
            `keras_alds.layers.choose_form`. Weights and results do not depend on it (but for float
            rounding).
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
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedSeparableConv1D
        >>> layer = FactorizedSeparableConv1D(8, 3, slices=2, rank=2, padding="same")
        >>> layer(keras.ops.ones((1, 5, 4))).shape
        TensorShape([1, 5, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(1, 2, 4), (1, 4, 8), (3, 4, 1), (8,)]
    """

    _keras = keras
    _dimensions = 1
    _add = staticmethod(keras.ops.add)


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedSeparableConv2D(FactorizedSeparableConvMixin, keras.layers.Layer):
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
        encoder_form: `"auto"` (default), `"grouped"`, `"split"`, `"merged"` or `"recomposed"`: how
            the same numbers are computed. `"auto"` chooses by device, phase and sizes; see
            `keras_alds.layers.choose_form`. Weights and results do not depend on it (but for float
            rounding).
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
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedSeparableConv2D
        >>> layer = FactorizedSeparableConv2D(8, 3, slices=2, rank=2, padding="same")
        >>> layer(keras.ops.ones((1, 5, 5, 4))).shape
        TensorShape([1, 5, 5, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(1, 1, 2, 4), (1, 1, 4, 8), (3, 3, 4, 1), (8,)]
    """

    _keras = keras
    _dimensions = 2
    _add = staticmethod(keras.ops.add)
