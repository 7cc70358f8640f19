"""Writes `.tflite` files of single layers, without the converter, to measure their latency."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np

from keras_alds.core.slicing import Array, decoder_axes
from keras_alds.litert import _package
from keras_alds.models.inventory import Inventory, LayerRecord

_ACTIVATION_SCALE = 0.05  # for int8 files; does not affect the time
_WEIGHT_SCALE = 0.01
_SIZES = ("input", "kernel", "strides", "dilation")


@dataclasses.dataclass(frozen=True, order=True)
class LayerCall:
    """One call of a layer, with everything that determines its latency.

    Attributes:
        kind: `"conv"`, or `"dense"` for a matrix product.
        input: `(batch, height, width, channels)`, or `(rows, channels)` for `"dense"`.
        filters: Output channels.
        kernel: `(height, width)`; `()` for `"dense"`.
        strides: Two numbers; `()` for `"dense"`.
        padding: `"same"` or `"valid"`; `""` for `"dense"`.
        dilation: Two numbers; `()` for `"dense"`.
    """

    kind: str
    input: tuple[int, ...]
    filters: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    padding: str = ""
    dilation: tuple[int, ...] = ()

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the dense kernel, `(*kernel, channels, filters)`."""
        return (*self.kernel, self.input[-1], self.filters)

    def to_row(self) -> dict[str, str]:
        """The call as the text columns of a latency table."""
        row = {key: str(value) for key, value in dataclasses.asdict(self).items()}
        return row | {name: "x".join(map(str, getattr(self, name))) for name in _SIZES}

    @classmethod
    def from_row(cls, row: dict[str, str]) -> LayerCall:
        """The inverse of `to_row`."""
        sizes = {name: tuple(int(n) for n in row[name].split("x") if n) for name in _SIZES}
        return cls(kind=row["kind"], filters=int(row["filters"]), padding=row["padding"], **sizes)


#: Calls by layer.
Calls = dict[Any, list[LayerCall]]


def layer_calls(inventory: Inventory, records: Sequence[LayerRecord]) -> Calls:
    """Returns all calls of some layers in one forward pass of one example.

    Returns:
        `{layer: calls}`.

    Raises:
        ValueError: If an input or feature map has an unknown size.
    """
    return {
        record.layer: [_call(record, shape) for shape, _ in inventory.calls[record.layer]]
        for record in records
    }


def _call(record: LayerRecord, shape: tuple[int | None, ...]) -> LayerCall:
    if any(size is None for size in shape):
        raise ValueError(
            f"Expected a known input size, to measure latency. Received: layer '{record.path}' "
            f"works on the shape {shape}. Create the model again with a fixed shape "
            "(`Input(shape)` without None) and set its weights."
        )
    sizes = [int(size or 0) for size in shape]
    return LayerCall(**record.kind.timed_call(record.layer, sizes))


def layer_file(
    call: LayerCall,
    slices: int = 0,
    rank: int = 0,
    scheme: int = 0,
    *,
    quantize: str | None = None,
    kernels: Sequence[Array] | None = None,
    bias: Array | None = None,
) -> bytes:
    """Returns a file of one layer: the dense one, or encoder and decoder of a choice.

    It has the operators that `convert` makes for such layers. The slices of a dense layer become
    a grouped 1×1 convolution, as after `expand`.

    Args:
        call: The layer and its input.
        slices: Number of slices k; 0 for the dense layer.
        rank: Rank j; 0 for the dense layer.
        scheme: Fold scheme, which says how the two factors share the window. Defaults to 0: the
            encoder has all of it.
        quantize: None for float32, or `"int8"`: per-channel weights.
        kernels: The dense kernel, or encoder and decoder, in Keras's layout. Defaults to zeros,
            which take as long as any other values.
        bias: Defaults to zeros.

    Returns:
        The bytes of a `.tflite` file.

    Raises:
        ImportError: If LiteRT is not installed.
    """
    writer = _Writer(quantize == "int8")
    grouped_product = call.kind == "dense" and slices > 1
    shape = (call.input[0], 1, 1, call.input[1]) if grouped_product else call.input
    source = writer.activation(shape)
    if slices == 0:
        (kernel,) = kernels or (_zeros(call.kernel_shape),)
        return writer.finish(source, _layer(writer, call, source, kernel, bias))
    first, second = (factor_call(call, scheme, slices * rank, decoder=d) for d in (False, True))
    share = call.input[-1] // slices
    encoder, decoder = kernels or (
        _zeros((*first.kernel, share, first.filters)),
        _zeros(second.kernel_shape),
    )
    if grouped_product:
        middle = writer.convolution(source, encoder.reshape(1, 1, *encoder.shape), slices)
    else:
        middle = _layer(writer, first, source, encoder, None, slices)
    return writer.finish(source, _layer(writer, second, middle, decoder, bias))


