"""`tf.function`s in the code of custom layers and models.

A traced graph keeps the layers as they were: its calls of layers cannot be watched.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow as tf

# Packages whose classes are not custom code.
_NOT_OWN = (
    "builtins",
    "keras",
    "keras_alds",
    "tensorflow",
    "tensorflow_model_optimization",
    "tf_keras",
)


@contextlib.contextmanager
def run_as_code(layers: Iterable[Any]) -> Iterator[None]:
    """Runs `tf.function`s eagerly inside the context, if one of some layers has custom code.

    Calls of layers in a traced graph cannot be watched, and a graph traced while they are watched
    would keep the watching code. The code may set attributes, such as a state. If they then hold
    tensors of a graph, which nothing else can use, they get their old values back.
    """
    own = [layer for layer in layers if has_own_code(layer)]
    if not own:
        yield
        return
    before = [dict(vars(layer)) for layer in own]
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
        for layer, attributes in zip(own, before, strict=True):
            _restore(layer, attributes)


def _restore(layer: Any, attributes: Mapping[str, Any]) -> None:
    """Gives the attributes that hold tensors of a graph the values that they had."""
    for name, value in list(vars(layer).items()):
        if value is attributes.get(name) or not _is_of_graph(value):
            continue
        if name in attributes:
            vars(layer)[name] = attributes[name]
        else:
            del vars(layer)[name]


def _is_of_graph(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_of_graph, value))
    if isinstance(value, dict):
        return any(map(_is_of_graph, value.values()))
    return bool(tf.is_symbolic_tensor(value))


# The setting is that of the whole process: the last thread to leave restores it.
_lock = threading.Lock()
_users: dict[object, bool] = {}


def has_own_code(layer: Any) -> bool:
    """Whether the class of a layer or model is custom code, or inherits from it."""
    modules = (cls.__module__ for cls in type(layer).__mro__)
    return any(module.split(".")[0] not in _NOT_OWN for module in modules)
