"""Factorized layers for Keras 3; `keras_alds.tf_keras` has the same layers for tf_keras."""

from keras_alds.kinds.attention import (
    FactorizedGroupQueryAttention,
    FactorizedMultiHeadAttention,
)
from keras_alds.kinds.chains import CPConv2D, TuckerConv2D
from keras_alds.kinds.convolution import FactorizedConv1D, FactorizedConv2D, FactorizedConv3D
from keras_alds.kinds.dense import FactorizedDense
from keras_alds.kinds.einsum import FactorizedEinsumDense
from keras_alds.kinds.embedding import FactorizedEmbedding
from keras_alds.kinds.forms import choose_form
from keras_alds.kinds.recurrent import (
    FactorizedGRU,
    FactorizedGRUCell,
    FactorizedLSTM,
    FactorizedLSTMCell,
    FactorizedSimpleRNN,
    FactorizedSimpleRNNCell,
)
from keras_alds.kinds.separable import FactorizedSeparableConv1D, FactorizedSeparableConv2D
from keras_alds.kinds.transposed import (
    FactorizedConv1DTranspose,
    FactorizedConv2DTranspose,
    FactorizedConv3DTranspose,
)

__all__ = [
    "CPConv2D",
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
    "TuckerConv2D",
    "choose_form",
]