def factor_call(call: LayerCall, scheme: int, hidden: int, *, decoder: bool) -> LayerCall:
    """The call of the encoder or decoder of a layer; its input's height and width do not count.

    Args:
        call: The layer's call.
        scheme: Fold scheme: each factor slides along its own axes of the window.
        hidden: Channels between encoder and decoder.
        decoder: Whether the factor is the decoder.
    """
    axes = decoder_axes(scheme, len(call.kernel))

    def own(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n if (axis in axes) == decoder else 1 for axis, n in enumerate(sizes))

    return dataclasses.replace(
        call,
        kernel=own(call.kernel),
        strides=own(call.strides),
        dilation=own(call.dilation),
        input=(*call.input[:-1], hidden) if decoder else call.input,
        filters=call.filters if decoder else hidden,
    )


def empty_file() -> bytes:
    """A file that does almost nothing, to measure the overhead of a run."""
    return layer_file(LayerCall("conv", (1, 1, 1, 1), 1, (1, 1), (1, 1), "valid", (1, 1)))


def _layer(
    writer: _Writer, call: LayerCall, source: int, kernel: Array, bias: Any, slices: int = 1
) -> int:
    if call.kind == "dense":
        return writer.product(source, kernel, bias)
    return writer.convolution(
        source, kernel, slices, call.strides, call.padding, call.dilation, bias=bias
    )


def _zeros(shape: Sequence[int]) -> Array:
    return np.zeros(shape, np.float32)


