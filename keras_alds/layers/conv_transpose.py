"""Factorized transposed convolutions for Keras 3."""

from __future__ import annotations

import keras

from keras_alds.kinds.transposed import FactorizedConvTransposeMixin


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv1DTranspose(FactorizedConvTransposeMixin, keras.layers.Layer):
    """A one-dimensional transposed convolution held as a pointwise encoder and a decoder.

    The layer computes `activation(decoder(encoder(x)) + bias)`. The encoder is a pointwise
    convolution over `slices` groups of channels, `rank` outputs each; the decoder is a transposed
    convolution with the layer's kernel size, strides, padding and dilation. So both work at the
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
        encoder_form: `"auto"` (default), `"grouped"`, `"split"`, `"merged"` or `"recomposed"`: how
            the same numbers are computed. `"auto"` chooses by device, phase and sizes; see
            `keras_alds.layers.choose_form`. Weights and results do not depend on it (but for float
            rounding).
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        `(batch, *spatial, channels)`, or `(batch, channels, *spatial)` for `"channels_first"`.

    Output shape:
        As a stock `Conv1DTranspose`.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the input's
            channels, or if `rank` exceeds the full rank of a slice.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedConv1DTranspose
        >>> layer = FactorizedConv1DTranspose(8, 2, slices=2, rank=2, strides=2)
        >>> layer(keras.ops.ones((1, 5, 4))).shape
        TensorShape([1, 10, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(1, 2, 4), (2, 8, 4), (8,)]
    """

    _keras = keras
    _dimensions = 1
    _add = staticmethod(keras.ops.add)


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv2DTranspose(FactorizedConvTransposeMixin, keras.layers.Layer):
    """A two-dimensional transposed convolution held as a pointwise encoder and a decoder.

    The layer computes `activation(decoder(encoder(x)) + bias)`. The encoder is a pointwise
    convolution over `slices` groups of channels, `rank` outputs each; the decoder is a transposed
    convolution with the layer's kernel size, strides, padding and dilation. So both work at the
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
        encoder_form: `"auto"` (default), `"grouped"`, `"split"`, `"merged"` or `"recomposed"`: how
            the same numbers are computed. `"auto"` chooses by device, phase and sizes; see
            `keras_alds.layers.choose_form`. Weights and results do not depend on it (but for float
            rounding).
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        `(batch, *spatial, channels)`, or `(batch, channels, *spatial)` for `"channels_first"`.

    Output shape:
        As a stock `Conv2DTranspose`.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the input's
            channels, or if `rank` exceeds the full rank of a slice.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedConv2DTranspose
        >>> layer = FactorizedConv2DTranspose(8, 2, slices=2, rank=2, strides=2)
        >>> layer(keras.ops.ones((1, 5, 5, 4))).shape
        TensorShape([1, 10, 10, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(1, 1, 2, 4), (2, 2, 8, 4), (8,)]
    """

    _keras = keras
    _dimensions = 2
    _add = staticmethod(keras.ops.add)


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv3DTranspose(FactorizedConvTransposeMixin, keras.layers.Layer):
    """A three-dimensional transposed convolution held as a pointwise encoder and a decoder.

    The layer computes `activation(decoder(encoder(x)) + bias)`. The encoder is a pointwise
    convolution over `slices` groups of channels, `rank` outputs each; the decoder is a transposed
    convolution with the layer's kernel size, strides, padding and dilation. So both work at the
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
        encoder_form: `"auto"` (default), `"grouped"`, `"split"`, `"merged"` or `"recomposed"`: how
            the same numbers are computed. `"auto"` chooses by device, phase and sizes; see
            `keras_alds.layers.choose_form`. Weights and results do not depend on it (but for float
            rounding).
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        `(batch, *spatial, channels)`, or `(batch, channels, *spatial)` for `"channels_first"`.

    Output shape:
        As a stock `Conv3DTranspose`.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the input's
            channels, or if `rank` exceeds the full rank of a slice.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedConv3DTranspose
        >>> layer = FactorizedConv3DTranspose(8, 2, slices=2, rank=2, strides=2)
        >>> layer(keras.ops.ones((1, 5, 5, 5, 4))).shape
        TensorShape([1, 10, 10, 10, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(1, 1, 1, 2, 4), (2, 2, 2, 8, 4), (8,)]
    """

    _keras = keras
    _dimensions = 3
    _add = staticmethod(keras.ops.add)
