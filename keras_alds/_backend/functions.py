"""`tf.function`s in the code of custom layers and models.

A traced graph keeps the layers as they were: it ignores later replacements, and its calls of layers
cannot be watched.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from keras_alds import _backend
from keras_alds._backend.graphs import forget_graph

# Packages whose classes and functions are not custom code. `Backend.reset_functions` resets the
# graphs that Keras 3 and tf_keras make for a model.
_NOT_OWN = ("tensorflow", "tensorflow_model_optimization", "keras_alds")


@contextlib.contextmanager
def run_as_code(model: Any) -> Iterator[None]:
    """Runs `tf.function`s eagerly inside the context, if a model has custom code.

    Calls of layers in a traced graph cannot be watched, and a graph traced while they are watched
    would keep the watching code.
    """
    if not any(_is_own(type(layer)) for layer in layers_of(model)):
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


def forget_graphs(model: Any) -> Callable[[], None]:
    """Drops the graphs of `tf.function`s in a model's custom code; the next call traces again.

    Returns:
        A function that restores the graphs.
    """
    undo = [forget_graph(function) for function in _own_functions(model)]

    def bring_back() -> None:
        for step in undo:
            step()

    return bring_back


def _own_functions(model: Any) -> list[Any]:
    """The `tf.function`s that a model and its layers have as methods or attributes."""
    found: dict[int, Any] = {}
    for layer in layers_of(model):
        names = {
            name for cls in type(layer).__mro__ for name, v in vars(cls).items() if _is_function(v)
        }
        bound = [getattr(layer, name) for name in sorted(names - vars(layer).keys())]
        held = [value for value in vars(layer).values() if _is_function(value)]
        found.update((id(function), function) for function in [*bound, *held])
    return list(found.values())


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


def _is_function(value: Any) -> bool:
    return isinstance(value, tf.types.experimental.PolymorphicFunction) and _is_own(
        value.python_function
    )


def _is_own(code: Any) -> bool:
    """Whether a class or function is custom code."""
    return (getattr(code, "__module__", None) or "").split(".")[0] not in (
        *_backend.KERASES,
        *_NOT_OWN,
    )
