"""Converts arguments of Keras 3 layers and of `compile` to tf_keras."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_alds import _backend

#: Activations that Keras 3 and tf_keras compute alike, by their names in Keras 3.
SAME_ACTIVATIONS = frozenset(
    [
        "elu",
        "exponential",
        "gelu",
        "leaky_relu",
        "linear",
        "log_softmax",
        "mish",
        "relu",
        "relu6",
        "selu",
        "sigmoid",
        "silu",
        "softmax",
        "softplus",
        "softsign",
        "tanh",
    ]
)


class UnsupportedError(ValueError):
    """Why a layer or one of its settings has no counterpart."""


def parameters(cls: Any) -> dict[str, Any]:
    """Names and defaults of all constructor arguments of `cls` and its bases."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base) and base is not object:
            for name, parameter in inspect.signature(base.__init__).parameters.items():
                if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                    found.setdefault(name, parameter.default)
    return found


def equal(value: Any, default: Any) -> bool:
    """Whether a setting equals its default, regardless of list or tuple."""
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return list(value) == list(default)
    return bool(np.all(value == default))


def class_name(serialized: Any) -> str:
    """The name of a serialized object, for messages."""
    if not isinstance(serialized, dict):
        return repr(serialized)
    if serialized.get("class_name") == "function":
        return repr(serialized.get("config"))
    return str(serialized.get("class_name"))


def counterpart(target: _backend.Backend, module: str, obj: Any) -> Any:
    """The tf_keras object with the settings of a Keras 3 object.

    Args:
        target: The backend of tf_keras.
        module: The module of both: `"losses"`, `"initializers"`, ….
        obj: The object; a name or None is returned unchanged.

    Raises:
        UnsupportedError: If tf_keras lacks the object or one of its settings.
    """
    if obj is None or isinstance(obj, str):
        return obj
    namespace = getattr(target.keras, module)
    kind = type(obj).__name__
    if inspect.isfunction(obj):
        if not obj.__module__.startswith("keras."):
            raise UnsupportedError(f"the function {obj.__name__} was written for Keras 3")
        return namespace.get(obj.__name__)
    cls = getattr(namespace, kind, None)
    if not type(obj).__module__.startswith("keras.") or cls is None:
        raise UnsupportedError(f"tf_keras has no {kind}")
    known, defaults = parameters(cls), parameters(type(obj))
    config = {}
    for key, value in obj.get_config().items():
        if key == "learning_rate" and isinstance(value, dict):
            schedules = namespace.schedules
            if not hasattr(schedules, value["class_name"]):
                raise UnsupportedError(f"tf_keras has no {value['class_name']}")
            config[key] = getattr(schedules, value["class_name"]).from_config(value["config"])
        elif key == "dtype":
            continue
        elif key in known or (module == "optimizers" and key in cls().get_config()):
            config[key] = value
        elif value is not None and not equal(value, defaults.get(key)):
            raise UnsupportedError(f"{key}={value!r} of {kind} has no counterpart")
    return cls(**config)


# -- Compile state -------------------------------------------------------------------------------


def compile_arguments(
    source: _backend.Backend, target: _backend.Backend, model: Any
) -> dict[str, Any]:
    """The arguments of tf_keras's `compile` for those of a compiled Keras 3 model."""
    if type(model).compile is not source.keras.Model.compile:
        raise UnsupportedError(f"{type(model).__name__} overrides `compile()`")
    given = source.compile_arguments(model)
    optimizer = given.pop("optimizer")
    while source.inner_optimizer(optimizer) is not None:  # tf_keras adds its own loss scaling
        optimizer = source.inner_optimizer(optimizer)
    given.pop("auto_scale_loss", None)
    found: dict[str, Any] = {"optimizer": counterpart(target, "optimizers", optimizer)}
    for key in ("loss", "metrics", "weighted_metrics"):
        module = "losses" if key == "loss" else "metrics"
        value = given.pop(key, None)
        found[key] = _each(value, functools.partial(counterpart, target, module))
    jit = given.pop("jit_compile", None)  # tf_keras does not know "auto"
    return {**found, **given, "jit_compile": jit is True}


def _each(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _each(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each(item, function) for item in value]
    return function(value)
