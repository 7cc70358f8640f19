"""The factorized layers for tf_keras (Keras 2), registered for loading without `custom_objects`.

`import keras_alds` imports this module where tf_keras is installed, so that saved tf_keras models
with factorized layers load.

Example:
    >>> import keras_alds.tf_keras
    >>> keras_alds.tf_keras.FactorizedDense(4, slices=1, rank=2).units
    4
"""

from __future__ import annotations

import tensorflow as tf
import tf_keras

from keras_alds.kinds.attention import FactorizedTfKerasAttentionMixin
from keras_alds.kinds.einsum import FactorizedEinsumDenseMixin
from keras_alds.kinds.embedding import FactorizedEmbeddingMixin
from keras_alds.kinds.factorized import FactorizedConvMixin, FactorizedDenseMixin
from keras_alds.kinds.recurrent import (
    FactorizedGRUCellMixin,
    FactorizedLSTMCellMixin,
    FactorizedSimpleRNNCellMixin,
    FactorizedTfKerasCellMixin,
    FactorizedTfKerasRecurrentMixin,
)
from keras_alds.kinds.separable import FactorizedSeparableConvMixin
from keras_alds.kinds.transposed import FactorizedConvTransposeMixin

__all__ = [
    "FactorizedConv1D",
    "FactorizedConv1DTranspose",
    "FactorizedConv2D",
    "FactorizedConv2DTranspose",
    "FactorizedConv3D",
    "FactorizedConv3DTranspose",
    "FactorizedDense",
    "FactorizedEinsumDense",
    "FactorizedEmbedding",
    "FactorizedGRU",
    "FactorizedGRUCell",
    "FactorizedLSTM",
    "FactorizedLSTMCell",
    "FactorizedMultiHeadAttention",
    "FactorizedSeparableConv1D",
    "FactorizedSeparableConv2D",
    "FactorizedSimpleRNN",
    "FactorizedSimpleRNNCell",
]


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv1D(FactorizedConvMixin, tf_keras.layers.Layer):
    """`keras_alds.layers.FactorizedConv1D` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedConv1D
        >>> FactorizedConv1D(8, 3, slices=2, rank=3)(tf.ones((1, 5, 4))).shape
        TensorShape([1, 3, 8])
    """

    _keras = tf_keras
    _shape_type = tf.TensorShape
    _dimensions = 1
    _paddings = ("valid", "same", "causal")


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv2D(FactorizedConvMixin, tf_keras.layers.Layer):
    """`keras_alds.layers.FactorizedConv2D` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedConv2D
        >>> FactorizedConv2D(8, 3, slices=2, rank=3)(tf.ones((1, 5, 5, 4))).shape
        TensorShape([1, 3, 3, 8])
    """

    _keras = tf_keras
    _shape_type = tf.TensorShape
    _dimensions = 2


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedDense(FactorizedDenseMixin, tf_keras.layers.Layer):
    """`keras_alds.layers.FactorizedDense` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedDense
        >>> FactorizedDense(6, slices=2, rank=3)(tf.ones((2, 8))).shape
        TensorShape([2, 6])
    """

    _keras = tf_keras
    _shape_type = tf.TensorShape


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv3D(FactorizedConvMixin, tf_keras.layers.Layer):
    """`keras_alds.layers.FactorizedConv3D` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedConv3D
        >>> FactorizedConv3D(8, 3, slices=2, rank=3)(tf.ones((1, 5, 5, 5, 4))).shape
        TensorShape([1, 3, 3, 3, 8])
    """

    _keras = tf_keras
    _shape_type = tf.TensorShape
    _dimensions = 3


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv1DTranspose(FactorizedConvTransposeMixin, tf_keras.layers.Layer):
    """`keras_alds.layers.FactorizedConv1DTranspose` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedConv1DTranspose
        >>> FactorizedConv1DTranspose(8, 3, slices=2, rank=2)(tf.ones((1, 5, 4))).shape
        TensorShape([1, 7, 8])
    """

    _keras = tf_keras
    _shape_type = tf.TensorShape
    _dimensions = 1


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv2DTranspose(FactorizedConvTransposeMixin, tf_keras.layers.Layer):
    """`keras_alds.layers.FactorizedConv2DTranspose` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedConv2DTranspose
        >>> FactorizedConv2DTranspose(8, 3, slices=2, rank=2)(tf.ones((1, 5, 5, 4))).shape
        TensorShape([1, 7, 7, 8])
    """

    _keras = tf_keras
    _shape_type = tf.TensorShape
    _dimensions = 2


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv3DTranspose(FactorizedConvTransposeMixin, tf_keras.layers.Layer):
    """`keras_alds.layers.FactorizedConv3DTranspose` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedConv3DTranspose
        >>> FactorizedConv3DTranspose(8, 3, slices=2, rank=2)(tf.ones((1, 5, 5, 5, 4))).shape
        TensorShape([1, 7, 7, 7, 8])
    """

    _keras = tf_keras
    _shape_type = tf.TensorShape
    _dimensions = 3
    _dilates = False


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedSeparableConv1D(FactorizedSeparableConvMixin, tf_keras.layers.Layer):
    """`keras_alds.layers.FactorizedSeparableConv1D` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedSeparableConv1D
        >>> FactorizedSeparableConv1D(8, 3, slices=2, rank=2)(tf.ones((1, 5, 4))).shape
        TensorShape([1, 3, 8])
    """

    _keras = tf_keras
    _shape_type = tf.TensorShape
    _dimensions = 1
    _paddings = ("valid", "same", "causal")


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedSeparableConv2D(FactorizedSeparableConvMixin, tf_keras.layers.Layer):
    """`keras_alds.layers.FactorizedSeparableConv2D` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedSeparableConv2D
        >>> FactorizedSeparableConv2D(8, 3, slices=2, rank=2)(tf.ones((1, 5, 5, 4))).shape
        TensorShape([1, 3, 3, 8])
    """

    _keras = tf_keras
    _shape_type = tf.TensorShape
    _dimensions = 2


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedEinsumDense(FactorizedEinsumDenseMixin, tf_keras.layers.Layer):
    """`keras_alds.layers.FactorizedEinsumDense` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedEinsumDense
        >>> FactorizedEinsumDense("ab,bc->ac", 6, slices=2, rank=3)(tf.ones((2, 8))).shape
        TensorShape([2, 6])
    """

    _keras = tf_keras
    _shape_type = tf.TensorShape


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedEmbedding(FactorizedEmbeddingMixin, tf_keras.layers.Layer):
    """`keras_alds.layers.FactorizedEmbedding` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedEmbedding
        >>> FactorizedEmbedding(100, 16, rank=4)(tf.constant([[1, 2, 3]])).shape
        TensorShape([1, 3, 16])
    """

    _keras = tf_keras
    _shape_type = tf.TensorShape


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedMultiHeadAttention(
    FactorizedTfKerasAttentionMixin, tf_keras.layers.MultiHeadAttention
):
    """`keras_alds.layers.FactorizedMultiHeadAttention` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedMultiHeadAttention
        >>> choice = {"slices": 1, "rank": 4}
        >>> layer = FactorizedMultiHeadAttention(2, 8, projections={"query": choice})
        >>> layer(tf.ones((1, 5, 16)), tf.ones((1, 5, 16))).shape
        TensorShape([1, 5, 16])
    """

    _einsum_class = FactorizedEinsumDense


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedGRUCell(
    FactorizedGRUCellMixin, FactorizedTfKerasCellMixin, tf_keras.layers.GRUCell
):
    """`keras_alds.layers.FactorizedGRUCell` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> import tf_keras
        >>> from keras_alds.tf_keras import FactorizedGRUCell
        >>> cell = FactorizedGRUCell(8, kernels={"recurrent_kernel": {"slices": 1, "rank": 2}})
        >>> tf_keras.layers.RNN(cell)(tf.ones((1, 5, 4))).shape
        TensorShape([1, 8])
    """

    _dense_class = FactorizedDense


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedGRU(FactorizedTfKerasRecurrentMixin, tf_keras.layers.GRU):
    """`keras_alds.layers.FactorizedGRU` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedGRU
        >>> layer = FactorizedGRU(8, kernels={"recurrent_kernel": {"slices": 1, "rank": 4}})
        >>> layer(tf.ones((1, 5, 16))).shape
        TensorShape([1, 8])
    """

    _cell_class = FactorizedGRUCell


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedLSTMCell(
    FactorizedLSTMCellMixin, FactorizedTfKerasCellMixin, tf_keras.layers.LSTMCell
):
    """`keras_alds.layers.FactorizedLSTMCell` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> import tf_keras
        >>> from keras_alds.tf_keras import FactorizedLSTMCell
        >>> cell = FactorizedLSTMCell(8, kernels={"kernel": {"slices": 1, "rank": 2}})
        >>> tf_keras.layers.RNN(cell)(tf.ones((1, 5, 4))).shape
        TensorShape([1, 8])
    """

    _dense_class = FactorizedDense


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedLSTM(FactorizedTfKerasRecurrentMixin, tf_keras.layers.LSTM):
    """`keras_alds.layers.FactorizedLSTM` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedLSTM
        >>> layer = FactorizedLSTM(8, kernels={"kernel": {"slices": 1, "rank": 4}})
        >>> layer(tf.ones((1, 5, 16))).shape
        TensorShape([1, 8])
    """

    _cell_class = FactorizedLSTMCell


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedSimpleRNNCell(
    FactorizedSimpleRNNCellMixin, FactorizedTfKerasCellMixin, tf_keras.layers.SimpleRNNCell
):
    """`keras_alds.layers.FactorizedSimpleRNNCell` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> import tf_keras
        >>> from keras_alds.tf_keras import FactorizedSimpleRNNCell
        >>> cell = FactorizedSimpleRNNCell(8, kernels={"kernel": {"slices": 1, "rank": 2}})
        >>> tf_keras.layers.RNN(cell)(tf.ones((1, 5, 4))).shape
        TensorShape([1, 8])
    """

    _dense_class = FactorizedDense


@tf_keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedSimpleRNN(FactorizedTfKerasRecurrentMixin, tf_keras.layers.SimpleRNN):
    """`keras_alds.layers.FactorizedSimpleRNN` for tf_keras models.

    Arguments, weights, shapes, errors and source are those of the Keras 3 class of this name.

    Example:
        >>> import tensorflow as tf
        >>> from keras_alds.tf_keras import FactorizedSimpleRNN
        >>> layer = FactorizedSimpleRNN(8, kernels={"kernel": {"slices": 1, "rank": 4}})
        >>> layer(tf.ones((1, 5, 16))).shape
        TensorShape([1, 8])
    """

    _cell_class = FactorizedSimpleRNNCell


# Wrappers such as TimeDistributed load the layer inside them by its bare class name.
tf_keras.saving.get_custom_objects().update({name: globals()[name] for name in __all__})
