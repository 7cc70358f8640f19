"""`tf.function`s in the code of custom layers and models.

A traced graph keeps the layers as they were: its calls of layers cannot be watched.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from keras_alds import _backend

# Packages whose classes are not custom code.
_NOT_OWN = ("builtins", "tensorflow", "tensorflow_model_optimization", "keras_alds")


@contextlib.contextmanager
def run_as_code(model: Any) -> Iterator[None]:
    """Runs `tf.function`s eagerly inside the context, if a model has custom code.

    Calls of layers in a traced graph cannot be watched, and a graph traced while they are watched
    would keep the watching code.
    """
    if not any(map(has_own_code, layers_of(model))):
        yield
        return
    user = object()
    try:
        with _lock:
            if not _users:
                _users["before"] = tf.config.functions_run_eagerly()
            _users[user] = True
            tf.config.run_functions_eagerly(True)
        yield
    finally:
        with _lock:
            _users.pop(user, None)
            if len(_users) == 1:
                tf.config.run_functions_eagerly(_users.pop("before"))


# The setting is that of the whole process: the last thread to leave restores it.
_lock = threading.Lock()
_users: dict[object, bool] = {}


def layers_of(model: Any) -> list[Any]:
    """A model and all layers in it, the model first."""
    backend = _backend.backend_of(model)
    found: dict[int, Any] = {}
    waiting = [model]
    while waiting:
        layer = waiting.pop()
        if id(layer) not in found:
            found[id(layer)] = layer
            waiting += backend.children(layer)
    return list(found.values())


def has_own_code(layer: Any) -> bool:
    """Whether the class of a layer or model is custom code, or inherits from it."""
    modules = (cls.__module__ for cls in type(layer).__mro__)
    return any(module.split(".")[0] not in (*_backend.KERASES, *_NOT_OWN) for module in modules)
