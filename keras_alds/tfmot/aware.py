"""Quantization-aware training of a compressed model with TF-MOT, to an int8 file in one call."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_alds import _backend
from keras_alds.api import compress as compress_model
from keras_alds.litert import _package
from keras_alds.litert.comparison import accuracy
from keras_alds.litert.conversion import ConvertOptions, check_folder, convert, convert_quietly
from keras_alds.litert.equalization import equalize
from keras_alds.litert.quantized import warn_of_thin_groups
from keras_alds.litert.runs import Runner
from keras_alds.models.data import MIN_EXAMPLES
from keras_alds.models.expansion import expand
from keras_alds.models.inventory import walk
from keras_alds.tfmot.conversion import to_tf_keras
from keras_alds.tfmot.package import tfmot_package

# What the functions that are called get from the others' results.
_GIVEN = ("self", "model", "x", "y", "path", "quantize")
# Examples that the files are compared on at most, and how many of them at once.
_HELD_OUT = 1000
_BATCH = 32


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
    validation_data: Any = None,
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

    The file is compared with that of quantization after training, of the same compressed model, on
    examples that are held out of the training: by accuracy if the loss is a cross-entropy of
    classes, else by the loss. A warning tells if it is worse. The file is returned all the same.

    Args:
        model: A trained Functional or Sequential model of either Keras, compressed (by
            `compress` or in `fit` by `ALDSCompress`) or not. TF-MOT takes no models inside models.
        x: Training data, as for `fit`.
        y: Targets, as for `fit`.
        compress: Options of `keras_alds.compress`, such as `{"cr": 0.5, "max_slices": 1}`, or
            None for a model that is compressed already or is not to be. Defaults to None.
        optimizer: An optimizer of tf_keras, or its name. Defaults to a new one with the settings
            of the model's own and a tenth of its learning rate; of a schedule's rate at the step
            that the model is at.
        loss: As for `compile` of tf_keras. Defaults to the model's own.
        metrics: As for `compile` of tf_keras. Defaults to the model's own.
        quantize: Function from the expanded tf_keras model to the one that is trained, for
            annotated layers or schemes of TF-MOT that keep sparsity or clusters. Defaults to
            `tensorflow_model_optimization.quantization.keras.quantize_model`.
        fit: Function that trains the compiled model it is given, for loops of your own. Defaults
            to `model.fit(x, y, **fit_options)`.
        validation_data: Examples with targets for the comparison, which Keras's `fit` gets too:
            `(x, y)` or `(x, y, sample_weight)` of arrays, a batched `tf.data.Dataset` or a
            `Sequence`; at most 1000 of them are compared. Defaults to what `validation_split` sets
            apart, or to a tenth of `x` and `y`, evenly spaced and at most 1000 examples, which are
            then not trained on. Without it nothing is compared if `x` are not arrays, if there is
            no `y`, or if the tenth were fewer than 8 examples.
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
            callback is of Keras 3; if the model's learning rate is 0 and no optimizer is given; or
            if there is nothing to train with.

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
    options = _checked_options(compress, convert_options, optimizer, fit_options)
    check_folder(path)
    tfmot = tfmot_package()
    target = _backend.tf_keras_backend()
    _package.interpreter()
    _check_fit_options(target, fit_options)
    given = model
    if compress is not None:
        model = compress_model(model, **compress)
    model = expand(model)
    if _backend.backend_of(model) is not target:
        model = to_tf_keras(model)
    equalize(model)  # a copy: `expand` made it
    arguments = _compile_arguments(target, given, model, optimizer, loss, metrics)
    x, y, fit_options, validation_data = _hold_out(x, y, fit_options, validation_data)
    held_out = _batches(validation_data)
    after = _after_training(model, held_out, options)
    quantized = _quantized(model, quantize or tfmot.quantization.keras.quantize_model)
    target.use_plain_convolutions([layer for _, layer in walk(quantized)])
    quantized.compile(**arguments)
    if fit is not None:
        fit(quantized)
    else:
        quantized.fit(x, y, **fit_options)
    content = convert_quietly(quantized, options, path)
    warn_of_thin_groups(content, stacklevel=3)
    if after is not None:
        _compare(quantized, content, after, held_out)
    return quantized, content


def _checked_options(
    compress: Any, convert_options: Any, optimizer: Any, fit_options: Mapping[str, Any]
) -> ConvertOptions:
    """The options of the conversion, once all options but those of `fit` are checked."""
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
    if isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "Expected an optimizer of tf_keras, in which the training runs, or its name. "
            f"Received: {type(optimizer).__name__} of Keras 3"
        )
    verbose = fit_options.get("verbose", 1)
    options = {"verbose": 1 if verbose == "auto" else verbose, **(convert_options or {})}
    return ConvertOptions(quantize="int8", **options)


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


def _compile_arguments(
    backend: _backend.Backend, given: Any, model: Any, optimizer: Any, loss: Any, metrics: Any
) -> dict[str, Any]:
    """Arguments of `compile` for `model`, the tf_keras form of the model that was `given`."""
    own = {"optimizer": optimizer, "loss": loss, "metrics": metrics}
    own = {name: value for name, value in own.items() if value is not None}
    if backend.is_compiled(model):
        arguments = {**backend.compile_arguments(model), **own}
        if optimizer is None:
            rate = _backend.backend_of(given).learning_rate(given.optimizer)
            if not rate > 0:
                raise ValueError(
                    "Expected the model's learning rate to be above 0: a tenth of it is the "
                    f"default here. Received: {rate:g} of '{given.name}'. Remedy: pass "
                    "`optimizer`, such as `tf_keras.optimizers.Adam(1e-4)`."
                )
            backend.set_learning_rate(arguments["optimizer"], rate / 10)  # a copy's
        return arguments
    if not {"optimizer", "loss"} <= set(own):
        raise ValueError(
            f"Expected a compiled model, or `optimizer` and `loss`. Received: '{model.name}', "
            f"which is not compiled, and {', '.join(own) or 'neither'}"
        )
    return own


# -- Comparison with quantization after training -------------------------------------------------


def _hold_out(
    x: Any, y: Any, options: dict[str, Any], validation_data: Any
) -> tuple[Any, Any, dict[str, Any], Any]:
    """What to train on, the options of `fit`, and the examples for the comparison."""
    if x is None:  # a `fit` of the user's
        return x, y, options, validation_data
    if validation_data is not None:
        return x, y, {**options, "validation_data": validation_data}, validation_data
    weights = options.get("sample_weight")
    whole = (x, y) if weights is None else (x, y, weights)
    arrays = tf.nest.flatten(whole)
    if not all(isinstance(array, (np.ndarray, tf.Tensor)) for array in arrays):
        return x, y, options, None
    sizes = {np.shape(array)[:1] for array in arrays}
    if len(sizes) != 1 or () in sizes:  # Keras complains
        return x, y, options, None
    count = len(arrays[0])
    split = options.get("validation_split")
    if split:
        rows = np.arange(int(np.floor(count * (1 - split))), count)  # as Keras does
        return x, y, options, _rows(whole, rows)
    held = min(count // 10, _HELD_OUT)
    if held < MIN_EXAMPLES:
        return x, y, options, None
    rows = np.linspace(0, count, held, endpoint=False).astype(int)
    validation_data = _rows(whole, rows)
    x, y, *rest = _rows(whole, np.delete(np.arange(count), rows))
    options = {**options, "validation_data": validation_data}
    return x, y, {**options, "sample_weight": rest[0]} if rest else options, validation_data


def _rows(arrays: Any, rows: Any) -> Any:
    return tf.nest.map_structure(lambda array: np.asarray(array)[rows], arrays)


def _batches(validation_data: Any) -> list[Any]:
    """Batches `(x, y)` or `(x, y, weights)` of the examples to compare on."""
    if isinstance(validation_data, (tuple, list)):
        if len(validation_data) < 2:
            return []
        count = len(tf.nest.flatten(validation_data)[0])
        chosen = np.linspace(0, count, min(count, _HELD_OUT), endpoint=False).astype(int)
        parts = [chosen[start : start + _BATCH] for start in range(0, len(chosen), _BATCH)]
        return [_rows(tuple(validation_data), part) for part in parts]
    if validation_data is None or isinstance(validation_data, Iterator):
        return []  # what can be read once is for `fit`
    batches: list[Any] = []
    for batch in validation_data:
        if not isinstance(batch, tuple) or len(batch) < 2:
            return []
        batches.append(tf.nest.map_structure(np.asarray, batch))
        if sum(map(_count, batches)) >= _HELD_OUT:
            break
    return batches


def _count(batch: Any) -> int:
    return len(tf.nest.flatten(batch)[0])


def _after_training(model: Any, held_out: list[Any], options: ConvertOptions) -> bytes | None:
    """The file of quantization after training; None if there is none to compare with."""
    if sum(map(_count, held_out)) < MIN_EXAMPLES:
        return None
    try:
        held_out_only = dataclasses.replace(options, representative_data=held_out, verbose=0)
        return convert_quietly(model, held_out_only)
    except ValueError:  # it may be why the model is trained for int8
        return None


def _compare(model: Any, aware: bytes, after: bytes, held_out: list[Any]) -> None:
    """Warns if the file `aware` is worse than the file `after`."""
    name, (trained, before) = _figures(model, (aware, after), held_out)
    if not (trained >= before if name == "accuracy" else trained <= before):
        warnings.warn(
            "Quantization-aware training made a worse file than quantization after training: on "
            f"{sum(map(_count, held_out))} examples that were held out, its {name} is "
            f"{trained:.4g} against {before:.4g}. Remedy: a lower learning rate (`optimizer`), "
            "more or fewer epochs, or `litert.convert` of the compressed model with "
            "`representative_data`.",
            stacklevel=3,
        )


def _figures(model: Any, files: tuple[bytes, ...], held_out: list[Any]) -> tuple[str, list[float]]:
    """What files are compared by, and its value for each.

    Accuracy where there are classes. A model that has seen the examples before has learned them by
    heart: its loss on them is lower than on others, and rises with any further training.
    """

    def mean(file: bytes, function: Callable[[Any, Any], float]) -> float:
        runner = Runner(file)
        values = [function(batch, runner.predict(batch[0])) for batch in held_out]
        return float(np.average(values, weights=[_count(batch) for batch in held_out]))

    def loss(batch: Any, outputs: Any) -> float:
        _, structure = _backend.backend_of(model).graph_ends(model)
        outputs = tf.nest.pack_sequence_as(structure, tf.nest.flatten(outputs))
        x, y, outputs, *weights = tf.nest.map_structure(
            tf.convert_to_tensor, (*batch[:2], outputs, *batch[2:])
        )
        return float(model.compute_loss(x, y, outputs, *weights))

    given = model.loss  # an object, a function or a name
    if "crossentropy" in str(getattr(given, "name", getattr(given, "__name__", given))):
        with contextlib.suppress(ValueError):  # no classes, or several outputs
            return "accuracy", [mean(file, lambda b, o: accuracy(b[1], o)) for file in files]
    figures = [mean(file, loss) for file in files]
    model.reset_metrics()
    return "loss", figures


# -- TF-MOT --------------------------------------------------------------------------------------


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
