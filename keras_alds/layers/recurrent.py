"""Recurrent layers and cells with factorized kernels for Keras 3."""

from __future__ import annotations

import keras

from keras_alds.kinds.recurrent import (
    FactorizedGRUCellMixin,
    FactorizedKeras3CellMixin,
    FactorizedKeras3RecurrentMixin,
    FactorizedLSTMCellMixin,
    FactorizedSimpleRNNCellMixin,
)
from keras_alds.layers.dense import FactorizedDense


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedGRUCell(FactorizedGRUCellMixin, FactorizedKeras3CellMixin, keras.layers.GRUCell):
    """A stock `GRUCell` in which one kernel or both are factorized.

    `cell.kernel` and `cell.recurrent_kernel` are `FactorizedDense` layers where they are
    factorized, and variables else. Every step multiplies by encoder and decoder; the rest is the
    arithmetic of the stock cell.

    Args:
        *args: The stock cell's arguments.
        kernels: dict or None, slices and rank of every kernel that is factorized, such as
            `{"kernel": {"slices": 1, "rank": 8}}`. Names are `"kernel"` and, for
            `reset_after=True`, `"recurrent_kernel"`.
        **kwargs: The stock cell's keyword arguments.

    Raises:
        ValueError: If `kernels` is no such dict, or does not fit the cell.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedGRUCell
        >>> cell = FactorizedGRUCell(8, kernels={"recurrent_kernel": {"slices": 2, "rank": 2}})
        >>> keras.layers.RNN(cell)(keras.ops.ones((1, 5, 4))).shape
        TensorShape([1, 8])
        >>> tuple(cell.recurrent_kernel.encoder.shape)
        (4, 4)
    """

    _dense_class = FactorizedDense


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedLSTMCell(FactorizedLSTMCellMixin, FactorizedKeras3CellMixin, keras.layers.LSTMCell):
    """A stock `LSTMCell` in which one kernel or both are factorized.

    `cell.kernel` and `cell.recurrent_kernel` are `FactorizedDense` layers where they are
    factorized, and variables else. Every step multiplies by encoder and decoder; the rest is the
    arithmetic of the stock cell.

    Args:
        *args: The stock cell's arguments.
        kernels: dict or None, slices and rank of every kernel that is factorized, such as
            `{"kernel": {"slices": 1, "rank": 8}}`. Names are `"kernel"` and
            `"recurrent_kernel"`.
        **kwargs: The stock cell's keyword arguments.

    Raises:
        ValueError: If `kernels` is no such dict.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedLSTMCell
        >>> cell = FactorizedLSTMCell(8, kernels={"kernel": {"slices": 1, "rank": 2}})
        >>> keras.layers.RNN(cell)(keras.ops.ones((1, 5, 4))).shape
        TensorShape([1, 8])
        >>> tuple(cell.kernel.encoder.shape)
        (4, 2)
    """

    _dense_class = FactorizedDense


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedSimpleRNNCell(
    FactorizedSimpleRNNCellMixin, FactorizedKeras3CellMixin, keras.layers.SimpleRNNCell
):
    """A stock `SimpleRNNCell` in which one kernel or both are factorized.

    `cell.kernel` and `cell.recurrent_kernel` are `FactorizedDense` layers where they are
    factorized, and variables else. Every step multiplies by encoder and decoder; the rest is the
    arithmetic of the stock cell.

    Args:
        *args: The stock cell's arguments.
        kernels: dict or None, slices and rank of every kernel that is factorized, such as
            `{"kernel": {"slices": 1, "rank": 8}}`. Names are `"kernel"` and
            `"recurrent_kernel"`.
        **kwargs: The stock cell's keyword arguments.

    Raises:
        ValueError: If `kernels` is no such dict.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedSimpleRNNCell
        >>> cell = FactorizedSimpleRNNCell(8, kernels={"kernel": {"slices": 1, "rank": 2}})
        >>> keras.layers.RNN(cell)(keras.ops.ones((1, 5, 4))).shape
        TensorShape([1, 8])
    """

    _dense_class = FactorizedDense


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedGRU(FactorizedKeras3RecurrentMixin, keras.layers.GRU):
    """A stock `GRU` in which one kernel or both are factorized; see `FactorizedGRUCell`.

    Everything else, call, masks, states and arguments, is that of the stock layer, but that its
    steps are run in the ordinary loop, never in cuDNN's. `compress` and `ALDSCompress` make stock
    layers to such ones where they factorize a kernel.

    Args:
        *args: The stock layer's arguments.
        kernels: dict or None, slices and rank of every kernel that is factorized, such as
            `{"kernel": {"slices": 1, "rank": 8}}`. Names are `"kernel"` and, for
            `reset_after=True`, `"recurrent_kernel"`.
        **kwargs: The stock layer's keyword arguments.

    Raises:
        ValueError: If `kernels` is no such dict, or does not fit the layer.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedGRU
        >>> layer = FactorizedGRU(8, kernels={"recurrent_kernel": {"slices": 1, "rank": 4}})
        >>> layer(keras.ops.ones((1, 5, 16))).shape
        TensorShape([1, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(16, 24), (2, 24), (8, 4), (4, 24)]
    """

    _cell_class = FactorizedGRUCell
    _loop = keras.layers.RNN.inner_loop


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedLSTM(FactorizedKeras3RecurrentMixin, keras.layers.LSTM):
    """A stock `LSTM` in which one kernel or both are factorized; see `FactorizedLSTMCell`.

    Everything else, call, masks, states and arguments, is that of the stock layer, but that its
    steps are run in the ordinary loop, never in cuDNN's. `compress` and `ALDSCompress` make stock
    layers to such ones where they factorize a kernel.

    Args:
        *args: The stock layer's arguments.
        kernels: dict or None, slices and rank of every kernel that is factorized, such as
            `{"kernel": {"slices": 1, "rank": 8}}`. Names are `"kernel"` and
            `"recurrent_kernel"`.
        **kwargs: The stock layer's keyword arguments.

    Raises:
        ValueError: If `kernels` is no such dict.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedLSTM
        >>> layer = FactorizedLSTM(8, kernels={"kernel": {"slices": 2, "rank": 3}})
        >>> layer(keras.ops.ones((1, 5, 16))).shape
        TensorShape([1, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(8, 32), (32,), (8, 6), (6, 32)]
    """

    _cell_class = FactorizedLSTMCell
    _loop = keras.layers.RNN.inner_loop


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedSimpleRNN(FactorizedKeras3RecurrentMixin, keras.layers.SimpleRNN):
    """A stock `SimpleRNN` in which kernels are factorized; see `FactorizedSimpleRNNCell`.

    Everything else, call, masks, states and arguments, is that of the stock layer. `compress` and
    `ALDSCompress` make stock layers to such ones where they factorize a kernel.

    Args:
        *args: The stock layer's arguments.
        kernels: dict or None, slices and rank of every kernel that is factorized, such as
            `{"kernel": {"slices": 1, "rank": 8}}`. Names are `"kernel"` and
            `"recurrent_kernel"`.
        **kwargs: The stock layer's keyword arguments.

    Raises:
        ValueError: If `kernels` is no such dict.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedSimpleRNN
        >>> layer = FactorizedSimpleRNN(8, kernels={"kernel": {"slices": 1, "rank": 3}})
        >>> layer(keras.ops.ones((1, 5, 16))).shape
        TensorShape([1, 8])
    """

    _cell_class = FactorizedSimpleRNNCell
    _loop = keras.layers.RNN.inner_loop
