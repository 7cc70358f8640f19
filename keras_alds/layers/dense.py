"""`FactorizedDense` for Keras 3."""

from __future__ import annotations

import keras

from keras_alds.kinds.factorized import FactorizedDenseMixin


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedDense(FactorizedDenseMixin, keras.layers.Layer):
    """A dense layer held as a block-diagonal encoder and a dense decoder.

    The layer computes `activation(decoder(encoder(x)) + bias)` along the last axis. The encoder
    maps each of `slices` contiguous groups of inputs to `rank` values, the decoder maps all of them
    to `units`. It equals a stock `Dense` whose kernel has rank `rank` within every slice of its
    rows; that kernel is `layer.kernel`.

    Weights, in this order: `encoder` `[channels / slices, slices * rank]` (slice i owns the columns
    `i * rank` to `(i + 1) * rank - 1`), `decoder` `[slices * rank, units]`, `bias` `[units]`.
    Together `rank * (slices * units + channels)` parameters and the bias.

    Args:
        units: int, size of the output's last axis.
        slices: int, number of contiguous channel slices, k. Must divide the input's channels.
        rank: int, rank per slice, j; at most `min(channels / slices, units)`.
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
        `(batch, ..., channels)`, at least two axes; dense tensors.

    Output shape:
        `(batch, ..., units)`.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the input's
            channels, if `rank` exceeds the full rank of a slice, or if the last axis is unknown.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedDense
        >>> layer = FactorizedDense(6, slices=2, rank=3)
        >>> layer(keras.ops.ones((2, 8))).shape
        TensorShape([2, 6])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(4, 6), (6, 6), (6,)]
    """

    _keras = keras
