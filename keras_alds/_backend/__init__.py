"""All that Keras 3 (`keras`) and tf_keras do differently, and all private names of both.

`backend_of(model)` returns a `Backend`, chosen by the class of the model or layer. So one process
may use Keras 3 and tf_keras. tf_keras is optional.

- `layers`: what a layer holds, and how it becomes another one in place;
- `graphs`: the graph of a symbolic model, and what a model is called on;
- `training`: optimizers, step functions, callbacks;
- `cloning`: copies of models;
- `wrappers`: TF-MOT's wrappers around layers;
- `functions`: `tf.function`s in users' own code;
- `calls`, `loops`: calls of layers that are watched or replaced, and recurrent layers as graphs;
- `tensors`, `images`: TensorFlow functions that other folders use.
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
    """All that this package asks of Keras 3 or tf_keras."""


class Keras3(Keras3Layers, Keras3Graphs, Keras3Training, Keras3Cloning, Backend):
    """Keras 3."""

    name = "keras"
    keras = keras


class TfKeras(TfKerasLayers, TfKerasGraphs, TfKerasTraining, TfKerasCloning, Backend):
    """tf_keras, that is Keras 2 on TensorFlow."""

    name = "tf_keras"

    def __init__(self) -> None:
        self.keras = sys.modules["tf_keras"]


#: Keras 3 and tf_keras by the names of their modules.
KERASES = ("keras", "tf_keras")

_BACKENDS: dict[str, Backend] = {}


def tf_keras_backend() -> Backend:
    """The backend of tf_keras, which is imported if it was not yet.

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
        ValueError: If there is no such file, or it cannot be loaded.
        ImportError: If tf_keras is asked for and is not installed.
    """
    file = os.fspath(path)
    if not os.path.exists(file):
        raise ValueError(
            f"Expected the file of a saved model. Received: {file}, which does not exist"
        )
    module = tf_keras_backend().keras if name == KERASES[1] else keras
    try:
        # A compile state may need a user's own loss or metric.
        return module.models.load_model(file, compile=False)
    except (TypeError, ValueError, OSError) as error:
        other = next(kind for kind in KERASES if kind != name)
        raise ValueError(
            f"Expected a model that {name} can load. Received: {file} ({error}). If {other} saved "
            f"it, choose {other}."
        ) from error


def backend_of(model: object) -> Backend:
    """The backend of Keras 3 or of tf_keras, whichever `model`, a model or layer, belongs to.

    Raises:
        ValueError: If it belongs to neither.
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
