"""Quantization-aware training of a compressed model with TF-MOT, to an int8 file in one call."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_alds import _backend
from keras_alds.compress import compress as compress_model
from keras_alds.litert import _package
from keras_alds.litert.convert import check_folder, checked_options, convert, convert_quietly
from keras_alds.litert.equalize import equalize
from keras_alds.litert.quantized import warn_of_thin_groups
from keras_alds.rewrite.expand import expand
from keras_alds.rewrite.inspect import walk
from keras_alds.rewrite.to_tf_keras import to_tf_keras

# What the functions that are called get from the others' results.
_GIVEN = ("self", "model", "x", "y", "path", "quantize")


def quantize_aware_training(
    model: Any,
    x: Any = None,
    y: Any = None,
    *,
    compress: Mapping[str, Any] | None = None,
    optimizer: Any = None,
    loss: Any = None,
    metrics: Any = None,
    quantize: Callable[[Any], Any] | None = None,
    fit: Callable[[Any], object] | None = None,
    path: str | os.PathLike[str] | None = None,
    convert_options: Mapping[str, Any] | None = None,
    **fit_options: Any,
) -> tuple[Any, bytes]:
    """Trains a model for int8 and converts it: compress, expand, quantize, fit, convert.

    The steps, each of which can be taken by itself: `compress` if it is asked for; `expand` to
    stock layers; `to_tf_keras` for a Keras 3 model; `litert.equalize` without data; TF-MOT's
    `quantize_model`, which sees BatchNormalization and folds it as the file will; `compile` and
    `fit`; `litert.convert` with `quantize="int8"`, which checks every convolution and dense
    layer, and warns of those that are slow. `model` is untouched.

    Args:
        model: A trained Functional or Sequential model of either Keras, compressed (by
            `compress` or in `fit` by `ALDSCompress`) or not. TF-MOT takes no models inside models.
        x: Training data, as for `fit`.
        y: Targets, as for `fit`.
        compress: Options of `keras_alds.compress`, such as `{"cr": 0.5, "max_slices": 1}`, or
            None for a model that is compressed already or is not to be. Defaults to None.
        optimizer: An optimizer of tf_keras, or its name. Some tenths of the learning rate of the
            training before are usual. Defaults to a new one with the settings of the model's own.
        loss: As for `compile` of tf_keras. Defaults to the model's own.
        metrics: As for `compile` of tf_keras. Defaults to the model's own.
        quantize: Function from the expanded tf_keras model to the one that is trained, for
            annotated layers or schemes of TF-MOT that keep sparsity or clusters. Defaults to
            `tensorflow_model_optimization.quantization.keras.quantize_model`.
        fit: Function that trains the compiled model it is given, for loops of your own. Defaults
            to `model.fit(x, y, **fit_options)`.
        path: Where to write the file, or None. Defaults to None.
        convert_options: Further options of `litert.convert`, such as
            `{"inference_input_type": "int8"}`. Defaults to none.
        **fit_options: Options of tf_keras's `fit`, such as `epochs=5`, `batch_size`, `callbacks`.

    Returns:
        `(quantized, content)`: the trained tf_keras model, with its `history` if `fit` was Keras's,
        and the bytes of the int8 file.

    Raises:
        ImportError: If TF-MOT, tf_keras or LiteRT is not installed.
        FileNotFoundError: If there is no such folder as `path` lies in.
        TypeError: If a single step has no such option as is given for it.
        ValueError: As the single steps; if TF-MOT does not take the model; if the optimizer or a
            callback is of Keras 3; or if there is nothing to train with.

    Example:
    ```python
    options = {"cr": 0.5, "max_slices": 1}
    quantized, content = keras_alds.tfmot.quantize_aware_training(
        model, x, y, compress=options, epochs=1, path="small_int8.tflite", verbose=0
    )
    ```
    """
    if fit is None and x is None:
        raise ValueError(
            "Expected training data `x` (and `y`), or a function `fit` that trains. Received: none"
        )
    if fit is not None and (x is not None or y is not None or fit_options):
        raise ValueError(
            "Expected either training data or a function `fit` that has its own. Received: both, "
            f"or options of Keras's `fit` beside it ({', '.join(fit_options) or 'x, y'})"
        )
    _check_options(compress, convert_options, optimizer)
    check_folder(path)
    tfmot = tfmot_package()
    target = _backend.tf_keras_backend()
    _package.interpreter()
    _check_fit_options(target, fit_options)
    if compress is not None:
        model = compress_model(model, **compress)
    model = expand(model)
    if _backend.backend_of(model) is not target:
        model = to_tf_keras(model)
    equalize(model)  # a copy: `expand` made it
    arguments = _compile_arguments(target, model, optimizer, loss, metrics)
    quantized = _quantized(model, quantize or tfmot.quantization.keras.quantize_model)
    target.use_plain_convolutions([layer for _, layer in walk(quantized)])
    quantized.compile(**arguments)
    if fit is not None:
        fit(quantized)
    else:
        quantized.fit(x, y, **fit_options)
    options = {"verbose": fit_options.get("verbose", 1), **(convert_options or {})}
    if options["verbose"] == "auto":
        options["verbose"] = 1
    content = convert_quietly(quantized, path, quantize="int8", **options)
    warn_of_thin_groups(content, stacklevel=3)
    return quantized, content


def _check_options(compress: Any, convert_options: Any, optimizer: Any) -> None:
    for name, value in (("compress", compress), ("convert_options", convert_options)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(
                f"Expected `{name}` to be a dict of options, or None. Received: {name}={value!r}"
            )
    if taken := {"path", "quantize"} & set(convert_options or ()):
        raise ValueError(
            "Expected no options in `convert_options` that are set already: the file is int8, and "
            f"`path` is an argument here. Received: {', '.join(sorted(taken))}"
        )
    _check_names("compress", compress or {}, compress_model)
    _check_names("convert_options", convert_options or {}, convert)
    known = inspect.signature(checked_options).parameters
    checked_options(
        "int8", **{name: value for name, value in (convert_options or {}).items() if name in known}
    )
    if isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "Expected an optimizer of tf_keras, in which the training runs, or its name. "
            f"Received: {type(optimizer).__name__} of Keras 3"
        )


def _check_names(argument: str, options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raises a TypeError if `function` has no such options: it is called late, or deep inside."""
    known = [name for name in inspect.signature(function).parameters if name not in _GIVEN]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(
            f"Expected `{argument}` to hold options of `{function.__name__}`: {', '.join(known)}. "
            f"Received: {', '.join(map(repr, unknown))}"
        )


