"""Attention layers with factorized projections for Keras 3."""

from __future__ import annotations

import keras

from keras_alds.kinds.attention import FactorizedKeras3AttentionMixin
from keras_alds.layers.einsum_dense import FactorizedEinsumDense


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedGroupQueryAttention(
    FactorizedKeras3AttentionMixin, keras.layers.GroupQueryAttention
):
    """A stock `GroupQueryAttention` in which some projections are `FactorizedEinsumDense` layers.

    Everything else, call, masks and arguments, is that of the stock layer. `compress` and
    `ALDSCompress` make stock layers to such ones where they factorize a projection.

    Args:
        *args: The stock layer's arguments.
        projections: dict or None, slices and rank of every projection that is factorized, such as
            `{"query": {"slices": 1, "rank": 8}}`. Names are `"query"`, `"key"`, `"value"`,
            `"output"` and, where there is one, `"gate"`.
        **kwargs: The stock layer's keyword arguments.

    Raises:
        ValueError: If `projections` is no such dict, or names one that the layer has not.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedGroupQueryAttention
        >>> choice = {"slices": 1, "rank": 4}
        >>> layer = FactorizedGroupQueryAttention(8, 2, 1, projections={"query": choice})
        >>> x = keras.ops.ones((1, 5, 16))
        >>> layer(x, x).shape
        TensorShape([1, 5, 16])
        >>> type(layer._query_dense).__name__
        'FactorizedEinsumDense'
    """

    _einsum_class = FactorizedEinsumDense


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedMultiHeadAttention(FactorizedKeras3AttentionMixin, keras.layers.MultiHeadAttention):
    """A stock `MultiHeadAttention` in which some projections are `FactorizedEinsumDense` layers.

    Everything else, call, masks and arguments, is that of the stock layer. `compress` and
    `ALDSCompress` make stock layers to such ones where they factorize a projection.

    Args:
        *args: The stock layer's arguments.
        projections: dict or None, slices and rank of every projection that is factorized, such as
            `{"query": {"slices": 1, "rank": 8}}`. Names are `"query"`, `"key"`, `"value"`,
            `"output"` and, where there is one, `"gate"`.
        **kwargs: The stock layer's keyword arguments.

    Raises:
        ValueError: If `projections` is no such dict, or names one that the layer has not.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import keras
        >>> from keras_alds.layers import FactorizedMultiHeadAttention
        >>> choice = {"slices": 1, "rank": 4}
        >>> layer = FactorizedMultiHeadAttention(2, 8, projections={"query": choice})
        >>> x = keras.ops.ones((1, 5, 16))
        >>> layer(x, x).shape
        TensorShape([1, 5, 16])
        >>> type(layer._query_dense).__name__
        'FactorizedEinsumDense'
    """

    _einsum_class = FactorizedEinsumDense
