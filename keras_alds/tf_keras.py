"""The factorized layers for tf_keras (Keras 2), registered for loading without `custom_objects`.

They are made here from the layers for Keras 3, with the same names, arguments, weights, errors and
help texts. When a program imports both `keras_alds` and tf_keras, this module is
imported, so that saved tf_keras models with factorized layers load.

Example:
    >>> import keras_alds.tf_keras
    >>> keras_alds.tf_keras.FactorizedDense(4, slices=1, rank=2).units
    4
"""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
import tf_keras

from keras_alds.kinds import holders
from keras_alds.kinds.base import KINDS, Kind

# What differs from Keras 3 in every factorized layer.
_OF_TF_KERAS = {
    "_keras": tf_keras,
    "_shape_type": tf.TensorShape,
    "_add": staticmethod(tf.add),
    "_not_equal": staticmethod(tf.not_equal),
}


def _layer(cls: type, kind: Kind) -> type | None:
    """The class for tf_keras that corresponds to one for Keras 3; None without a stock layer."""
    bases_in_tf_keras = {
        keras.layers.Layer: tf_keras.layers.Layer,
        getattr(keras.layers, kind.name, None): getattr(tf_keras.layers, kind.name, None),
        **kind.bases_in_tf_keras,
    }
    bases: tuple[Any, ...] = tuple(bases_in_tf_keras.get(base, base) for base in cls.__bases__)
    if None in bases:
        return None
    own = {name: value for name, value in vars(cls).items() if not name.startswith("__")}
    names = {
        "__doc__": (inspect.getdoc(cls) or "")
        .replace("from keras_alds.layers", f"from {__name__}")
        # Examples import the Keras of the layer.
        .replace(">>> import keras\n", ">>> import tf_keras as keras\n"),
        "__module__": __name__,
        "__qualname__": cls.__name__,
    }
    namespace = {**own, **_OF_TF_KERAS, **kind.in_tf_keras, **names}
    made = types.new_class(cls.__name__, bases, exec_body=lambda body: body.update(namespace))
    tf_keras.saving.register_keras_serializable(package="keras_alds")(made)
    # Wrappers such as TimeDistributed load the layer inside them by its bare class name.
    tf_keras.saving.get_custom_objects()[cls.__name__] = made
    kind.add_layer(tf_keras.__name__, made)
    return made


_LAYERS = {
    cls.__name__: made
    for stock in KINDS.values()
    for kind in (stock, *stock.chains.values())
    for cls in list(kind.layers.values())
    if (made := _layer(cls, kind)) is not None
}
globals().update(_LAYERS)

WithFactorizedLayers = types.new_class(
    holders.WithFactorizedLayers.__name__,
    (holders.WithFactorizedLayers,),
    exec_body=lambda body: body.update({"_keras": tf_keras, "__module__": __name__}),
)
tf_keras.saving.register_keras_serializable(*holders.REGISTERED)(WithFactorizedLayers)
holders.BASES[tf_keras.__name__] = WithFactorizedLayers

__all__ = sorted(_LAYERS)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
