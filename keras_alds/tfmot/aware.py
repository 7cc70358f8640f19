"""Quantization-aware training of a compressed model with TF-MOT, and conversion to int8."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_alds import _backend
from keras_alds._backend.quiet import ignored_warnings
from keras_alds.api import compress as compress_model
from keras_alds.litert import _package
from keras_alds.litert.comparison import accuracy
from keras_alds.litert.conversion import ConvertOptions, check_folder, convert, convert_quietly
from keras_alds.litert.equalization import equalize
from keras_alds.litert.quantized import warn_of_thin_groups
from keras_alds.litert.runs import Runner
from keras_alds.models.data import MIN_EXAMPLES, is_iterator
from keras_alds.models.expansion import expand
from keras_alds.models.inventory import walk
from keras_alds.tfmot.conversion import to_tf_keras
from keras_alds.tfmot.operations import arithmetic_as_layers
from keras_alds.tfmot.package import tfmot_package

# Arguments of the called functions that the user cannot set as options.
_GIVEN = ("self", "model", "x", "y", "path", "quantize")
# Largest number of examples for the comparison of files, and examples per batch.
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
    quantize_fn: Callable[[Any], Any] | None = None,
    fit_fn: Callable[[Any], object] | None = None,
    validation_data: Any = None,
    path: str | os.PathLike[str] | None = None,
    convert_options: Mapping[str, Any] | None = None,
    **fit_options: Any,
) -> tuple[Any, bytes]:
    """Compresses a model, trains it for int8 and converts it; `model` is not changed.

    The steps are: `compress`, with the options `compress`; `expand` to stock layers; `to_tf_keras`
    for a Keras 3 model; `litert.equalize` without data; TF-MOT's `quantize_model`, which folds
    BatchNormalization like the file; `compile` and `fit`; and `litert.convert` with
    `quantize="int8"`, which checks every convolution and dense layer, and warns of slow ones. Each
    step can also be called separately.

    The file is compared with post-training quantization of the same compressed model on held-out
    examples: by accuracy if the loss is a cross-entropy of classes, otherwise by the loss. If it
    is worse, a warning is issued, and the file is still returned.

    Args:
        model: A trained Functional or Sequential model of Keras 3 or tf_keras, compressed or not.
            TF-MOT does not support nested models.
        x: Training data, as for `fit`.
        y: Targets, as for `fit`.
        compress: Options of `keras_alds.compress`, such as `{"cr": 0.5, "max_slices": 1}`.
            Defaults to None: the model is not compressed in this call.
        optimizer: A tf_keras optimizer, or its name. Defaults to a new one with the settings of the
            model's optimizer and a tenth of its current learning rate.
        loss: As for `compile` of tf_keras. Defaults to the model's loss.
        metrics: As for `compile` of tf_keras. Defaults to the model's metrics.
        quantize_fn: Function from the expanded tf_keras model to the model to train, for annotated
            layers or TF-MOT's schemes that preserve sparsity or clusters. Defaults to
            `tensorflow_model_optimization.quantization.keras.quantize_model`.
        fit_fn: Function that trains the compiled model, for custom training loops. Defaults to
            `model.fit(x, y, **fit_options)`.
        validation_data: Examples with targets for the comparison, also passed to Keras's `fit`:
            `(x, y)` or `(x, y, sample_weight)` of arrays, a batched `tf.data.Dataset` or a
            `Sequence`. At most 1000 examples are compared. Defaults to the examples of
            `validation_split`, or else to an evenly spaced tenth of `x` and `y` (at most 1000
            examples), which is held out of the training. The comparison is skipped if `x` are not
            arrays, if there is no `y`, or if the tenth has fewer than 8 examples.
        path: Where to write the file, or None. Defaults to None.
        convert_options: Further options of `litert.convert`, such as
            `{"inference_input_type": "int8"}`. Defaults to none.
        **fit_options: Options of tf_keras's `fit`, such as `epochs=5`, `batch_size`, `callbacks`.

    Returns:
        `(quantized, content)`: the trained tf_keras model, with its `history` if Keras's `fit` was
        used, and the bytes of the int8 file.

    Raises:
        ImportError: If TF-MOT, tf_keras or LiteRT is not installed.
        FileNotFoundError: If the folder of `path` does not exist.
        TypeError: If an option is unknown to its step.
        ValueError: As for the single steps; if TF-MOT does not support the model; if the optimizer
            or a callback belongs to Keras 3; if the model's learning rate is 0 and no optimizer is
            given; or if there is no training data.

    Example:
    ```python
    options = {"cr": 0.5, "max_slices": 1}
    quantized, content = keras_alds.tfmot.quantize_aware_training(
        model, x, y, compress=options, epochs=1, path="small_int8.tflite", verbose=0
    )
    ```
    """
    if fit_fn is None and x is None:
        raise ValueError(
            "Expected training data `x` (and `y`), or a function `fit_fn` that trains. "
            "Received: neither"
        )
    if fit_fn is not None and (x is not None or y is not None or fit_options):
        raise ValueError(
            "Expected either training data or a function `fit_fn`. Received: both, or options of "
            f"Keras's `fit` with a function `fit_fn` ({', '.join(fit_options) or 'x, y'})"
        )
    options = _checked_options(compress, convert_options, optimizer, fit_options)
    check_folder(path)
    tfmot = tfmot_package()
    target = _backend.tf_keras_backend()
    _package.interpreter()
    _check_fit_options(target, fit_options)
    given = model
    if compress is not None:
        with ignored_warnings("Expected `calibration_data` to remove more than"):  # trained next
            model = compress_model(model, **compress)
    model = expand(model)
    if _backend.backend_of(model) is not target:
        model = to_tf_keras(model)
    equalize(model)  # a copy: `expand` made it
    arguments = _compile_arguments(target, given, model, optimizer, loss, metrics)
    x, y, fit_options, validation_data = _hold_out(x, y, fit_options, validation_data)
    held_out = _batches(validation_data)
    after = _after_training(model, held_out, options)
    quantized = _quantized(model, quantize_fn or functools.partial(_quantize_model, tfmot))
    target.use_plain_convolutions([layer for _, layer in walk(quantized)])
    quantized.compile(**arguments)
    if fit_fn is not None:
        fit_fn(quantized)
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
    """Checks all options except those of `fit`, and returns the options of the conversion."""
    for name, value in (("compress", compress), ("convert_options", convert_options)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(
                f"Expected `{name}` to be a dict of options, or None. Received: {name}={value!r}"
            )
    if taken := {"path", "quantize"} & set(convert_options or ()):
        raise ValueError(
            "Expected `convert_options` without `quantize`, which is always int8, and without "
            f"`path`, which is an argument of its own. Received: {', '.join(sorted(taken))}"
        )
    _check_names("compress", compress or {}, compress_model)
    _check_names("convert_options", convert_options or {}, convert)
    if isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "Expected a tf_keras optimizer or its name, as the training runs in tf_keras. "
            f"Received: {type(optimizer).__name__} of Keras 3"
        )
    verbose = fit_options.get("verbose", 1)
    options = {"verbose": 1 if verbose == "auto" else verbose, **(convert_options or {})}
    return ConvertOptions(quantize="int8", **options)


def _check_names(argument: str, options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raises a TypeError early if `function`, which is called later, has no such options."""
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
            "Expected tf_keras callbacks, as the training runs in tf_keras. "
            f"Received: {', '.join(wrong)} of Keras 3"
        )


