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

from keras_alds.layers._mixin import FactorizedConvMixin, FactorizedDenseMixin

__all__ = ["FactorizedConv1D", "FactorizedConv2D", "FactorizedDense"]


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


# Wrappers such as TimeDistributed load the layer inside them by its bare class name.
tf_keras.saving.get_custom_objects().update(
    {cls.__name__: cls for cls in (FactorizedConv1D, FactorizedConv2D, FactorizedDense)}
)