class _Writer:
    """Builds a graph of a few operators with the schema's object classes."""

    def __init__(self, int8: bool) -> None:
        self.schema = schema = _package.schema()
        self.int8 = int8
        self.model, self.graph = schema.ModelT(), schema.SubGraphT()
        self.model.version = 3
        self.model.buffers = [schema.BufferT()]  # the first one is for tensors without values
        self.model.operatorCodes, self.model.subgraphs = [], [self.graph]
        self.graph.tensors, self.graph.operators = [], []

    def activation(self, shape: Sequence[int]) -> int:
        """Adds a computed tensor or the input; returns its index."""
        kind = self.schema.TensorType.INT8 if self.int8 else self.schema.TensorType.FLOAT32
        return self._tensor(shape, kind, scale=[_ACTIVATION_SCALE] if self.int8 else None)

    def convolution(
        self,
        source: int,
        kernel: Array,
        groups: int = 1,
        strides: Sequence[int] = (1, 1),
        padding: str = "valid",
        dilation: Sequence[int] = (1, 1),
        bias: Array | None = None,
    ) -> int:
        """Adds a convolution, depthwise if every group has one channel; returns its output."""
        schema, operators = self.schema, self.schema.BuiltinOperator
        batch, *sizes, channels = self.graph.tensors[source].shape
        filters = kernel.shape[-1]
        spatial = [
            -(-size // step) if padding == "same" else (size - (taps - 1) * spread - 1) // step + 1
            for size, taps, step, spread in zip(
                sizes, kernel.shape, strides, dilation, strict=False
            )
        ]
        if 1 < groups == channels and len(set(strides)) == 1:
            options = schema.DepthwiseConv2DOptionsT()
            options.depthMultiplier = filters // channels
            kind = schema.BuiltinOptions.DepthwiseConv2DOptions
            code, version, axis = operators.DEPTHWISE_CONV_2D, 3, 3
            weights = kernel.reshape(1, *kernel.shape[:2], filters)
        else:
            options = schema.Conv2DOptionsT()
            kind = schema.BuiltinOptions.Conv2DOptions
            code, version, axis = operators.CONV_2D, 6, 0
            weights = np.moveaxis(kernel, -1, 0)
        same = padding == "same"
        options.padding = schema.Padding.SAME if same else schema.Padding.VALID
        options.strideH, options.strideW = map(int, strides)
        options.dilationHFactor, options.dilationWFactor = map(int, dilation)
        result = self.activation((batch, *spatial, filters))
        inputs = [source, *self._weights(weights, axis, bias)]
        self._operator(code, version, inputs, result, kind, options)
        return result

    def product(self, source: int, kernel: Array, bias: Array | None = None) -> int:
        """Adds a matrix product; returns its output."""
        rows = self.graph.tensors[source].shape[:-1]
        options = self.schema.FullyConnectedOptionsT()
        options.keepNumDims = len(rows) > 1
        result = self.activation((*rows, kernel.shape[-1]))
        inputs = [source, *self._weights(np.moveaxis(kernel, -1, 0), 0, bias)]
        code = self.schema.BuiltinOperator.FULLY_CONNECTED
        kind = self.schema.BuiltinOptions.FullyConnectedOptions
        self._operator(code, 5, inputs, result, kind, options)
        return result

    def finish(self, source: int, result: int) -> bytes:
        """The bytes of the file with this input and output."""
        self.graph.inputs, self.graph.outputs = [source], [result]
        size = sum(len(buffer.data) for buffer in self.model.buffers if buffer.data is not None)
        builder = flatbuffers.Builder(size + 65536)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _weights(self, values: Array, axis: int, bias: Array | None) -> tuple[int, int]:
        """Adds tensors of weights and bias, quantized per channel for int8."""
        types, count = self.schema.TensorType, values.shape[axis]
        bias = _zeros((count,)) if bias is None else bias
        if not self.int8:
            return (
                self._tensor(values.shape, types.FLOAT32, values.astype(np.float32, copy=False)),
                self._tensor((count,), types.FLOAT32, bias.astype(np.float32, copy=False)),
            )
        others = tuple(i for i in range(values.ndim) if i != axis)
        largest = np.abs(values).max(axis=others)
        scale = np.where(largest > 0, largest / 127, _WEIGHT_SCALE).astype(np.float32)
        along = [-1 if i == axis else 1 for i in range(values.ndim)]
        levels = np.round(values / scale.reshape(along)).astype(np.int8)
        unit = scale * np.float32(_ACTIVATION_SCALE)
        return (
            self._tensor(values.shape, types.INT8, levels, scale, axis),
            self._tensor((count,), types.INT32, np.round(bias / unit).astype(np.int32), unit),
        )

    def _tensor(
        self,
        shape: Sequence[int],
        kind: int,
        values: Array | None = None,
        scale: Any = None,
        axis: int = 0,
    ) -> int:
        tensor = self.schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer = list(map(int, shape)), kind, 0
        tensor.name = f"tensor_{len(self.graph.tensors)}"
        if values is not None:
            buffer = self.schema.BufferT()
            buffer.data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        if scale is not None:
            scheme = self.schema.QuantizationParametersT()
            scheme.scale = np.asarray(scale, np.float32)
            scheme.zeroPoint = np.zeros(len(scheme.scale), np.int64)
            scheme.quantizedDimension = axis
            tensor.quantization = scheme
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def _operator(
        self, code: int, version: int, inputs: list[int], output: int, kind: int, options: Any
    ) -> None:
        entry, operator = self.schema.OperatorCodeT(), self.schema.OperatorT()
        entry.builtinCode = entry.deprecatedBuiltinCode = code  # all codes are below 127
        entry.version = version
        operator.opcodeIndex = len(self.model.operatorCodes)
        operator.inputs, operator.outputs = inputs, [output]
        operator.builtinOptionsType, operator.builtinOptions = kind, options
        self.model.operatorCodes.append(entry)
        self.graph.operators.append(operator)
