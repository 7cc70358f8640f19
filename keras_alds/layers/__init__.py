"""Factorized layers for Keras 3; `keras_alds.tf_keras` has the same layers for tf_keras."""

from keras_alds.kinds.forms import choose_form
from keras_alds.layers.attention import (
    FactorizedGroupQueryAttention,
    FactorizedMultiHeadAttention,
)
from keras_alds.layers.conv1d import FactorizedConv1D
from keras_alds.layers.conv2d import FactorizedConv2D
from keras_alds.layers.conv3d import FactorizedConv3D
from keras_alds.layers.conv_transpose import (
    FactorizedConv1DTranspose,
    FactorizedConv2DTranspose,
    FactorizedConv3DTranspose,
)
from keras_alds.layers.dense import FactorizedDense
from keras_alds.layers.einsum_dense import FactorizedEinsumDense
from keras_alds.layers.embedding import FactorizedEmbedding
from keras_alds.layers.recurrent import (
    FactorizedGRU,
    FactorizedGRUCell,
    FactorizedLSTM,
    FactorizedLSTMCell,
    FactorizedSimpleRNN,
    FactorizedSimpleRNNCell,
)
from keras_alds.layers.separable_conv import (
    FactorizedSeparableConv1D,
    FactorizedSeparableConv2D,
)

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
    "FactorizedGroupQueryAttention",
    "FactorizedLSTM",
    "FactorizedLSTMCell",
    "FactorizedMultiHeadAttention",
    "FactorizedSeparableConv1D",
    "FactorizedSeparableConv2D",
    "FactorizedSimpleRNN",
    "FactorizedSimpleRNNCell",
    "choose_form",
]
