"""`convert`: from a Keras model to a `.tflite` file that is quantized as asked for, and runs."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from rich.progress import Progress

from keras_alds import _backend
from keras_alds._backend import wrappers
from keras_alds.core.checks import positive_int
from keras_alds.litert import _package
from keras_alds.litert.files import read_file
from keras_alds.litert.quantized import check_quantized, warn_of_thin_groups
from keras_alds.litert.runs import check_runs
from keras_alds.models.data import Examples, check_count
from keras_alds.models.inventory import walk
from keras_alds.models.ranges import equalized

QUANTIZE = (None, "float16", "dynamic", "int8")
#: Runtimes in which a file can be tried, and whether XNNPACK is in them.
RUNTIMES = {"xnnpack": True, "reference": False}
_IO_TYPES = ("float32", "int8", "uint8")
# Examples that go through the model at once.
_BATCH = 32


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
    runtimes: Sequence[str] = ("xnnpack",),
    verbose: int = 1,
) -> bytes:
    """Converts a model to a LiteRT (TensorFlow Lite) file, and returns its bytes.

    Models of both Kerases and of any kind are taken: original, compressed or expanded, Functional,
    Sequential or subclassed, and models of TF-MOT's quantization-aware training. Factorized
    layers become grouped and pointwise operators. The model is not changed; for int8 the channels
    between encoder and decoder are given the same range on the way (see `equalize`).

    Nothing is handed out unseen: the file's tensors are read to see that every convolution and
    dense layer is quantized as asked for, and the file is loaded and run once. A warning names
    the int8 convolutions in groups of fewer than 32 channels, which some processors run slowly.

    Args:
        model: A built `keras.Model` or `tf_keras.Model` whose input sizes are known.
        path: Where to write the file, or None. Defaults to None.
        quantize: String or None. `"float16"`: weights in float16. `"dynamic"`: weights in int8,
            activations in float (tensors of fewer than 1024 values stay in float). `"int8"`:
            weights and activations of every convolution and dense layer in int8; it needs
            `representative_data` unless the model comes from quantization-aware training.
            Defaults to None: float32.
        representative_data: Unlabelled examples for the ranges of int8 activations, some
            hundreds, preprocessed as for training: what `calibration_data` of `select` may be, an
            array, a list or dict of arrays for several inputs, a batched `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a generator or an iterable of batches; labels are ignored.
        max_examples: Integer or None. Use at most so many of them; of arrays evenly spaced ones.
            None for all. Defaults to 256.
        inference_input_type: Type of the file's inputs if it is int8: `"float32"`, `"int8"` or
            `"uint8"`, or the TensorFlow type. Defaults to `"float32"`: the file quantizes.
        inference_output_type: The same for the outputs.
        batch_size: Integer. Examples that one run of the file takes; a file of a fixed size needs
            no operators that compute shapes. Defaults to 1.
        runtimes: Where the file has to run before it is handed out: `"xnnpack"`, the runtime's
            default on CPUs, and `"reference"`, its built-in kernels alone; at least one. Defaults
            to `("xnnpack",)`.
        verbose: 0 for silence, else a progress bar is shown on a terminal, and a line for what
            `"dynamic"` left in float. Defaults to 1.

    Returns:
        The file's bytes. Its signature names inputs and outputs as the model does, and they are
        in the model's order.

    Raises:
        ImportError: If LiteRT is not installed.
        FileNotFoundError: If there is no such folder as `path` lies in.
        ValueError: If an argument is not as above; if TF-MOT's pruning or clustering was not
            stripped; if data are missing, do not fit or hold fewer
            than 8 examples; if the converter does not take the model; if a layer is not
            quantized as asked for; or if the file does not run.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5, max_slices=1)
    keras_alds.litert.convert(
        small, "small.tflite", quantize="int8", representative_data=x, verbose=0
    )
    ```
    """
    content = convert_quietly(
        model,
        path,
        quantize=quantize,
        representative_data=representative_data,
        max_examples=max_examples,
        inference_input_type=inference_input_type,
        inference_output_type=inference_output_type,
        batch_size=batch_size,
        runtimes=runtimes,
        verbose=verbose,
    )
    warn_of_thin_groups(content, stacklevel=3)
    return content


def convert_quietly(
    model: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    quantize: str | None = None,
    representative_data: Any = None,
    max_examples: int | None = 256,
    inference_input_type: Any = "float32",
    inference_output_type: Any = "float32",
    batch_size: int = 1,
    runtimes: Sequence[str] = ("xnnpack",),
    verbose: int = 1,
) -> bytes:
    """`convert` without its warning: for callers that warn of their own caller, or not at all."""
    types = checked_options(
        quantize,
        inference_input_type=inference_input_type,
        inference_output_type=inference_output_type,
        batch_size=batch_size,
        runtimes=runtimes,
    )
    check_folder(path)
    _package.interpreter()  # complains before the work is done
    backend = _backend.backend_of(model)
    wrappers.check_stripped(model, "litert.convert", quantized=True)
    _check_float(model)
    specs = _input_specs(backend, model, batch_size)
    aware = any(wrappers.is_quantized(layer) for _, layer in walk(model))
    _check_data(model, quantize, representative_data, aware)
    with Progress(transient=True, disable=not verbose) as progress:
        examples = None
        if representative_data is not None:
            examples = _Calibration(model, representative_data, max_examples, batch_size, progress)
        task = progress.add_task("conversion", total=3)
        signature = _Signature(backend, model, specs)
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            if examples is not None and not aware:
                # One scale serves all channels between two factors: give them the same range.
                stack.enter_context(equalized(model, examples.batches(specs)))
            signature.save(folder)
            progress.advance(task)
            if examples is not None and signature.loops:
                _check_loops(folder, model)
            converter = tf.lite.TFLiteConverter.from_saved_model(folder)
            _configure(converter, quantize, types)
            if examples is not None:
                converter.representative_dataset = examples.feed(signature.input_names)
            content = _run(converter, model)
        content = signature.in_order(content)
        progress.advance(task)
        left = check_quantized(read_file(content), quantize) if quantize else []
        for runtime in runtimes:
            check_runs(content, delegate=RUNTIMES[runtime])
        progress.advance(task)
        if left and verbose:
            text = f"Left in float32 by the converter: {'; '.join(left)}"
            progress.console.print(text, soft_wrap=True, highlight=False)
    if path is not None:
        Path(path).write_bytes(content)
    return content


# -- Arguments -----------------------------------------------------------------------------------


def checked_options(
    quantize: Any,
    *,
    inference_input_type: Any = "float32",
    inference_output_type: Any = "float32",
    batch_size: Any = 1,
    runtimes: Any = ("xnnpack",),
) -> tuple[tf.DType, tf.DType]:
    """The types of the file's inputs and outputs; options are as for `convert`.

    Raises:
        ValueError: If an option is not as it says.
    """
    if quantize not in QUANTIZE:
        raise ValueError(
            f"Expected `quantize` to be one of {', '.join(map(repr, QUANTIZE))}. "
            f"Received: quantize={quantize!r}"
        )
    positive_int(batch_size, "batch_size")
    if (
        not isinstance(runtimes, (list, tuple, set, frozenset))
        or not runtimes
        or any(runtime not in [*RUNTIMES] for runtime in runtimes)
    ):
        raise ValueError(
            f"Expected `runtimes` to hold some of {', '.join(map(repr, RUNTIMES))}. "
            f"Received: runtimes={runtimes!r}"
        )
    types = []
    for name, value in (
        ("inference_input_type", inference_input_type),
        ("inference_output_type", inference_output_type),
    ):
        try:
            dtype = tf.as_dtype(value)
        except TypeError:
            dtype = None
        if dtype is None or dtype.name not in _IO_TYPES:
            raise ValueError(
                f"Expected `{name}` to be one of {', '.join(map(repr, _IO_TYPES))}. "
                f"Received: {name}={value!r}"
            )
        if dtype != tf.float32 and quantize != "int8":
            raise ValueError(
                f"Expected `{name}` to be 'float32' unless quantize='int8'. "
                f"Received: {name}={dtype.name!r} with quantize={quantize!r}"
            )
        types.append(dtype)
    return types[0], types[1]


def check_folder(path: str | os.PathLike[str] | None) -> None:
    """Raises a FileNotFoundError if there is no such folder as a file is to lie in."""
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
            f"types. Received: '{model.name}' with {', '.join(sorted(policies))}. Remedy: build it "
            'anew under the dtype policy "float32" and copy the weights by `set_weights`.'
        )
    quantized = [
        f"'{path}' ({layer.quantization_mode})"
        for path, layer in walk(model)
        if getattr(layer, "quantization_mode", None)
    ]
    if quantized:
        raise ValueError(
            "Expected a model whose layers compute in float: the TFLite converter takes no layers "
            f"that Keras's `quantize` changed. Received: '{model.name}' with "
            f"{', '.join(quantized)}. Remedy: convert the model as it was before, with `quantize`."
        )


def _input_specs(backend: _backend.Backend, model: Any, batch_size: int) -> Any:
    specs = backend.input_specs(model)
    unknown = [spec.shape for spec in tf.nest.flatten(specs) if None in tuple(spec.shape)[1:]]
    if unknown:
        raise ValueError(
            "Expected a model whose input sizes are known. Received: "
            f"'{model.name}' with inputs of shape {', '.join(map(str, unknown))}. Remedy: make an "
            "input of a fixed shape and call the model on it, `keras.Model(fixed, model(fixed))`."
        )
    return tf.nest.map_structure(
        lambda spec: tf.TensorSpec((batch_size, *spec.shape[1:]), spec.dtype), specs
    )


def _check_data(model: Any, quantize: str | None, data: Any, aware: bool) -> None:
    if aware and quantize != "int8":
        raise ValueError(
            f"Expected quantize='int8' for '{model.name}', a model of quantization-aware training. "
            f"Received: quantize={quantize!r}. For a float file convert the model that it was "
            "made from."
        )
    if quantize == "int8" and data is None and not aware:
        raise ValueError(
            "Expected `representative_data` for quantize='int8': some hundred unlabelled examples, "
            "preprocessed as for training, that show the ranges of the activations. Received: "
            "none. quantize='dynamic' needs no data."
        )
    if quantize != "int8" and data is not None:
        raise ValueError(
            "Expected `representative_data` only with quantize='int8'; nothing else uses them. "
            f"Received: data with quantize={quantize!r}"
        )


# -- Conversion ----------------------------------------------------------------------------------


class _Calibration:
    """Representative data as the converter wants them, with a progress bar."""

    def __init__(
        self, model: Any, data: Any, limit: int | None, batch_size: int, progress: Progress
    ) -> None:
        examples = Examples(model, data, limit, "representative_data")
        names = _backend.backend_of(model).input_names(model)
        task = progress.add_task("representative data", total=examples.total)
        rows: list[list[np.ndarray]] = []
        count = 0
        for inputs, size in examples:
            if isinstance(inputs, dict) and set(inputs) == set(names):
                inputs = [inputs[name] for name in names]
            rows.append([np.asarray(item) for item in tf.nest.flatten(inputs)])
            count += size
            progress.update(task, completed=count)
        check_count(count, "representative_data")
        self._arrays = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
        self._batch, self._progress = batch_size, progress

    def batches(self, specs: Any) -> Iterator[Any]:
        """All examples as the model takes them, some at a time."""
        for start in range(0, len(self._arrays[0]), _BATCH):
            parts = [tf.convert_to_tensor(a[start : start + _BATCH]) for a in self._arrays]
            yield tf.nest.pack_sequence_as(specs, parts)

    def feed(self, names: list[str]) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
        """A function that gives batches by the names of the signature's inputs."""

        def batches() -> Iterator[dict[str, np.ndarray]]:
            size, rows = self._batch, len(self._arrays[0])
            starts = range(0, max(rows - rows % size, 1), size)
            for start in self._progress.track(starts, description="calibration"):
                # A last batch that is too small begins again at the first example.
                chosen = np.arange(start, start + size) % rows
                yield dict(zip(names, (array[chosen] for array in self._arrays), strict=True))

        return batches


