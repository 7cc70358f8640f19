"""`FactorizedEmbedding` for Keras 3."""

from __future__ import annotations

import keras

from keras_alds.kinds.embedding import FactorizedEmbeddingMixin


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedEmbedding(FactorizedEmbeddingMixin, keras.layers.Layer):
    """An embedding held as a narrow table and a matrix that widens its rows.

    The layer looks `rank` numbers up for every input and multiplies them by the decoder. It equals
    a stock `Embedding` with the table `layer.embeddings`. There is one slice always: the words of a
    vocabulary are in no order that slices could follow.

    Weights, in this order: `encoder` `[input_dim, rank]`, `decoder` `[rank, output_dim]`.

    Args:
        input_dim: int, size of the vocabulary.
        output_dim: int, length of an embedding.
        rank: int, j; at most `min(input_dim, output_dim)`.
        mask_zero: bool, whether input 0 is padding that is masked. Default `False`.
        encoder_initializer: initializer of the encoder. Default `"uniform"`.
        decoder_initializer: initializer of the decoder. Default `"glorot_uniform"`.
        encoder_regularizer: optional regularizer of the encoder.
        decoder_regularizer: optional regularizer of the decoder.
        activity_regularizer: optional regularizer of the layer's output.
        encoder_constraint: optional constraint of the encoder.
        decoder_constraint: optional constraint of the decoder.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        Integers of any shape; dense tensors.

    Output shape:
        `(*input_shape, output_dim)`.

    Raises:
        ValueError: If an argument is out of its range, or `rank` exceeds the full rank.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2, for one slice.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedEmbedding
        >>> layer = FactorizedEmbedding(100, 16, rank=4)
        >>> layer(np.array([[1, 2, 3]])).shape
        TensorShape([1, 3, 16])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(100, 4), (4, 16)]
    """

    _keras = keras
    _not_equal = staticmethod(keras.ops.not_equal)
