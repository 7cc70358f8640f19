"""Loads `.tflite` files into the runtime, runs them, and checks that they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_alds.core.checks import did_you_mean
from keras_alds.core.slicing import Array
from keras_alds.litert import _package
from keras_alds.litert.files import File, LiteRTFile, Operator, contents, read_file
from keras_alds.models.data import of_rank
from keras_alds.targets import canonical

#: One array, or one for each input: by name, or in the file's order.
Inputs = Array | Sequence[Array] | Mapping[str, Array]

#: The targets that run on this machine: with XNNPACK, LiteRT's default on CPUs, and without.
LOCAL = ("litert", "litert-reference")


def check_local(target: Any) -> str:
    """Returns the name of `target`, or raises a ValueError if its files cannot run here."""
    name = canonical(target)
    if name not in LOCAL:
        raise ValueError(
            f"Expected target={' or '.join(map(repr, LOCAL))}, which can run on this machine. "
            f"Received: target={target!r}. For the latency of a device, use "
            "`python -m keras_alds latency-files`."
        )
    return str(name)


def check_targets(targets: Any) -> Sequence[str]:
    """Returns the names of `targets`, or raises a ValueError unless they are some of `LOCAL`."""
    several = isinstance(targets, (list, tuple, set, frozenset)) and len(targets) > 0
    names = tuple(map(canonical, targets)) if several else ()
    if not names or any(name not in LOCAL for name in names):
        wrong = next((name for name in names if name not in LOCAL), targets)
        raise ValueError(
            f"Expected `targets` to hold some of {', '.join(map(repr, LOCAL))}. "
            f"Received: targets={targets!r}{did_you_mean(wrong, LOCAL)}"
        )
    return names


class Runner:
    """A file loaded in the LiteRT runtime, with its tensors allocated.

    Args:
        file: Bytes of a `.tflite` file, or its path.
        threads: Number of threads.
        target: `"litert"`: XNNPACK, the default on CPUs, runs the operators it supports.
            `"litert-reference"`: the built-in kernels run all of them.

    Raises:
        ImportError: If LiteRT is not installed.
        RuntimeError: If the runtime cannot load the file.
    """

    def __init__(self, file: File, *, threads: int = 1, target: str = "litert") -> None:
        module = _package.interpreter()
        kinds = module.OpResolverType
        self.interpreter = module.Interpreter(
            model_content=contents(file),
            num_threads=threads,
            experimental_op_resolver_type=(
                kinds.BUILTIN if target == "litert" else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            ),
        )
        self.interpreter.allocate_tensors()
        #: Input and output tensors as the runtime describes them, in the file's order.
        self.inputs: list[dict[str, Any]] = self.interpreter.get_input_details()
        self.outputs: list[dict[str, Any]] = self.interpreter.get_output_details()
        #: Names of both: from the signature if there is one, else from the tensors.
        self.input_names = [detail["name"] for detail in self.inputs]
        self.output_names = [detail["name"] for detail in self.outputs]
        keys = list(self.interpreter.get_signature_list())
        if keys:
            signature = self.interpreter.get_signature_runner(keys[0])
            self.input_names = _signed(self.inputs, signature.get_input_details())
            self.output_names = _signed(self.outputs, signature.get_output_details())

    @property
    def batch(self) -> int:
        """Examples per run."""
        shape = self.inputs[0]["shape"]
        return int(shape[0]) if len(shape) else 1

    def invoke(self) -> None:
        """Runs the file once on the inputs that were set."""
        self.interpreter.invoke()

    def set_inputs(self, arrays: Sequence[Array]) -> None:
        """Sets the inputs, and quantizes those that the file expects quantized.

        Integers of the file's own type are taken as quantized already. All else are values:
        pixels of 0 to 255 in uint8, for a file with int8 inputs, are quantized as floats are.
        """
        for detail, array in zip(self.inputs, arrays, strict=True):
            self.interpreter.set_tensor(detail["index"], _quantized(array, detail))

    def set_random_inputs(self) -> None:
        """Sets the inputs to seeded noise; int8 and uint8 inputs span their whole range."""
        rng = np.random.default_rng(0)
        for detail in self.inputs:
            shape, dtype = tuple(detail["shape"]), np.dtype(detail["dtype"])
            values: Array
            if dtype.kind == "f":
                values = rng.standard_normal(shape)
            elif dtype == np.int8 or dtype == np.uint8:
                limits = np.iinfo(dtype)
                values = rng.integers(limits.min, limits.max, shape, endpoint=True)
            else:
                values = np.zeros(shape)  # indices: 0 is always valid
            self.interpreter.set_tensor(detail["index"], np.asarray(values, dtype))

    def get_outputs(self) -> list[Array]:
        """The outputs of the last run, dequantized to float."""
        return [
            _dequantized(self.interpreter.get_tensor(detail["index"]), detail)
            for detail in self.outputs
        ]

    def predict(self, x: Inputs) -> Array | list[Array]:
        """Returns outputs for any number of examples, in as many runs as needed.

        Raises:
            ValueError: If `x` holds no examples or does not fit the file's inputs.
        """
        parts = []
        for arrays, count in self._batches(x):
            self.set_inputs(arrays)
            self.interpreter.reset_all_variables()  # the state of a fused LSTM
            self.invoke()
            parts.append([output[:count] for output in self.get_outputs()])
        joined = [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]
        return joined[0] if len(joined) == 1 else joined

    def _batches(self, x: Inputs) -> Iterator[tuple[list[Array], int]]:
        arrays = self.ordered(x)
        rows = len(arrays[0])
        for start in range(0, rows, self.batch):
            parts = [array[start : start + self.batch] for array in arrays]
            count = len(parts[0])
            if count < self.batch:
                parts = [np.concatenate([p, p[[-1] * (self.batch - count)]]) for p in parts]
            yield parts, count

    def ordered(self, x: Inputs) -> list[Array]:
        """The arrays of `x` in the file's order, checked.

        Raises:
            ValueError: If they are empty or do not fit the file's inputs.
        """
        sizes = [tuple(map(int, detail["shape"])) for detail in self.inputs]
        if isinstance(x, Mapping):
            if set(x) != set(self.input_names):
                raise ValueError(
                    f"Expected data for the file's inputs {self.input_names}. "
                    f"Received: data for {sorted(x)}"
                )
            arrays = [np.asarray(x[name]) for name in self.input_names]
        elif isinstance(x, (list, tuple)) and (len(sizes) > 1 or _is_batch(x, sizes[0])):
            arrays = [np.asarray(item) for item in x]
        else:
            arrays = [np.asarray(x)]
        if len(arrays) == len(sizes):  # as the model does from which the file comes
            arrays = [of_rank(array, size) for array, size in zip(arrays, sizes, strict=True)]
        shapes = [size[1:] for size in sizes]
        given = [array.shape for array in arrays]
        rows = {shape[:1] for shape in given}
        if [shape[1:] for shape in given] != shapes or len(rows) != 1 or () in rows:
            raise ValueError(
                f"Expected data of shape (examples, …) with … = {', '.join(map(str, shapes))} for "
                f"the file's inputs. Received: shapes {', '.join(map(str, given))}"
            )
        if rows == {(0,)}:
            raise ValueError(
                "Expected at least one example for the file's inputs. "
                f"Received: shapes {', '.join(map(str, given))}"
            )
        return arrays


def check_file(file: File, *, targets: Sequence[str] = LOCAL) -> None:
    """Raises an error unless a file runs: checks its scales, then runs it once on noise.

    XNNPACK refuses a whole file if a single channel of one int8 convolution or dense layer has a
    requantization scale s_input · s_weights / s_output of 256 or more. Its only message is
    "failed to create XNNPACK runtime"; this function names layer, channel, scale and remedy.

    Args:
        file: Bytes of a `.tflite` file, or its path.
        targets: What it must run on: `"litert"` (with XNNPACK, the default on CPUs),
            `"litert-reference"` (the built-in kernels alone), or both. Defaults to both.

    Raises:
        ImportError: If LiteRT is not installed.
        ValueError: If the file does not run.

    Example:
    ```python
    content = keras_alds.litert.convert(model, verbose=0)
    keras_alds.litert.check_file(content)
    ```
    """
    content = contents(file)
    for target in check_targets(targets):
        if target == "litert":
            check_scales(read_file(content))
        try:
            runner = Runner(content, target=target)
            runner.set_random_inputs()
            runner.invoke()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                "Expected a file that the LiteRT runtime runs. Received: one that fails "
                f"{'with' if target == 'litert' else 'without'} XNNPACK ({error})"
            ) from error


def requantization_scales(operator: Operator) -> Array | None:
    """The factors on an int8 convolution's or dense layer's sums, one per output channel.

    Args:
        operator: An operator of `LiteRTFile.operators`.

    Returns:
        The scales s_input · s_weights / s_output, in float32 as XNNPACK computes them; None for
        an operator that is not fully quantized.
    """
    tensors = (operator.data, operator.weights, operator.outputs[0] if operator.outputs else None)
    if not operator.weighted or any(t is None or not t.quantized for t in tensors):
        return None
    data, weights, output = (
        np.asarray(tensor.scales, np.float32) for tensor in tensors if tensor is not None
    )
    with np.errstate(divide="ignore", over="ignore"):
        return data[0] * weights / output[0]


def check_scales(file: LiteRTFile) -> None:
    """Raises an error if XNNPACK would refuse the file because of a requantization scale.

    Raises:
        ValueError: If a channel of an int8 layer has a scale of 256 or more (255 for a product with
            constant batches).
    """
    wrong = []
    for operator in file.weighted:
        scales = requantization_scales(operator)
        if scales is None:
            continue
        # Batched products allow 255, and XNNPACK only checks them if the weights are constant.
        limit = (
            256.0 if operator.name != "BATCH_MATMUL" else float(np.nextafter(np.float32(255), 256))
        )
        channel = int(scales.argmax())
        if scales[channel] >= limit:
            wrong.append(_described(operator, channel, float(scales[channel])))
    if wrong:
        raise ValueError(
            "Expected requantization scales s_input·s_weights/s_output below 256 in every channel "
            'of an int8 layer: XNNPACK refuses the whole file otherwise ("failed to create '
            f'XNNPACK runtime"). Received: {"; ".join(wrong)}. Either the weights are huge, for '
            "inputs in a range that another channel determines: `keras_alds.litert.convert` with "
            "`representative_data` equalizes the ranks of a compressed model, and "
            "`keras_alds.litert.equalize` does so before quantization-aware training. Or the "
            "layer's output is almost always 0 on the data (dead units): use data that activate "
            "it, or train it again."
        )


def _described(operator: Operator, channel: int, scale: float) -> str:
    data, weights, output = operator.data, operator.weights, operator.outputs[0]
    assert data is not None  # `requantization_scales` checked it
    assert weights is not None
    kernel = weights.scales[channel if len(weights.scales) > 1 else 0]
    return (
        f"{operator.name} with weights '{weights.name}', channel {channel}: "
        f"{data.scales[0]:.3g} · {kernel:.3g} / {output.scales[0]:.3g} = {scale:.4g}"
    )


def _is_batch(x: Sequence[Array], size: tuple[int, ...]) -> bool:
    """Whether a list for a file of one input holds a batch, not examples."""
    if len(x) != 1:
        return False
    array = np.asarray(x[0])
    return array.ndim == len(size) or of_rank(array, size).shape[1:] == size[1:]


def _signed(details: list[dict[str, Any]], signature: dict[str, dict[str, Any]]) -> list[str]:
    names = {detail["index"]: name for name, detail in signature.items()}
    return [names.get(detail["index"], detail["name"]) for detail in details]


def _quantized(array: Array, detail: dict[str, Any]) -> Array:
    dtype = np.dtype(detail["dtype"])
    scale, zero_point = detail["quantization"]
    if dtype.kind in "iu" and scale and array.dtype != dtype:
        limits = np.iinfo(dtype)
        array = np.clip(np.round(array / scale) + zero_point, limits.min, limits.max)
    return np.ascontiguousarray(array, dtype)


def _dequantized(array: Array, detail: dict[str, Any]) -> Array:
    scale, zero_point = detail["quantization"]
    if array.dtype.kind in "iu" and scale:
        return ((array.astype(np.float32) - zero_point) * scale).astype(np.float32)
    return array
