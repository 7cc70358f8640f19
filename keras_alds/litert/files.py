"""Reads `.tflite` files: operators and tensors as plain records."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from keras_alds.litert import _package

#: A file's bytes, or its path.
File = bytes | str | os.PathLike[str]


class FileBytes(bytes):
    """The bytes of a `.tflite` file, which print as their number.

    A copy, also in a pickle, is of plain `bytes`.
    """

    def __repr__(self) -> str:
        return f"<{len(self):,} bytes of a .tflite file>"

    __str__ = __repr__

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        return bytes, (bytes(self),)


# Operators whose second input is a kernel.
_WEIGHTED = frozenset(
    {
        "BATCH_MATMUL",
        "CONV_2D",
        "CONV_3D",
        "CONV_3D_TRANSPOSE",
        "DEPTHWISE_CONV_2D",
        "FULLY_CONNECTED",
        "TRANSPOSE_CONV",
    }
)
# Those whose first input is the shape of the output.
_TRANSPOSED = ("TRANSPOSE_CONV", "CONV_3D_TRANSPOSE")


@dataclasses.dataclass(frozen=True, repr=False)
class Tensor:
    """A tensor of a file, as `read_file` finds it.

    Attributes:
        index: Its number in its subgraph.
        subgraph: The subgraph's number; 0 is the model, others are bodies of loops and branches.
        name: The converter's name: the joined names of the Keras layers it came from.
        shape: Its shape.
        dtype: Its NumPy type name, such as `"float32"` or `"int8"`; can also be `"int4"`.
        scales: Quantization scales: none, one, or one for each entry along `axis`.
        zero_points: Zero points, as many as scales.
        axis: The axis of per-channel scales, or None.
        size: Bytes it takes in the file; 0 unless its values are constant.
        buffer: Number of the buffer with its values; equal constants share one.
    """

    index: int
    subgraph: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int | None
    size: int
    buffer: int

    def __repr__(self) -> str:
        return f"<Tensor {self.name!r}: {self.dtype} {self.shape}>"

    @property
    def constant(self) -> bool:
        """Whether its values are in the file: weights, biases, shapes."""
        return self.size > 0

    @property
    def quantized(self) -> bool:
        """Whether it has quantization scales."""
        return bool(self.scales)


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator of a file, as `read_file` finds it.

    Attributes:
        index: Its number in its subgraph, which is the order of execution.
        subgraph: The subgraph's number.
        name: Name of the built-in operator, such as `"CONV_2D"`, or of the custom one.
        version: The operator's version.
        inputs: Its input tensors; None for an absent optional one.
        outputs: Its output tensors.
        options: Its options as the schema names them, such as `strideH` and `padding`.
    """

    index: int
    subgraph: int
    name: str
    version: int
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    options: Mapping[str, Any]

    @property
    def weighted(self) -> bool:
        """Whether it is a convolution or a matrix product with weights."""
        return self.name in _WEIGHTED and self.weights is not None

    @property
    def data(self) -> Tensor | None:
        """The input of a convolution or dense layer, or None for another operator."""
        place = 2 if self.name in _TRANSPOSED else 0
        return self.inputs[place] if self.name in _WEIGHTED else None

    @property
    def weights(self) -> Tensor | None:
        """The kernel of a convolution or dense layer, or None for another operator."""
        return self.inputs[1] if self.name in _WEIGHTED and len(self.inputs) > 1 else None

    @property
    def bias(self) -> Tensor | None:
        """The bias of a convolution or dense layer, or None."""
        place = 3 if self.name in _TRANSPOSED else 2
        return self.inputs[place] if self.name in _WEIGHTED and len(self.inputs) > place else None

    @property
    def groups(self) -> int | None:
        """Number of channel groups of a convolution, or None for another operator."""
        if self.data is None or self.weights is None or "CONV" not in self.name:
            return None
        if self.name == "DEPTHWISE_CONV_2D":
            return self.data.shape[-1]
        channels = self.weights.shape[3 if self.name == "CONV_3D" else -1]
        return self.data.shape[-1] // channels

    @property
    def strides(self) -> tuple[int, int] | None:
        """Strides along height and width, or None for an operator without strides."""
        if "strideH" not in self.options:
            return None
        return int(self.options["strideH"]), int(self.options["strideW"])

    @property
    def macs(self) -> int:
        """Multiply–accumulates of one run of a convolution or dense layer; 0 for others."""
        if not self.weighted or self.data is None or self.weights is None:
            return 0
        places = math.prod((self.data if self.name in _TRANSPOSED else self.outputs[0]).shape)
        weights = math.prod(self.weights.shape)
        if self.name == "BATCH_MATMUL":
            return places * self.data.shape[-2 if self.options.get("adjX") else -1]
        # Each entry of the output takes the weights of its filter; if transposed, each entry of
        # the input takes those of its channel.
        axis = 0 if self.name in ("CONV_2D", "FULLY_CONNECTED") else -1
        return places * weights // self.weights.shape[axis]

    @property
    def depth_multiplier(self) -> int | None:
        """Outputs per channel of a depthwise convolution, or None for another operator."""
        if self.name != "DEPTHWISE_CONV_2D" or self.data is None:
            return None
        return self.outputs[0].shape[-1] // self.data.shape[-1]

    @property
    def label(self) -> str:
        """How messages refer to it: its name and that of its output."""
        return f"{self.name} '{self.outputs[0].name if self.outputs else self.index}'"


