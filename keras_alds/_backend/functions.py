"""`tf.function`s in the code of a user's own layers and models.

What was traced once holds the layers as they were then: it does not follow when one of them becomes
another, and nobody sees that they are called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from keras_alds import _backend
from keras_alds._backend.graphs import forget_graph

# Classes and functions of these are not a user's own code. The graphs that the Kerases make for a
# model are made anew by `Backend.reset_functions`.
_NOT_OWN = (*_backend.KERASES, "tensorflow", "tensorflow_model_optimization", "keras_alds")


@contextlib.contextmanager
def run_as_code(model: Any) -> Iterator[None]:
    """Runs functions without their graphs while inside, if a model has code of a user's own.

    What was traced hides the layers that it calls, and a graph that is traced while they are
    watched would go on reporting to whoever watched them.
    """
    own = any(_is_own(type(layer)) for layer in _layers(model))
    if tf.config.functions_run_eagerly() or not own:
        yield
        return
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


def forget_graphs(model: Any) -> Callable[[], None]:
    """Lets the functions of a model's own code be traced anew when they are called next.

    Returns:
        A function that brings the graphs back.
    """
    undo = [forget_graph(function) for function in _own_functions(model)]

    def bring_back() -> None:
        for step in undo:
            step()

    return bring_back


def _own_functions(model: Any) -> list[Any]:
    """The functions that the layers of a model and it itself have as methods or attributes."""
    found: dict[int, Any] = {}
    for layer in _layers(model):
        names = {
            name for cls in type(layer).__mro__ for name, v in vars(cls).items() if _is_function(v)
        }
        bound = [getattr(layer, name) for name in sorted(names - vars(layer).keys())]
        held = [value for value in vars(layer).values() if _is_function(value)]
        found.update((id(function), function) for function in [*bound, *held])
    return list(found.values())


def _layers(model: Any) -> list[Any]:
    """A model and all layers in it."""
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
    """Whether a class or function is a user's own."""
    return (getattr(code, "__module__", None) or "").split(".")[0] not in _NOT_OWN
