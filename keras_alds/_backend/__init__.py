"""All that Keras 3 (`keras`) and tf_keras do differently, and all private names of both.

`backend_of(model)` returns a `Backend`, chosen by the class of the model or layer. So one process
may use Keras 3 and tf_keras. tf_keras is optional.

- `layers`: what a layer holds, and how it becomes another one in place;
- `graphs`: the graph of a symbolic model, and what a model is called on;
- `training`: optimizers, step functions, callbacks;
- `backups`: what `BackupAndRestore` keeps on disk;
- `cloning`: copies of models;
- `wrappers`: TF-MOT's wrappers around layers;
- `functions`: `tf.function`s in users' own code;
- `live`: what is alive in the process and may hold a layer;
- `calls`, `loops`: calls of layers that are watched or replaced, and recurrent layers as graphs;
- `strategies`: replicas of a model, and the processes that train it together;
- `refining`: gradients and steps that bring a model nearer to another one;
- `distilling`: a term of the loss that does so in `fit`;
- `clocks`: what learning-rate schedules go by;
- `tensors`, `images`: TensorFlow functions that other folders use.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import reprlib
import sys
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import h5py
import keras

from keras_alds._backend.backups import Backups, Keras3Backups, TfKerasBackups
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
    "layers_of",
    "load_model",
    "saved_by",
    "tf_keras_backend",
]


class Backend(Cloning, Backups):
    """All that this package asks of Keras 3 or tf_keras."""


class Keras3(Keras3Layers, Keras3Graphs, Keras3Training, Keras3Cloning, Keras3Backups, Backend):
    """Keras 3."""

    name = "keras"
    keras = keras


class TfKeras(
    TfKerasLayers, TfKerasGraphs, TfKerasTraining, TfKerasCloning, TfKerasBackups, Backend
):
    """tf_keras, that is Keras 2 on TensorFlow."""

    name = "tf_keras"

    def __init__(self) -> None:
        self.keras = sys.modules["tf_keras"]


#: Keras 3 and tf_keras by the names of their modules.
KERASES = ("keras", "tf_keras")


def _unregistered(config: Any, module: Any) -> list[str]:
    """The classes in the config of a .keras file that are not of Keras and not registered."""
    if isinstance(config, list):
        return [name for item in config for name in _unregistered(item, module)]
    if not isinstance(config, dict):
        return []
    name, home = config.get("registered_name"), config.get("module")
    own = name and home != "builtins" and str(home).partition(".")[0] not in KERASES
    found = [config["class_name"]] if own and not module.saving.get_registered_object(name) else []
    return found + _unregistered(list(config.values()), module)


# How Keras 3 and tf_keras say that they do not know a class or a function.
_UNKNOWN = (
    r"(?:Could not locate (?:class|function)|Unknown \w+:|deserialize object of type) ['`](\w+)",
    r"'class_name': 'function', 'config': '(\w+)'",
)

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


def saved_by(path: str | os.PathLike[str]) -> str:
    """The package to load a file with: Keras 3, unless only tf_keras can load it."""
    file = os.fspath(path)
    if os.path.isdir(file):
        return KERASES[int(_is_saved_model(file))]
    if zipfile.is_zipfile(file):
        metadata = _document(file, "metadata.json")
        version = metadata.get("keras_version") if isinstance(metadata, dict) else None
        return KERASES[int(str(version).startswith("2."))]
    # Keras 3 loads most `.h5` files of Keras 2. It refuses names such as "conv1/conv".
    with contextlib.suppress(OSError, KeyError, TypeError):
        with h5py.File(file, "r") as saved:
            slash = re.search(r'"name": "[^"]*/', saved.attrs["model_config"])
        return KERASES[int(slash is not None)]
    return KERASES[0]


def _document(file: str, name: str) -> Any:
    """A JSON document in a .keras file; None if there is none that can be read."""
    try:
        with zipfile.ZipFile(file) as saved:
            return json.loads(saved.read(name))
    except (KeyError, ValueError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None


def _is_saved_model(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "keras_metadata.pb"))


def load_model(
    path: str | os.PathLike[str],
    name: str = KERASES[0],
    custom_objects: Mapping[str, Any] | None = None,
) -> Model:
    """Loads a saved model with Keras 3 or tf_keras, in safe mode and without its compile state.

    Args:
        path: The file, or a SavedModel folder of tf_keras.
        name: The package that loads it.
        custom_objects: Classes and functions that are not registered, by name.

    Raises:
        ValueError: If there is no such file, or it cannot be loaded.
        ImportError: If tf_keras is asked for and is not installed.
    """
    file = os.fspath(path)
    if not os.path.exists(file):
        raise ValueError(
            f"Expected the file of a saved model. Received: {file}, which does not exist"
        )
    if (other := _other_than_a_model(file, name)) is not None:
        raise ValueError(
            f"Expected the file of a saved model, .keras or .h5. Received: {file}, {other}. "
            "Write one with `model.save`."
        )
    module = tf_keras_backend().keras if name == KERASES[1] else keras
    try:
        # A compile state may need a user's own loss or metric.
        with _safe_mode(name):
            return module.models.load_model(
                file, compile=False, custom_objects=dict(custom_objects or {})
            )
    except Exception as error:  # of many kinds, if a file is damaged
        other = next(kind for kind in KERASES if kind != name)
        reason = _reason(error, file, module, custom_objects or {})
        raise ValueError(
            f"Expected a model that {name} can load. Received: {file} ({reason}). If {other} saved "
            f"it, pass --keras {other}."
        ) from error


def _safe_mode(name: str) -> contextlib.AbstractContextManager[None]:
    """Refuses to run the code of `Lambda` layers, in all kinds of files.

    `load_model` does so in `.keras` files only: not in `.h5` files (Keras before 3.11.3, and
    tf_keras), and not in SavedModel folders.
    """
    scope = importlib.import_module(f"{name}.src.saving.serialization_lib").SafeModeScope
    return scope(safe_mode=True)


def _other_than_a_model(file: str, name: str) -> str | None:
    """What a file is that holds no model, or None."""
    if os.path.isdir(file):
        return None if name == KERASES[1] and _is_saved_model(file) else "a folder"
    if not os.access(file, os.R_OK):
        return "which you may not read"
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as saved:
            return None if "config.json" in saved.namelist() else "a file of another kind"
    if not h5py.is_hdf5(file):
        return "a file of another kind"
    try:
        with h5py.File(file, "r") as h5:
            return None if "model_config" in h5.attrs else "which holds weights without their model"
    except OSError:
        return "a damaged file"


def _reason(error: Exception, file: str, module: Any, known: Mapping[str, Any]) -> str:
    """Why Keras cannot load a model, in one sentence without its config."""
    text = str(error)
    found = [name for pattern in _UNKNOWN for name in re.findall(pattern, text)]
    found = _unregistered(_document(file, "config.json"), module) or found
    found = [name for name in found if name not in known]
    if found:
        return (
            f"its class or function {found[0]!r} is not known here: name the Python file that "
            "defines it with --custom, or load the model in a script that registers it with "
            "`register_keras_serializable`"
        )
    if "Lambda" in text and "safe_mode" in text:
        return "its Lambda layer holds code, which is not run: use a layer of your own instead"
    innermost = text.rpartition("Exception encountered:")[2].strip()
    sentence = re.split(r"\.\s|\n| (?:using )?config=", innermost)[0]
    return sentence[:200].rstrip(".")


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
        f"Received: model={reprlib.repr(model)} of type {type(model).__name__}"
    )


def layers_of(model: Any) -> list[Any]:
    """A model and all layers in it, the model first."""
    return backend_of(model).layers_of(model)
