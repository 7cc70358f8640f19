"""The differences between Keras 3 (`keras`) and `tf_keras`, and all uses of their private names.

All other code gets a `Backend` from `backend_of(model)`, so one process can use models of both. The
backend depends on the class of the given object, not on an environment variable. tf_keras is
optional.

Each module implements one topic for Keras 3 and tf_keras:

- `layers.py`: the weights of layers, and the replacement of layers in place;
- `graphs.py`: the graph of a symbolic model, and a model's inputs;
- `training.py`: optimizers, step functions, callbacks;
- `cloning.py`: copies of models.
"""

from __future__ import annotations

import importlib
import os
import sys

import keras

from keras_alds._backend.cloning import Cloning, Keras3Cloning, TfKerasCloning
from keras_alds._backend.graphs import GraphCall, Keras3Graphs, TfKerasGraphs
from keras_alds._backend.layers import Keras3Layers, Model, TfKerasLayers
from keras_alds._backend.training import Callback, Keras3Training, TfKerasTraining

__all__ = [
    "KERASES",
    "Backend",
    "Callback",
    "GraphCall",
    "backend_of",
    "load_model",
    "tf_keras_backend",
]


class Backend(Cloning):
    """The interface of this package to Keras 3 or tf_keras."""


class Keras3(Keras3Layers, Keras3Graphs, Keras3Training, Keras3Cloning, Backend):
    """Keras 3."""

    name = "keras"
    keras = keras


class TfKeras(TfKerasLayers, TfKerasGraphs, TfKerasTraining, TfKerasCloning, Backend):
    """tf_keras, which is Keras 2 on TensorFlow."""

    name = "tf_keras"

    def __init__(self) -> None:
        self.keras = sys.modules["tf_keras"]


#: Keras 3 and tf_keras by the names of their modules.
KERASES = ("keras", "tf_keras")

_BACKENDS: dict[str, Backend] = {}


def tf_keras_backend() -> Backend:
    """The backend of tf_keras, which is imported if necessary.

    Raises:
        ImportError: If tf_keras is not installed.
    """
    try:
        importlib.import_module("tf_keras")
    except ImportError as error:
        raise ImportError(
            "tf_keras is needed here and is not installed. "
            'Remedy: pip install "keras_alds[tf_keras]"'
        ) from error
    return _BACKENDS.setdefault("tf_keras", TfKeras())


def load_model(path: str | os.PathLike[str], name: str = KERASES[0]) -> Model:
    """Loads a saved model with Keras 3 or tf_keras, without its compile state.

    Raises:
        ValueError: If the file does not exist or cannot be loaded.
        ImportError: If `name` is `"tf_keras"` and it is not installed.
    """
    file = os.fspath(path)
    if not os.path.exists(file):
        raise ValueError(f"Expected the file of a saved model. Received: {file}, which is missing")
    module = tf_keras_backend().keras if name == KERASES[1] else keras
    try:
        # A compile state may need a custom loss or metric.
        return module.models.load_model(file, compile=False)
    except (TypeError, ValueError, OSError) as error:
        other = next(kind for kind in KERASES if kind != name)
        raise ValueError(
            f"Expected a model that {name} can load. Received: {file} ({error}). If {other} saved "
            f"it, choose {other}."
        ) from error


def backend_of(model: object) -> Backend:
    """The backend of a model or layer: that of Keras 3 or tf_keras.

    Raises:
        ValueError: If `model` belongs to neither.
    """
    for name, kind in (("keras", Keras3), ("tf_keras", TfKeras)):
        module = sys.modules.get(name)
        if module is not None and isinstance(model, module.layers.Layer):
            if name not in _BACKENDS:
                _BACKENDS[name] = kind()
            return _BACKENDS[name]
    raise ValueError(
        "Expected `model` to be a built `keras.Model` or `tf_keras.Model`. "
        f"Received: model={model!r} of type {type(model).__name__}"
    )
