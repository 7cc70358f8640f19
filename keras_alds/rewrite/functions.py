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

# The functions that the Kerases make themselves are made anew by `Backend.reset_functions`.
_NOT_OWN = (*_backend.KERASES, "tensorflow")


@contextlib.contextmanager
def run_as_code(model: Any) -> Iterator[None]:
    """Runs the functions of a model's own code without their graphs while inside."""
    if tf.config.functions_run_eagerly() or not _own_functions(model):
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
    before = [(function, dict(vars(function))) for function in _own_functions(model)]
    for function, _ in before:
        # TensorFlow has no public way to forget a graph; the object may be held anywhere.
        _become(function, vars(function._clone(None)))

    def undo() -> None:
        for function, attributes in before:
            _become(function, attributes)

    return undo


def _become(function: Any, attributes: dict[str, Any]) -> None:
    vars(function).clear()
    vars(function).update(attributes)


def _own_functions(model: Any) -> list[Any]:
    """The functions that the layers of a model and it itself have as methods or attributes."""
    backend = _backend.backend_of(model)
    found: dict[int, Any] = {}
    seen: set[int] = set()
    layers = [model]
    while layers:
        layer = layers.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        layers += backend.children(layer)
        names = {name for cls in type(layer).__mro__ for name, v in vars(cls).items() if _is_own(v)}
        bound = [getattr(layer, name) for name in sorted(names - vars(layer).keys())]
        held = [value for value in vars(layer).values() if _is_own(value)]
        found.update((id(function), function) for function in [*bound, *held])
    return list(found.values())


def _is_own(value: Any) -> bool:
    if not isinstance(value, tf.types.experimental.PolymorphicFunction):
        return False
    module = getattr(value.python_function, "__module__", None) or ""
    return module.split(".")[0] not in _NOT_OWN
