"""`FactorizedConv3D` for Keras 3."""

from __future__ import annotations

import keras

from keras_alds.kinds.factorized import FactorizedConvMixin


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv3D(FactorizedConvMixin, keras.layers.Layer):
    """A three-dimensional convolution held as a grouped encoder and a pointwise decoder.

    The layer computes `activation(decoder(encoder(x)) + bias)`. The encoder is a convolution with
    the layer's kernel size, strides, padding and dilation over `slices` groups of channels, `rank`
    outputs each; the decoder is a pointwise convolution over all of them. It equals a
    stock `Conv3D` whose kernel, unfolded slice by slice, has rank `rank`; that kernel is
    `layer.kernel`.

    Weights, in this order: `encoder` `[kd, kh, kw, channels / slices, slices * rank]` (slice i
    owns the outputs `i * rank` to `(i + 1) * rank - 1`), `decoder` `[1, 1, 1, slices * rank,
    filters]`, `bias` `[filters]`. Together `rank * (slices * filters + channels * kd * kh * kw)`
    parameters and the bias. TensorFlow has no grouped 3D convolution on CPUs, so the form
    `"grouped"` is computed as `"split"`.

    Args:
        filters: int, number of output channels.
        kernel_size: int or tuple of 3 int, the encoder's window.
        slices: int, number of contiguous channel slices, k. Must divide the input's channels.
        rank: int, rank per slice, j; at most `min(channels / slices * kh * kw, filters)`.
        strides: int or tuple of 3 int. Default 1. Above 1 it excludes `dilation_rate` above 1.
        padding: `"valid"` or `"same"`. Default `"valid"`.
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
        scheme: int, the fold scheme. 0 (default): the window is the encoder's, as above. 3: the
            encoder is pointwise and the decoder has the window, with its strides, padding and
            dilation. The weights' window axes follow, and `rank` is at most
            `min(channels / slices, filters * window)`.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        `(batch, depth, height, width, channels)`, or channels first for `"channels_first"`.

    Output shape:
        As a stock `Conv3D`: `(batch, new_depth, new_height, new_width, filters)`, or
        channels first.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the input's
            channels, if `rank` exceeds the full rank of a slice, or if the input is smaller than
            the window.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedConv3D
        >>> layer = FactorizedConv3D(8, 3, slices=2, rank=3, padding="same")
        >>> layer(keras.ops.ones((1, 5, 5, 5, 4))).shape
        TensorShape([1, 5, 5, 5, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(3, 3, 3, 2, 6), (1, 1, 1, 6, 8), (8,)]
    """

    _keras = keras
    _dimensions = 3
    _add = staticmethod(keras.ops.add)