class _Signature:
    """A model as a function of named inputs and outputs."""

    def __init__(self, backend: _backend.Backend, model: Any, specs: Any) -> None:
        flat = tf.nest.flatten(specs)
        keys = sorted(specs) if isinstance(specs, dict) else backend.input_names(model)
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

        self._function = tf.function(forward, autograph=False).get_concrete_function(
            **{
                name: tf.TensorSpec(spec.shape, spec.dtype, name=name)
                for name, spec in zip(self.input_names, flat, strict=True)
            }
        )

    @property
    def loops(self) -> bool:
        """Whether there is a loop in the function or in one that it calls."""
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
        tf.saved_model.save(module, folder, signatures={"serving_default": self._function})

    def in_order(self, content: bytes) -> bytes:
        """The file with inputs and outputs in the model's order: the converter shuffles them."""
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
    """Names that a signature may have, as many as there are tensors, each once."""
    if len(names) != count:
        names = [default] if count == 1 else [f"{default}_{n}" for n in range(count)]
    plain = [re.sub(r"\W", "_", name) for name in names]
    return [
        name if plain.count(name) == 1 else f"{name}_{plain[:n].count(name)}"
        for n, name in enumerate(plain)
    ]


def _configure(converter: Any, quantize: str | None, types: tuple[tf.DType, tf.DType]) -> None:
    if quantize is None:
        return
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantize == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantize == "int8":
        converter.inference_input_type, converter.inference_output_type = types


def _check_loops(folder: str, model: Any) -> None:
    """Complains of loops that are in the file: the calibrator of the converter crashes on them."""
    content = _run(tf.lite.TFLiteConverter.from_saved_model(folder), model)
    loops = [step.label for step in read_file(content).operators if step.name == "WHILE"]
    if loops:
        raise ValueError(
            "Expected a model without loops for quantize='int8' with `representative_data`: the "
            f"converter crashes on them. Received: '{model.name}' with {', '.join(loops)}. Remedy: "
            "make recurrent layers with `unroll=True`, or take quantize='dynamic'."
        )


def _run(converter: Any, model: Any) -> bytes:
    with warnings.catch_warnings():
        # The converter itself uses the interpreter that TensorFlow deprecates.
        warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter is deprecated")
        try:
            return bytes(converter.convert())
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            raise ValueError(
                f"Expected a model that the TFLite converter takes. Received: '{model.name}', for "
                f"which it fails ({type(error).__name__}: {reason[:500]})"
            ) from error
