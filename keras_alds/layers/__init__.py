"""Factorized layers for Keras 3; `keras_alds.tf_keras` has the same layers for tf_keras."""

from keras_alds.layers._forms import choose_form
from keras_alds.layers.conv1d import FactorizedConv1D
from keras_alds.layers.conv2d import FactorizedConv2D
from keras_alds.layers.dense import FactorizedDense

__all__ = ["FactorizedConv1D", "FactorizedConv2D", "FactorizedDense", "choose_form"]