@dataclasses.dataclass(frozen=True, repr=False)
class LiteRTFile:
    """The content of a `.tflite` file; made by `keras_alds.litert.read_file`.

    Attributes:
        size: Bytes of the file.
        operators: All operators in order of execution, those of the main model first.
        tensors: All tensors.
        inputs: The model's inputs.
        outputs: The model's outputs.
        metadata: Size of every metadata entry in bytes, by name.
        buffers: The raw bytes of every buffer; None for an empty one.
    """

    size: int
    operators: tuple[Operator, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    metadata: Mapping[str, int]
    buffers: tuple[np.ndarray | None, ...] = dataclasses.field(compare=False)

    def __repr__(self) -> str:
        return (
            f"<LiteRTFile: {self.size:,} bytes, {len(self.operators)} operators, "
            f"{len(self.tensors)} tensors, {self.parameters:,} parameters>"
        )

    @property
    def weighted(self) -> tuple[Operator, ...]:
        """The convolutions and matrix products with weights."""
        return tuple(operator for operator in self.operators if operator.weighted)

    @property
    def parameters(self) -> int:
        """Number of constant floating-point and quantized values, without scales."""
        return sum(
            int(np.prod(tensor.shape, dtype=np.int64))
            for tensor in {(t.subgraph, t.buffer): t for t in self.tensors if t.constant}.values()
            if tensor.quantized or tensor.dtype.startswith(("float", "bfloat"))
        )

    @property
    def macs(self) -> int | None:
        """Multiply–accumulates of weights for one example; None for a file with loops."""
        if any(operator.subgraph or "LSTM" in operator.name for operator in self.operators):
            return None
        batch = self.inputs[0].shape[0] if self.inputs and self.inputs[0].shape else 1
        found = (op for op in self.weighted if op.weights and self._is_known(op.weights))
        return sum(operator.macs for operator in found) // max(batch, 1)

    def values(self, tensor: Tensor) -> np.ndarray:
        """The stored values of a constant tensor; quantized ones are not scaled.

        Raises:
            ValueError: If the tensor is not constant, or NumPy lacks its type.
        """
        found = self.buffers[tensor.buffer] if tensor.constant else None
        if found is None:
            raise ValueError(
                f"Expected a constant tensor. Received: '{tensor.name}', which is computed"
            )
        try:
            dtype = np.dtype(tensor.dtype)
        except TypeError:
            raise ValueError(
                "Expected a tensor of a type that NumPy has. "
                f"Received: '{tensor.name}' with dtype={tensor.dtype!r}"
            ) from None
        return np.frombuffer(found.tobytes(), dtype).reshape(tensor.shape)

    def producer(self, tensor: Tensor) -> Operator | None:
        """The operator that computes `tensor`, or None for an input or a constant."""
        return self._producers.get((tensor.subgraph, tensor.index))

    @functools.cached_property
    def _producers(self) -> dict[tuple[int, int], Operator]:
        return {
            (output.subgraph, output.index): operator
            for operator in self.operators
            for output in operator.outputs
        }

    def is_constant(self, operator: Operator) -> bool:
        """Whether an operator computes only constants, such as float32 from float16 weights."""
        inputs = [tensor for tensor in operator.inputs if tensor is not None]
        return bool(inputs) and all(map(self._is_known, inputs))

    def _is_known(self, tensor: Tensor) -> bool:
        producer = self.producer(tensor)
        return tensor.constant or (producer is not None and self.is_constant(producer))

    def stored(self, tensor: Tensor) -> Tensor:
        """The stored tensor behind `tensor`: the input of its DEQUANTIZE, or `tensor` itself.

        float16 weights are stored as float16 and read through a DEQUANTIZE.
        """
        operator = self.producer(tensor)
        if operator is not None and operator.name == "DEQUANTIZE" and operator.inputs[0]:
            return operator.inputs[0]
        return tensor


def read_file(file: File) -> LiteRTFile:
    """Reads operators and tensors of a `.tflite` file.

    Args:
        file: Bytes of the file, or its path.

    Returns:
        A `LiteRTFile`.

    Raises:
        ImportError: If LiteRT is not installed.
        ValueError: If it is not a `.tflite` file.

    Example:
    ```python
    file = keras_alds.litert.read_file(keras_alds.litert.convert(model, verbose=0))
    for operator in file.operators:
        print(operator.name, [tensor.shape for tensor in operator.outputs])
    ```
    """
    schema = _package.schema()
    content = contents(file)
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    codes = _names(schema.BuiltinOperator)
    types = _names(schema.TensorType)

    def raw_bytes(buffer: Any) -> np.ndarray | None:
        if buffer.data is not None:
            return np.asarray(buffer.data, np.uint8)
        if (buffer.offset or 0) > 1:  # files of more than 2 GB keep them at the end
            return np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
        return None

    buffers = tuple(map(raw_bytes, model.buffers))

    def size(number: int) -> int:
        found = buffers[number]
        return 0 if found is None else found.size

    tensors: list[Tensor] = []
    operators: list[Operator] = []
    ends: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    for number, graph in enumerate(model.subgraphs):
        own = [
            _tensor(raw, number, index, types[raw.type].lower(), size(raw.buffer))
            for index, raw in enumerate(graph.tensors)
        ]
        tensors += own
        ends.append((tuple(own[i] for i in graph.inputs), tuple(own[i] for i in graph.outputs)))
        for index, raw in enumerate(graph.operators or []):
            code = model.operatorCodes[raw.opcodeIndex]
            name = codes[max(int(code.builtinCode), int(code.deprecatedBuiltinCode))]
            operators.append(
                Operator(
                    index=index,
                    subgraph=number,
                    name=code.customCode.decode() if name == "CUSTOM" else name,
                    version=int(code.version),
                    inputs=tuple(own[i] if i >= 0 else None for i in _list(raw.inputs)),
                    outputs=tuple(own[i] for i in _list(raw.outputs)),
                    options=_options(raw.builtinOptions),
                )
            )
    metadata = {entry.name.decode(): size(entry.buffer) for entry in model.metadata or []}
    return LiteRTFile(
        size=len(content),
        operators=tuple(operators),
        tensors=tuple(tensors),
        inputs=ends[0][0],
        outputs=ends[0][1],
        metadata=MappingProxyType(metadata),
        buffers=buffers,
    )


def _tensor(raw: Any, subgraph: int, index: int, dtype: str, size: int) -> Tensor:
    """The record of a schema tensor."""
    scheme = raw.quantization
    scales = () if scheme is None or scheme.scale is None else tuple(map(float, scheme.scale))
    zeros = () if not scales or scheme.zeroPoint is None else tuple(map(int, scheme.zeroPoint))
    return Tensor(
        index=index,
        subgraph=subgraph,
        name=(raw.name or b"").decode(),
        shape=() if raw.shape is None else tuple(map(int, raw.shape)),
        dtype=dtype,
        scales=scales,
        zero_points=zeros or (0,) * len(scales),
        axis=int(scheme.quantizedDimension) if len(scales) > 1 else None,
        size=size,
        buffer=int(raw.buffer),
    )


def contents(file: File) -> bytes:
    """The bytes of a `.tflite` file.

    Raises:
        ValueError: If it is not one.
    """
    if isinstance(file, (bytes, bytearray, memoryview)):
        content, where = bytes(file), f"{len(file)} bytes"
    elif isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as stream:
            content, where = stream.read(), repr(os.fspath(file))
    else:
        raise ValueError(
            "Expected the path or the bytes of a .tflite file. "
            f"Received: {type(file).__name__}. Convert models with `keras_alds.litert.convert`."
        )
    if content[4:8] != b"TFL3":
        raise ValueError(
            f"Expected a .tflite file. Received: {where}, with other content. "
            "Convert models with `keras_alds.litert.convert`."
        )
    return content


def _names(constants: type) -> dict[int, str]:
    return {value: name for name, value in vars(constants).items() if not name.startswith("_")}


def _list(indices: Any) -> list[int]:
    return [] if indices is None else [int(i) for i in indices]


def _options(options: Any) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            key: value
            for key, value in (vars(options) if options is not None else {}).items()
            if isinstance(value, (bool, int, float, str))
        }
    )