def _compile_arguments(
    backend: _backend.Backend, given: Any, model: Any, optimizer: Any, loss: Any, metrics: Any
) -> dict[str, Any]:
    """Arguments of `compile` for `model`, the tf_keras version of the user's model `given`."""
    own = {"optimizer": optimizer, "loss": loss, "metrics": metrics}
    own = {name: value for name, value in own.items() if value is not None}
    if backend.is_compiled(model):
        arguments = {**backend.compile_arguments(model), **own}
        if optimizer is None:
            rate = _backend.backend_of(given).learning_rate(given.optimizer)
            if not rate > 0:
                raise ValueError(
                    "Expected the model's learning rate to be above 0, as a tenth of it is the "
                    f"default. Received: {rate:g} of '{given.name}'. Remedy: pass "
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


# -- Comparison with post-training quantization --------------------------------------------------


def _hold_out(
    x: Any, y: Any, options: dict[str, Any], validation_data: Any
) -> tuple[Any, Any, dict[str, Any], Any]:
    """The training data, the options of `fit`, and the examples for the comparison."""
    if x is None:  # the user's own `fit_fn`
        return x, y, options, validation_data
    if validation_data is not None:
        return x, y, {**options, "validation_data": validation_data}, validation_data
    weights = options.get("sample_weight")
    whole = (x, y) if weights is None else (x, y, weights)
    arrays = tf.nest.flatten(whole)
    if not all(isinstance(array, (np.ndarray, tf.Tensor)) for array in arrays):
        return x, y, options, None
    sizes = {np.shape(array)[:1] for array in arrays}
    if len(sizes) != 1 or () in sizes:  # Keras raises an error
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
    if validation_data is None or is_iterator(validation_data):
        return []  # an iterator can be read only once, by `fit`
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
    """The file of post-training quantization; None if nothing is compared."""
    if sum(map(_count, held_out)) < MIN_EXAMPLES:
        return None
    try:
        held_out_only = dataclasses.replace(options, representative_data=held_out, verbose=0)
        return convert_quietly(model, held_out_only)
    except ValueError:  # possibly the reason for quantization-aware training
        return None


def _compare(model: Any, aware: bytes, after: bytes, held_out: list[Any]) -> None:
    """Warns if the file `aware` is worse than the file `after` of post-training quantization."""
    name, (trained, before) = _figures(model, (aware, after), held_out)
    if not (trained >= before if name == "accuracy" else trained <= before):
        warnings.warn(
            "Quantization-aware training made a worse file than post-training quantization: on "
            f"{sum(map(_count, held_out))} held-out examples, its {name} is {trained:.4g} instead "
            f"of {before:.4g}. Remedy: a lower learning rate (`optimizer`), more or fewer epochs, "
            "or `litert.convert` of the compressed model with `representative_data`.",
            stacklevel=3,
        )


def _figures(model: Any, files: tuple[bytes, ...], held_out: list[Any]) -> tuple[str, list[float]]:
    """The name of the compared figure, and its value for each file.

    For classes it is accuracy: the original training may have memorized the examples, and then
    any further training raises the loss on them.
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
    """Advances tf_keras's automatic layer names past those of `model`.

    TF-MOT splits a separable convolution into layers with automatic names, and then finds weights
    by name. tf_keras does not know that a loaded or converted model uses such names.
    """
    layers = backend.keras.layers
    for make in (lambda: layers.Conv2D(1, 1), lambda: layers.DepthwiseConv2D(1)):
        name = re.sub(r"_\d+$", "", make().name)
        found = [re.fullmatch(rf"{name}(?:_(\d+))?", layer.name) for _, layer in walk(model)]
        last = max((int(match[1] or 0) for match in found if match), default=-1)
        while int(make().name.removeprefix(name).lstrip("_") or 0) < last:
            pass


def _quantize_model(tfmot: ModuleType, model: Any) -> Any:
    """TF-MOT's `quantize_model`, which also takes arithmetic between layers.

    TF-MOT does not support `Rescaling` and most merging layers. They get what it gives `Add`: the
    range of their output is learned.
    """
    quantization, layers = tfmot.quantization.keras, _backend.backend_of(model).keras.layers
    registry = quantization.default_8bit.Default8BitQuantizeScheme().get_quantize_registry()
    arithmetic = (
        *(layers.Rescaling, layers.Subtract, layers.Multiply),
        *(layers.Maximum, layers.Minimum),
    )

    def annotate(layer: Any) -> Any:
        if not isinstance(layer, arithmetic) or registry.supports(layer):
            return layer
        config = registry.get_quantize_config(layers.Add())
        return quantization.quantize_annotate_layer(layer, quantize_config=config)

    model = arithmetic_as_layers(model)
    if any(isinstance(layer, arithmetic) for layer in model.layers):
        model = _backend.backend_of(model).keras.models.clone_model(model, clone_function=annotate)
    with quantization.quantize_scope():
        return quantization.quantize_apply(quantization.quantize_annotate_model(model))


def _quantized(model: Any, quantize_fn: Callable[[Any], Any]) -> Any:
    backend = _backend.backend_of(model)
    inner = [path for path, layer in walk(model) if backend.is_model(layer)]
    if inner:
        raise ValueError(
            f"Expected a model without nested models, which TF-MOT cannot quantize. Received: "
            f"'{model.name}' with {', '.join(map(repr, inner))}. Remedy: call their layers in the "
            "outer model, or quantize after training with `litert.convert`."
        )
    _keep_names_apart(backend, model)
    try:
        return quantize_fn(model)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"Expected a model that TF-MOT can quantize. Received: '{model.name}', for which it "
            f"fails ({error}). Remedy: pass `quantize_fn`, a function that annotates the layers to "
            "quantize, or quantize after training with `litert.convert`."
        ) from error
