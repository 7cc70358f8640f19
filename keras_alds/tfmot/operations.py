"""Operations between layers of a graph, as stock layers or TensorFlow functions."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_alds import _backend
from keras_alds._backend.layers import called_function
from keras_alds.models.rebuild import GraphRebuilder, Piece
from keras_alds.tfmot.settings import SAME_ACTIVATIONS, UnsupportedError

_MERGES = ("Add", "Subtract", "Multiply", "Maximum", "Minimum", "TrueDivide", "Divide")
#: The names of TensorFlow's functions of two tensors, as the operations of Keras 3.
_OPERATORS = {
    "__operators__.add": "Add",
    "math.add": "Add",
    "math.subtract": "Subtract",
    "math.multiply": "Multiply",
    "math.divide": "Divide",
    "math.truediv": "Divide",
    "math.maximum": "Maximum",
    "math.minimum": "Minimum",
}
#: Operations of Keras 3 as TensorFlow functions; the first argument is the operation.
_TF_OPERATIONS: dict[str, Callable[..., Any]] = {
    "Add": lambda op, x1, x2: tf.add(x1, x2),
    "Subtract": lambda op, x1, x2: tf.subtract(x1, x2),
    "Multiply": lambda op, x1, x2: tf.multiply(x1, x2),
    "TrueDivide": lambda op, x1, x2: tf.divide(x1, x2),
    "Divide": lambda op, x1, x2: tf.divide(x1, x2),
    "Maximum": lambda op, x1, x2: tf.maximum(x1, x2),
    "Minimum": lambda op, x1, x2: tf.minimum(x1, x2),
    "Power": lambda op, x1, x2: tf.pow(x1, x2),
    "Matmul": lambda op, x1, x2: tf.matmul(x1, x2),
    "Negative": lambda op, x: tf.negative(x),
    "Absolute": lambda op, x: tf.abs(x),
    "Abs": lambda op, x: tf.abs(x),
    "Sqrt": lambda op, x: tf.sqrt(x),
    "Rsqrt": lambda op, x: tf.math.rsqrt(x),
    "Square": lambda op, x: tf.square(x),
    "Exp": lambda op, x: tf.exp(x),
    "Log": lambda op, x: tf.math.log(x),
    "Mean": lambda op, x: tf.reduce_mean(x, axis=op.axis, keepdims=op.keepdims),
    "Sum": lambda op, x: tf.reduce_sum(x, axis=op.axis, keepdims=op.keepdims),
    "Max": lambda op, x: tf.reduce_max(x, axis=op.axis, keepdims=op.keepdims),
    "Min": lambda op, x: tf.reduce_min(x, axis=op.axis, keepdims=op.keepdims),
    "Softmax": lambda op, x: tf.nn.softmax(x, axis=op.axis),
    "Clip": lambda op, x: tf.clip_by_value(x, op.x_min, op.x_max),
    "Cast": lambda op, x: tf.cast(x, op.dtype),
    "ExpandDims": lambda op, x: tf.expand_dims(x, op.axis),
    "Squeeze": lambda op, x: tf.squeeze(x, op.axis),
    "Reshape": lambda op, x: tf.reshape(x, [-1 if n is None else n for n in op.newshape]),
    "Transpose": lambda op, x: tf.transpose(x, op.axes),
    "Stack": lambda op, xs: tf.stack(list(xs), axis=op.axis),
    "GetItem": lambda op, x, key: x[key],
}


def translated(
    target: _backend.Backend, operation: Any, values: Sequence[Any], symbolic: Sequence[bool]
) -> Piece:
    """A function that computes a Keras 3 operation in tf_keras.

    Only the names of Keras 3's operation classes are public.

    Args:
        target: The backend of tf_keras.
        operation: The operation.
        values: The arguments of its call.
        symbolic: Which of them are tensors of the graph.

    Raises:
        UnsupportedError: If no translation is known.
    """
    kind, name, layers = type(operation).__name__, operation.name, target.keras.layers
    arithmetic = _arithmetic(target, kind, name, values, symbolic)
    if arithmetic is not None:
        return arithmetic
    if kind == "Concatenate":
        joined = layers.Concatenate(axis=operation.axis, name=name)
        return lambda xs: joined(list(xs))
    if kind.lower() in SAME_ACTIVATIONS and len(values) == 1 and kind != "Softmax":
        return layers.Activation(kind.lower(), name=name)
    if kind in _TF_OPERATIONS:
        return functools.partial(_TF_OPERATIONS[kind], operation)
    raise UnsupportedError("no translation of this operation is known")


def arithmetic_as_layers(model: Any) -> Any:
    """Returns a tf_keras model in which `x + 3.0`, `a * b` and the like are stock layers.

    TF-MOT fails on the layers that tf_keras makes of operators. A `Rescaling` that multiplies and
    adds becomes two. All other layers are shared with `model`.
    """
    backend = _backend.backend_of(model)
    return _Arithmetic(backend, backend).rebuild(model)


class _Arithmetic(GraphRebuilder):
    """Stock layers in place of arithmetic operators between layers."""

    def __init__(self, source: _backend.Backend, target: _backend.Backend) -> None:
        super().__init__(source, target)
        self._made: dict[Any, list[Piece]] = {}

    def pieces(self, call: _backend.GraphCall) -> list[Piece]:
        if call.layer not in self._made:
            is_rescaling = type(call.layer) is self.source.keras.layers.Rescaling
            self._made[call.layer] = (
                self._one_operation_each(call.layer) if is_rescaling else [self._piece(call)]
            )
        return self._made[call.layer]

    def _one_operation_each(self, layer: Any) -> list[Piece]:
        """A `Rescaling` as one that multiplies and one that adds: both results are quantized."""
        if np.all(np.equal(layer.scale, 1)) or not np.any(layer.offset):
            return [layer]
        cls, config = type(layer), layer.get_config()
        scale = {**config, "name": self.unique(f"{layer.name}_scale"), "offset": 0.0}
        offset = {**config, "name": self.unique(f"{layer.name}_offset"), "scale": 1.0}
        return [cls.from_config(scale), cls.from_config(offset)]

    def _piece(self, call: _backend.GraphCall) -> Piece:
        kind = _OPERATORS.get(called_function(call.layer) or "")
        values = [*call.args, *(v for key, v in call.kwargs.items() if key != "name")]
        symbolic = [isinstance(value, type(call.outputs[0])) for value in values]
        name = call.layer.name.replace(".", "_").lstrip("_")
        found = None
        if kind is not None and any(symbolic):
            found = _arithmetic(self.target, kind, self.unique(name), values, symbolic)
        return call.layer if found is None else found

    def arguments(
        self, call: _backend.GraphCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._made[call.layer] == [call.layer]:
            return args, kwargs
        return args, {key: value for key, value in kwargs.items() if key != "name"}


def _arithmetic(
    target: _backend.Backend,
    kind: str,
    name: str,
    values: Sequence[Any],
    symbolic: Sequence[bool],
) -> Piece | None:
    """A merging layer or a `Rescaling` for an operation of two values, or None."""
    layers = target.keras.layers
    if kind not in _MERGES or len(values) != 2:
        return None
    if all(symbolic):
        if not hasattr(layers, kind):
            return None
        merge = getattr(layers, kind)(name=name)
        return lambda *args, **kwargs: merge([*args, *kwargs.values()])
    rescaling = _as_rescaling(kind, values, symbolic)
    if rescaling is None:
        return None
    layer = layers.Rescaling(*rescaling, name=name)
    index = symbolic.index(True)
    return lambda *args, **kwargs: layer([*args, *kwargs.values()][index])


def _as_rescaling(
    kind: str, values: Sequence[Any], symbolic: Sequence[bool]
) -> tuple[float, float] | None:
    """`(scale, offset)` of an operation between a tensor and a number, or None."""
    number = values[symbolic.index(False)]
    if tf.is_tensor(number) and number.shape.rank == 0:
        number = float(number)
    if not isinstance(number, numbers.Real):
        return None
    value, first = float(number), symbolic[0]
    if kind == "Add":
        return 1.0, value
    if kind == "Subtract":
        return (1.0, -value) if first else (-1.0, value)
    if kind == "Multiply":
        return value, 0.0
    if kind in ("TrueDivide", "Divide") and first and value:
        return 1.0 / value, 0.0
    return None
