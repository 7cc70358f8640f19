"""`FactorizedEinsumDense` for Keras 3."""

from __future__ import annotations

import keras

from keras_alds.kinds.einsum import FactorizedEinsumDenseMixin


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedEinsumDense(FactorizedEinsumDenseMixin, keras.layers.Layer):
    """An einsum dense layer held as a block-diagonal encoder and a dense decoder.

    The kernel's axes that the input has too are read as one axis of inputs, those that the output
    has as one of outputs; the layer computes `activation(decoder(encoder(x)) + bias)` on it. It
    equals a stock `EinsumDense` of the same equation with the kernel `layer.kernel`.

    Weights, in this order: `encoder` `[inputs / slices, slices * rank]` (slice i owns the columns
    `i * rank` to `(i + 1) * rank - 1`), `decoder` `[slices * rank, outputs]`, `bias` in the stock
    layer's shape. Inputs and outputs are in the order of the kernel's axes.

    Args:
        equation: str, `"inputs,kernel->outputs"`, with or without an ellipsis. Every axis of the
            kernel is in exactly one of inputs and outputs.
        output_shape: int or tuple of int and None, the output's shape without the batch and what
            an ellipsis stands for.
        slices: int, number of contiguous slices of the inputs, k. Must divide their number.
        rank: int, rank per slice, j; at most `min(inputs / slices, outputs)`.
        activation: str, callable or None, applied to the decoder's output.
        bias_axes: str or None, the axes of the output that the bias has; None for no bias.
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
        As the equation says.

    Output shape:
        As the equation says.

    Raises:
        ValueError: If an argument is out of its range, if the kernel of `equation` is no matrix
            from inputs to outputs, or if `slices` or `rank` do not fit the input.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedEinsumDense
        >>> layer = FactorizedEinsumDense("abc,cde->abde", (None, 2, 3), 2, rank=2, bias_axes="de")
        >>> layer(keras.ops.ones((1, 5, 4))).shape
        TensorShape([1, 5, 2, 3])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(2, 4), (4, 6), (2, 3)]
    """

    _keras = keras
