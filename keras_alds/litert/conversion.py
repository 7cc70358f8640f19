"""`convert`: turns a Keras model into a `.tflite` file, checks its quantization and runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from rich.progress import Progress

from keras_alds import _backend
from keras_alds._backend import tensors, wrappers
from keras_alds._backend.live import live_tables
from keras_alds._backend.quiet import ignored_warnings
from keras_alds.core.checks import did_you_mean, positive_int
from keras_alds.litert import _package
from keras_alds.litert.files import FileBytes, read_file
from keras_alds.litert.quantized import check_quantized, warn_of_thin_groups
from keras_alds.litert.runs import check_file, check_targets
from keras_alds.models.data import KeptExamples, with_progress
from keras_alds.models.inventory import walk
from keras_alds.models.merging import merged
from keras_alds.models.ranges import equalized
from keras_alds.models.scale import check_scale
from keras_alds.progress import progress_bar

#: The number formats of files, and the types of their inputs and outputs.
_FORMATS = (None, "float16", "dynamic", "int8")
_IO_TYPES = ("float32", "int8", "uint8")


def convert(
    model: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    quantize: str | None = None,
    representative_data: Any = None,
    max_examples: int | None = 256,
    inference_input_type: Any = "float32",
    inference_output_type: Any = "float32",
    batch_size: int = 1,
    targets: Sequence[str] = ("litert",),
    verbose: int = 1,
) -> bytes:
    """Converts a model to a LiteRT (TensorFlow Lite) file, and returns its bytes.

    It takes any model of Keras 3 or tf_keras: original, compressed or expanded; Functional,
    Sequential or subclassed; and models from TF-MOT's quantization-aware training.
    Factorized layers become grouped and pointwise operators. The model does not change. For int8,
    the conversion equalizes the channels between encoder and decoder (see `equalize`), and
    BatchNormalization behind an activation is merged with the layers around it.

    Every file is checked: every convolution and dense layer must be quantized as requested, and
    the file is loaded and run once. A warning names the int8 convolutions in groups of fewer than
    32 channels, which some processors run slowly.

    Args:
        model: A built `keras.Model` or `tf_keras.Model` whose input sizes are known.
        path: Where to write the file, or None. Defaults to None.
        quantize: String or None. `"float16"`: weights in float16. `"dynamic"`: weights in int8,
            activations in float (tensors of fewer than 1024 values stay in float). `"int8"`:
            weights and activations of every convolution and dense layer in int8; needs
            `representative_data` unless the model comes from quantization-aware training.
            Defaults to None: float32.
        representative_data: A few hundred unlabelled examples that set the ranges of int8
            activations, preprocessed as for training. Accepts the same types as
            `calibration_data` of `select`: an array, a list or dict of arrays for several inputs,
            a batched `tf.data.Dataset`, a `keras.utils.PyDataset`, an iterable of batches,
            or a function that returns one of these, such as the generator function that TFLite's
            converter takes. Labels are ignored.
        max_examples: Integer of at least 8, or None for all. Largest number of examples to use;
            arrays are sampled at even spacing. Defaults to 256.
        inference_input_type: Type of an int8 file's inputs: `"float32"`, `"int8"`, `"uint8"`, or
            the TensorFlow type. Defaults to `"float32"`: the file quantizes its inputs.
        inference_output_type: The same for the outputs.
        batch_size: Integer. Examples per run of the file. A fixed batch size avoids operators
            that compute shapes. Defaults to 1.
        targets: Where the file is run once to check it: `"litert"` (with XNNPACK, the default on
            CPUs), `"litert-reference"` (the built-in kernels alone), or both. Defaults to
            `("litert",)`.
        verbose: 0 for silence, else shows a progress bar on a terminal, and a line for what
            `"dynamic"` left in float. Defaults to 1.

    Returns:
        The file's bytes. Their repr shows only the length. The file's inputs and outputs have the
        model's names and order.

    Raises:
        ImportError: If LiteRT is not installed.
        FileNotFoundError: If the folder of `path` does not exist.
        ValueError: If an argument is not as above; if TF-MOT's pruning or clustering was not
            stripped; if data are missing, do not fit or hold fewer than 8 examples; if the
            converter rejects the model; if a layer is not quantized as requested; or if the file
            does not run.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5, max_slices=1)
    keras_alds.litert.convert(
        small, "small.tflite", quantize="int8", representative_data=x, verbose=0
    )
    ```
    """
    options = ConvertOptions(
        quantize=quantize,
        representative_data=representative_data,
        max_examples=max_examples,
        inference_input_type=inference_input_type,
        inference_output_type=inference_output_type,
        batch_size=batch_size,
        targets=targets,
        verbose=verbose,
    )
    content = convert_quietly(model, options, path, stacklevel=3)
    warn_of_thin_groups(content, stacklevel=3)
    return content


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """The options of `convert`.

    Raises:
        ValueError: If an option is not as `convert` describes.
    """

    quantize: str | None = None
    representative_data: Any = None
    max_examples: int | None = 256
    inference_input_type: Any = "float32"
    inference_output_type: Any = "float32"
    batch_size: int = 1
    targets: Sequence[str] = ("litert",)
    verbose: int = 1

    def __post_init__(self) -> None:
        if self.quantize not in _FORMATS:
            raise ValueError(
                f"Expected `quantize` to be one of {', '.join(map(repr, _FORMATS))}. "
                f"Received: quantize={self.quantize!r}{did_you_mean(self.quantize, _FORMATS)}"
            )
        positive_int(self.batch_size, "batch_size")
        check_targets(self.targets)
        _ = self.types  # raises if they are invalid

    @property
    def types(self) -> tuple[tf.DType, tf.DType]:
        """The types of the file's inputs and outputs."""
        return self._type("inference_input_type"), self._type("inference_output_type")

    def _type(self, name: str) -> tf.DType:
        value = getattr(self, name)
        try:
            dtype = tf.as_dtype(value)
        except TypeError:
            dtype = None
        if dtype is None or dtype.name not in _IO_TYPES:
            raise ValueError(
                f"Expected `{name}` to be one of {', '.join(map(repr, _IO_TYPES))}. "
                f"Received: {name}={value!r}"
            )
        if dtype != tf.float32 and self.quantize != "int8":
            raise ValueError(
                f"Expected `{name}` to be 'float32' unless quantize='int8'. "
                f"Received: {name}={dtype.name!r} with quantize={self.quantize!r}"
            )
        return dtype


def convert_quietly(
    model: Any,
    options: ConvertOptions,
    path: str | os.PathLike[str] | None = None,
    *,
    stacklevel: int | None = None,
) -> bytes:
    """`convert` without its warning, for callers that warn at another stack level or not at all.

    `stacklevel` is for the warning of data of another scale; None for no such warning.
    """
    check_folder(path)
    _package.interpreter()  # fails before the work starts
    wrappers.check_stripped(model, "litert.convert", quantized=True)
    _check_float(model)
    specs = _input_specs(model, options.batch_size)
    aware = any(wrappers.is_quantized(layer) for _, layer in walk(model))
    _check_data(model, options, aware)
    with progress_bar(options.verbose) as progress:
        task = progress.add_task("conversion", total=2)
        data, examples = options.representative_data, None
        if data is not None:
            # The file has all inputs, in fixed sizes.
            examples = KeptExamples(
                model, data, options.max_examples, "representative_data", exact=True
            )
            if stacklevel is not None and not aware:
                check_scale(model, examples, stacklevel=stacklevel)
        content = FileBytes(_converted(model, specs, options, examples, aware, progress))
        progress.advance(task)
        left = check_quantized(read_file(content), options.quantize) if options.quantize else []
        check_file(content, targets=options.targets)
        progress.advance(task)
        if left and options.verbose:
            text = f"Left in float32 by the converter: {'; '.join(left)}"
            progress.console.print(text, soft_wrap=True, highlight=False)
    if path is not None:
        Path(path).write_bytes(content)
    return content


# -- Checks --------------------------------------------------------------------------------------


def check_folder(path: str | os.PathLike[str] | None) -> None:
    """Raises a FileNotFoundError if the folder of `path` does not exist."""
    folder = "" if path is None else os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        raise FileNotFoundError(
            f"Expected `path` to lie in a folder that exists. Received: path={str(path)!r}"
        )


def _check_float(model: Any) -> None:
    policies = {
        f"'{path}' ({layer.compute_dtype})"
        for path, layer in walk(model)
        if getattr(layer, "compute_dtype", None) in ("float16", "bfloat16", "float64")
    }
    if policies:
        raise ValueError(
            "Expected a model that computes in float32: the runtime has no operators for other "
            f"types. Received: '{model.name}' with {', '.join(sorted(policies))}. Create it "
            'again under the dtype policy "float32" and copy the weights with `set_weights`.'
        )
    quantized = [
        f"'{path}' ({layer.quantization_mode})"
        for path, layer in walk(model)
        if getattr(layer, "quantization_mode", None)
    ]
    if quantized:
        raise ValueError(
            "Expected a model whose layers compute in float: the TFLite converter rejects layers "
            f"that Keras's `quantize` changed. Received: '{model.name}' with "
            f"{', '.join(quantized)}. Remedy: convert the original model, with `quantize`."
        )


def _input_specs(model: Any, batch_size: int) -> Any:
    specs = _backend.backend_of(model).input_specs(model)
    unknown = [spec.shape for spec in tf.nest.flatten(specs) if None in tuple(spec.shape)[1:]]
    if unknown:
        raise ValueError(
            "Expected a model whose input sizes are known. Received: "
            f"'{model.name}' with inputs of shape {', '.join(map(str, unknown))}. Remedy: call "
            "the model on an input of a fixed shape, `keras.Model(fixed, model(fixed))`."
        )
    return tf.nest.map_structure(
        lambda spec: tf.TensorSpec((batch_size, *spec.shape[1:]), spec.dtype), specs
    )


def _check_data(model: Any, options: ConvertOptions, aware: bool) -> None:
    quantize, data = options.quantize, options.representative_data
    if aware and quantize != "int8":
        raise ValueError(
            f"Expected quantize='int8' for '{model.name}', a model of quantization-aware training. "
            f"Received: quantize={quantize!r}. For a float file convert the model that it was "
            "made from."
        )
    if quantize == "int8" and data is None and not aware:
        raise ValueError(
            "Expected `representative_data` for quantize='int8': a few hundred unlabelled "
            "examples, preprocessed as for training, that show the ranges of the activations. "
            "Received: none. quantize='dynamic' needs no data."
        )
    if quantize != "int8" and data is not None:
        raise ValueError(
            "Expected `representative_data` only with quantize='int8'; nothing else uses them. "
            f"Received: data with quantize={quantize!r}"
        )


# -- Conversion ----------------------------------------------------------------------------------


def _converted(
    model: Any,
    specs: Any,
    options: ConvertOptions,
    examples: KeptExamples | None,
    aware: bool,
    progress: Progress,
) -> bytes:
    """The converted model."""
    signature = _Signature(model, specs)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if examples is not None and not aware:
            stack.enter_context(merged(model))
            # All channels between two factors share one scale: give them the same range.
            batches = with_progress(examples, progress, "equalization")
            stack.enter_context(equalized(model, (inputs for inputs, _ in batches)))
        signature.save(folder)
        if examples is not None and signature.loops:
            _check_loops(folder, model)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if options.quantize is not None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if options.quantize == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if options.quantize == "int8":
            converter.inference_input_type, converter.inference_output_type = options.types
        if examples is not None:
            converter.representative_dataset = functools.partial(
                signature.feed, examples, options.batch_size, progress
            )
        return signature.in_order(_run(converter, model))


class _Signature:
    """A model as a function of named inputs and outputs."""

    def __init__(self, model: Any, specs: Any) -> None:
        flat = tf.nest.flatten(specs)
        self._layers = _backend.backend_of(model).input_names(model)
        keys = sorted(specs) if isinstance(specs, dict) else self._layers
        self.input_names = _names(keys, "input", len(flat))
        self.output_names: list[str] = []

        def forward(**arguments: Any) -> dict[str, Any]:
            ordered = [arguments[name] for name in self.input_names]
            outputs = model(tf.nest.pack_sequence_as(specs, ordered), training=False)
            found = tf.nest.flatten(outputs)
            known = sorted(outputs) if isinstance(outputs, dict) else None
            names = known or getattr(model, "output_names", None) or []
            self.output_names = _names(names, "output", len(found))
            return dict(zip(self.output_names, found, strict=True))

        with tensors.for_cpu():
            self._function = tf.function(forward, autograph=False).get_concrete_function(
                **{
                    name: tf.TensorSpec(spec.shape, spec.dtype, name=name)
                    for name, spec in zip(self.input_names, flat, strict=True)
                }
            )

    @property
    def loops(self) -> bool:
        """Whether the function, or one that it calls, has a loop."""
        graph = self._function.graph.as_graph_def()
        nodes = [
            *graph.node,
            *(n for function in graph.library.function for n in function.node_def),
        ]
        return any(node.op in ("While", "StatelessWhile") for node in nodes)

    def save(self, folder: str) -> None:
        """Writes a SavedModel."""
        module = tf.Module()
        module.weights = list(self._function.variables)
        module.forward = self._function
        module.tables = live_tables(self._function)

        def own(record: logging.LogRecord) -> bool:
            return "Assets written" not in record.getMessage()  # notebooks show it

        logger = tf.get_logger()
        logger.addFilter(own)
        try:
            tf.saved_model.save(module, folder, signatures={"serving_default": self._function})
        finally:
            logger.removeFilter(own)

    def feed(
        self, examples: KeptExamples, size: int, progress: Progress
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the examples by input name, in batches of one run."""
        rows = (
            [np.asarray(tensors.dense(tensor))[i] for tensor in self._flat(inputs)]
            for _ in itertools.count()  # starts over if a run needs more than there are
            for inputs, count in examples
            for i in range(count)
        )
        runs = range(max(examples.total // size, 1))
        for _ in progress.track(runs, description="calibration"):
            batch = zip(*itertools.islice(rows, size), strict=True)
            yield dict(zip(self.input_names, map(np.stack, batch), strict=True))

    def _flat(self, inputs: Any) -> list[Any]:
        if isinstance(inputs, dict) and set(inputs) == set(self._layers):
            return [inputs[name] for name in self._layers]
        return tf.nest.flatten(inputs)

    def in_order(self, content: bytes) -> bytes:
        """The file with inputs and outputs in the model's order; the converter shuffles them."""
        schema = _package.schema()
        changed = bytearray(content)
        model = schema.Model.GetRootAs(changed, 0)
        signature = schema.ModelT.InitFromObj(model).signatureDefs[0]
        graph = model.Subgraphs(0)
        ends = (
            (graph.InputsAsNumpy(), signature.inputs, self.input_names),
            (graph.OutputsAsNumpy(), signature.outputs, self.output_names),
        )
        for found, entries, names in ends:
            index = {entry.name.decode(): int(entry.tensorIndex) for entry in entries}
            wanted = [index[name] for name in names if name in index]
            if sorted(wanted) == sorted(map(int, found)):  # not if an output is given twice
                found[:] = wanted  # a view of `changed`
        return bytes(changed)


def _names(names: Sequence[str], default: str, count: int) -> list[str]:
    """Valid, unique signature names, one for each tensor."""
    if len(names) != count:
        names = [default] if count == 1 else [f"{default}_{n}" for n in range(count)]
    return numbered([re.sub(r"\W", "_", name) for name in names])


def numbered(names: Sequence[str]) -> list[str]:
    """Names, with numbers behind those that are there several times.

    >>> numbered(["dense", "dense", "dense_1"])
    ['dense_0', 'dense_2', 'dense_1']
    """
    used = {name for name in names if names.count(name) == 1}
    found = []
    for name in names:
        if names.count(name) > 1:
            name = next(free for n in itertools.count() if (free := f"{name}_{n}") not in used)
            used.add(name)
        found.append(name)
    return found


def _check_loops(folder: str, model: Any) -> None:
    """Raises an error if the file has loops, which crash the converter's calibrator."""
    content = _run(tf.lite.TFLiteConverter.from_saved_model(folder), model)
    loops = [step.label for step in read_file(content).operators if step.name == "WHILE"]
    if loops:
        raise ValueError(
            "Expected a model without loops for quantize='int8' with `representative_data`: the "
            f"converter crashes on them. Received: '{model.name}' with {', '.join(loops)}. Remedy: "
            "create recurrent layers with `unroll=True`, or use quantize='dynamic'."
        )


def _run(converter: Any, model: Any) -> bytes:
    # The converter itself uses the interpreter that TensorFlow deprecates.
    with ignored_warnings(r"\s*Warning: tf.lite.Interpreter is deprecated"):
        try:
            return bytes(converter.convert())
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            raise ValueError(
                f"Expected a model that the TFLite converter accepts. Received: '{model.name}', "
                f"for which it fails ({type(error).__name__}: {reason[:500]})"
            ) from error