def _check_fit_options(backend: _backend.Backend, options: Mapping[str, Any]) -> None:
    _check_names("fit_options", options, backend.keras.Model.fit)
    given = options.get("callbacks")
    callbacks = given if isinstance(given, (list, tuple)) else [given]
    if wrong := [
        type(callback).__name__
        for callback in callbacks
        if isinstance(callback, keras.callbacks.Callback)
        and not isinstance(callback, _backend.Callback)
    ]:
        raise ValueError(
            "Expected callbacks of tf_keras, in which the training runs. "
            f"Received: {', '.join(wrong)} of Keras 3"
        )


def tfmot_package() -> Any:
    """`tensorflow_model_optimization`.

    Raises:
        ImportError: If TF-MOT is not installed.
    """
    try:
        return importlib.import_module("tensorflow_model_optimization")
    except ImportError as error:
        raise ImportError(
            'TF-MOT is needed here and is not installed. Remedy: pip install "keras_alds[tfmot]"'
        ) from error


def _compile_arguments(
    backend: _backend.Backend, model: Any, optimizer: Any, loss: Any, metrics: Any
) -> dict[str, Any]:
    given = {"optimizer": optimizer, "loss": loss, "metrics": metrics}
    given = {name: value for name, value in given.items() if value is not None}
    if backend.is_compiled(model):
        return {**backend.compile_arguments(model), **given}
    if not {"optimizer", "loss"} <= set(given):
        raise ValueError(
            f"Expected a compiled model, or `optimizer` and `loss`. Received: '{model.name}', "
            f"which is not compiled, and {', '.join(given) or 'neither'}"
        )
    return given


def _keep_names_apart(backend: _backend.Backend, model: Any) -> None:
    """Makes new layers get other names than those of `model`.

    TF-MOT writes a separable convolution out as layers that tf_keras names, and then finds weights
    by name. The names of a model that was loaded or translated are not yet taken in this process.
    """
    layers = backend.keras.layers
    for make in (lambda: layers.Conv2D(1, 1), lambda: layers.DepthwiseConv2D(1)):
        name = re.sub(r"_\d+$", "", make().name)
        found = [re.fullmatch(rf"{name}(?:_(\d+))?", layer.name) for _, layer in walk(model)]
        last = max((int(match[1] or 0) for match in found if match), default=-1)
        while int(make().name.removeprefix(name).lstrip("_") or 0) < last:
            pass


def _quantized(model: Any, quantize: Callable[[Any], Any]) -> Any:
    backend = _backend.backend_of(model)
    inner = [path for path, layer in walk(model) if backend.is_model(layer)]
    if inner:
        raise ValueError(
            f"Expected a model without models inside: TF-MOT quantizes none. Received: "
            f"'{model.name}' with {', '.join(map(repr, inner))}. Remedy: call their layers in the "
            "outer model, or quantize after training with `litert.convert`."
        )
    _keep_names_apart(backend, model)
    try:
        return quantize(model)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"Expected a model that TF-MOT quantizes. Received: '{model.name}', for which it fails "
            f"({error}). Remedy: pass `quantize`, a function that annotates the layers to be "
            "quantized, or quantize after training with `litert.convert`."
        ) from error
