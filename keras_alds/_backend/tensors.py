"""The TensorFlow functions that layers and models use."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import scipy.sparse
import tensorflow as tf

bfloat16, float16, float32, float64 = tf.bfloat16, tf.float16, tf.float32, tf.float64
boolean, int32, int64, uint8 = tf.bool, tf.int32, tf.int64, tf.uint8

boolean_mask = tf.boolean_mask
cast = tf.cast
concat = tf.concat
cumsum = tf.cumsum
einsum = tf.einsum
executing_eagerly = tf.executing_eagerly
expand_dims = tf.expand_dims
eye = tf.eye
flatten = tf.nest.flatten
gather = tf.gather
is_nested = tf.nest.is_nested
is_tensor = tf.is_tensor
map_structure = tf.nest.map_structure
matmul = tf.matmul
pack_sequence_as = tf.nest.pack_sequence_as
reshape = tf.reshape
reverse = tf.reverse
shape = tf.shape
slice_ = tf.slice
split = tf.split
stack = tf.stack
tensor = tf.convert_to_tensor
tensordot = tf.tensordot
transpose = tf.transpose
unstack = tf.unstack
where = tf.where
zeros = tf.zeros
zeros_like = tf.zeros_like

_DATA_FORMATS = {
    "channels_last": {1: "NWC", 2: "NHWC", 3: "NDHWC"},
    "channels_first": {1: "NCW", 2: "NCHW", 3: "NCDHW"},
}


def dtype_name(dtype: Any) -> str:
    """The name of a dtype, such as `"float32"`."""
    return str(tf.as_dtype(dtype).name)


def dtype_size(dtype: Any) -> int:
    """The bytes of one value of a dtype."""
    return int(tf.as_dtype(dtype).size)


def numpy_dtype(dtype: Any) -> Any:
    """The NumPy dtype of a TensorFlow dtype."""
    return tf.as_dtype(dtype).as_numpy_dtype


def is_text(spec: Any) -> bool:
    """Whether a tensor or its spec holds strings."""
    return bool(spec.dtype == tf.string)


def is_dataset(value: Any) -> bool:
    """Whether a value is a `tf.data.Dataset`."""
    return isinstance(value, tf.data.Dataset)


def is_floating(value: Any) -> bool:
    """Whether a tensor or variable holds numbers of floating point."""
    return bool(tf.as_dtype(value.dtype).is_floating)


def to_numpy(value: Any) -> np.ndarray:
    """A value as a NumPy array; bfloat16, which NumPy lacks, becomes float32."""
    if isinstance(value, tf.Tensor) and value.dtype == tf.bfloat16:
        value = tf.cast(value, tf.float32)
    return np.asarray(value)


def is_dense(value: Any) -> bool:
    """Whether a value is a dense tensor, not sparse or ragged."""
    return isinstance(value, tf.Tensor)


def is_dense_spec(spec: Any) -> bool:
    """Whether a `tf.TypeSpec` is that of dense tensors."""
    return isinstance(spec, tf.TensorSpec)


def is_sparse(value: Any) -> bool:
    """Whether a value is a `tf.SparseTensor`."""
    return isinstance(value, tf.SparseTensor)


def is_ragged(value: Any) -> bool:
    """Whether a value is a `tf.RaggedTensor`."""
    return isinstance(value, tf.RaggedTensor)


def dense(value: Any) -> Any:
    """A dense tensor: zeros fill the gaps of a sparse tensor, and pad the rows of a ragged one."""
    if is_sparse(value):
        return tf.sparse.to_dense(tf.sparse.reorder(value))
    return value.to_tensor() if is_ragged(value) else tf.convert_to_tensor(value)


def to_scipy(value: Any) -> Any:
    """A sparse tensor of two axes as a matrix of SciPy, which can be indexed by rows."""
    rows, columns = value.indices.numpy().T
    return scipy.sparse.csr_array((value.values.numpy(), (rows, columns)), shape=value.shape)


def without_raggedness(value: Any) -> Any:
    """A dense tensor; of a ragged one all rows one after the other, `[rows, ...]`."""
    return value.flat_values if is_ragged(value) else dense(value)


def variable_like(variable: Any, value: np.ndarray) -> Any:
    """A new variable of the Keras and dtype of another one."""
    if isinstance(variable, keras.Variable):
        return keras.Variable(value, dtype=variable.dtype, name=variable.name)
    return tf.Variable(tf.cast(value, variable.dtype))


def comparable(outputs: Any) -> list[Any]:
    """The dense tensors by which the outputs of two models are compared.

    An output may be a distribution of TensorFlow Probability, which draws a new sample whenever it
    becomes a tensor. Its parameters say what it is.
    """
    found = []
    for output in flatten(outputs):
        parameters = getattr(output, "parameters", None)
        if isinstance(parameters, Mapping) and not tf.is_tensor(output):
            known = [value for value in parameters.values() if not callable(value)]
            found += comparable(list(filter(_holds_tensors, known)))
        else:
            found.append(without_raggedness(output))
    return found


def _holds_tensors(parameter: Any) -> bool:
    if tf.is_tensor(parameter):
        return bool(parameter.shape.rank)  # one number says nothing of an example
    return hasattr(parameter, "parameters")


def steps_of(ragged: Any) -> Any:
    """Which steps of the padded sequences `dense(ragged)` are not padding, `[batch, steps]`."""
    return tf.sequence_mask(ragged.row_lengths())


def on_rows(function: Callable[[Any], Any], ragged: Any) -> Any:
    """A ragged tensor whose rows, one after the other, went through a function of `[rows, ...]`."""
    return tf.ragged.map_flat_values(function, ragged)


def as_input(value: Any, spec: Any) -> Any:
    """A tensor of the type that a model's input has: dense, sparse or ragged.

    Args:
        value: an array or a ragged tensor.
        spec: the input's spec, or None.
    """
    if is_ragged(value):
        return value
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.sparse.from_dense(value)
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensor.from_tensor(value, ragged_rank=spec.ragged_rank)
    return tf.convert_to_tensor(value)


def bytes_of(value: Any) -> int:
    """The bytes of a dense tensor's values; 0 for anything else."""
    if not is_dense(value) or value.dtype in (tf.string, tf.variant, tf.resource):
        return 0
    return math.prod(value.shape) * value.dtype.size


def has_values(x: Any) -> bool:
    """Whether a tensor has values, and is not a symbol in a graph being traced."""
    return hasattr(x, "numpy")


def after_running(use: Callable[[np.ndarray], None], x: Any, outputs: Any) -> Any:
    """Makes the graph being traced call `use` with the values of `x` whenever it runs.

    Returns:
        The outputs to pass on; they depend on the call.
    """
    errors = getattr(_tracing, "errors", None)

    def run(values: np.ndarray) -> np.bool_:
        try:
            use(values)
        except BaseException as error:
            if errors is not None:
                errors.append(error)
            raise
        return np.bool_(True)

    if errors is None:
        done = tf.numpy_function(run, [x], tf.bool, stateful=True)
    else:
        # In the order of the code and one after the other, as all that changes one resource.
        turn = _turn()
        before = tf.raw_ops.ReadVariableOp(resource=turn, dtype=tf.int64)
        with tf.control_dependencies([before]):
            done = tf.numpy_function(run, [x], tf.bool, stateful=True)
        with tf.control_dependencies([done]):
            done = tf.raw_ops.AssignAddVariableOp(resource=turn, value=tf.ones((), tf.int64))
    with tf.control_dependencies([done]):
        return tf.nest.map_structure(tf.identity, outputs)


@functools.cache
def _turn() -> Any:
    """A variable that orders calls of Python in graphs; no distribution strategy mirrors it."""
    with tf.init_scope(), tf.device("CPU:0"):
        name = "keras_alds_turn"
        turn = tf.raw_ops.VarHandleOp(dtype=tf.int64, shape=[], shared_name=name)
        tf.raw_ops.AssignVariableOp(resource=turn, value=tf.zeros((), tf.int64))
        return turn


_tracing = threading.local()


@contextlib.contextmanager
def keeping_errors(errors: list[BaseException]) -> Iterator[None]:
    """Lets graphs that are traced inside keep what `after_running` raises in them, and its order.

    TensorFlow raises an error of its own in its place, which holds the text alone. It runs calls of
    Python in any order, also at the same time.
    """
    before = getattr(_tracing, "errors", None)
    _tracing.errors = errors
    try:
        yield
    finally:
        _tracing.errors = before


def known_shape(x: Any, count: int) -> list[Any]:
    """The last `count` axes of a tensor's shape: ints where known, else scalar tensors."""
    dynamic = None
    sizes: list[Any] = list(x.shape[x.shape.rank - count :])
    for axis, size in enumerate(sizes):
        if size is None:
            dynamic = tf.shape(x) if dynamic is None else dynamic
            sizes[axis] = dynamic[x.shape.rank - count + axis]
    return sizes


# -- Products ------------------------------------------------------------------------------------


def encode_sparse(x: Any, encoder: Any, slices: int) -> Any:
    """Apply a block-diagonal encoder to a sparse matrix, in as many steps as it has entries.

    Slice i of row n becomes row `n * slices + i`. What slice i multiplies by becomes the rows i,
    `slices + i`, … of one matrix `[channels, rank]`.

    Args:
        x: sparse tensor `[..., channels]`.
        encoder: tensor `[channels / slices, slices * rank]`.
        slices: int, number of channel slices.

    Returns:
        Dense tensor `[rows, slices * rank]`.
    """
    per_slice, width = encoder.shape
    x = tf.sparse.reshape(x, [-1, slices * per_slice])
    rows, columns = x.indices[:, 0], x.indices[:, 1]
    numbers = columns // per_slice
    indices = [rows * slices + numbers, columns % per_slice * slices + numbers]
    shape = [x.dense_shape[0] * slices, per_slice * slices]
    blocks = tf.SparseTensor(tf.stack(indices, axis=1), x.values, shape)
    kernel = tf.reshape(encoder, [per_slice * slices, width // slices])
    # TensorFlow has no such product in float16 on CPUs.
    dtype = tf.float32 if encoder.dtype.size == 2 else encoder.dtype
    product = tf.sparse.sparse_dense_matmul(tf.cast(blocks, dtype), tf.cast(kernel, dtype))
    return tf.reshape(tf.cast(product, encoder.dtype), [-1, width])


# -- Convolutions --------------------------------------------------------------------------------


def convolution(
    x: Any,
    kernel: Any,
    *,
    strides: Sequence[int],
    padding: str,
    dilation_rate: Sequence[int],
    data_format: str,
    groups: int = 1,
) -> Any:
    """Apply a convolution over one to three spatial axes.

    Gradients exist also where TensorFlow's kernels have none for grouped 1D and 2D convolutions.
    There, each group is differentiated as a convolution of its own.

    Args:
        x: tensor `[batch, *spatial, channels]`, or `[batch, channels, *spatial]`.
        kernel: tensor `[*kernel_size, channels / groups, filters]`.
        strides: sequence of int.
        padding: `"valid"`, `"same"` or `"causal"`.
        dilation_rate: sequence of int.
        data_format: `"channels_last"` or `"channels_first"`.
        groups: int, number of groups of channels. Default 1.

    Returns:
        Tensor of the same layout as `x` with `filters` channels.
    """
    x, padding = padded(x, kernel, padding, dilation_rate, data_format)
    convolve = functools.partial(
        tf.nn.convolution,
        strides=list(strides),
        padding=padding.upper(),
        dilations=list(dilation_rate),
        data_format=_DATA_FORMATS[data_format][len(strides)],
    )
    if groups == 1 or not on_cpu() or grouped_convolution_trains(dtype_name(x.dtype)):
        return convolve(x, kernel)
    axis = -1 if data_format == "channels_last" else 1
    return _convolved_in_groups(x, kernel, groups, axis, convolve)


def _convolved_in_groups(x: Any, kernel: Any, groups: int, axis: int, convolve: Any) -> Any:
    """A grouped convolution whose gradient is that of one convolution for each group."""

    def of_group(x: Any, kernel: Any, upstream: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch((x, kernel))
            y = convolve(x, kernel)
        return tape.gradient(y, (x, kernel), output_gradients=upstream)

    @tf.custom_gradient
    def convolved(x: Any, kernel: Any) -> Any:
        def gradient(upstream: Any) -> Any:
            parts = zip(
                tf.split(x, groups, axis),
                tf.split(kernel, groups, axis=-1),
                tf.split(upstream, groups, axis),
                strict=True,
            )
            of_x, of_kernel = zip(*(of_group(*part) for part in parts), strict=True)
            return tf.concat(of_x, axis), tf.concat(of_kernel, axis=-1)

        return convolve(x, kernel), gradient

    return convolved(x, kernel)


def depthwise_convolution(
    x: Any,
    kernel: Any,
    *,
    strides: Sequence[int],
    padding: str,
    dilation_rate: Sequence[int],
    data_format: str,
) -> Any:
    """Apply a depthwise convolution over one or two spatial axes, with equal strides.

    Args:
        x: tensor `[batch, *spatial, channels]`, or `[batch, channels, *spatial]`.
        kernel: tensor `[*kernel_size, channels, multiplier]`.
        strides: sequence of int.
        padding: `"valid"`, `"same"` or `"causal"`.
        dilation_rate: sequence of int.
        data_format: `"channels_last"` or `"channels_first"`.

    Returns:
        Tensor of the same layout with `channels * multiplier` channels.
    """
    x, padding = padded(x, kernel, padding, dilation_rate, data_format)
    last = data_format == "channels_last"
    one = len(strides) == 1  # TensorFlow supports only images
    if one:
        x = tf.expand_dims(x, 1 if last else 2)
        kernel = tf.expand_dims(kernel, 0)
        strides, dilation_rate = (strides[0], strides[0]), (1, dilation_rate[0])
    y = tf.nn.depthwise_conv2d(
        x,
        kernel,
        strides=[1, *strides, 1] if last else [1, 1, *strides],
        padding=padding.upper(),
        data_format=_DATA_FORMATS[data_format][2],
        dilations=list(dilation_rate),
    )
    return tf.squeeze(y, [1 if last else 2]) if one else y


def transposed_convolution(
    x: Any,
    kernel: Any,
    lengths: Sequence[Any],
    *,
    strides: Sequence[int],
    padding: str,
    dilation_rate: Sequence[int],
    data_format: str,
) -> Any:
    """Apply a transposed convolution over one to three spatial axes.

    Args:
        x: tensor `[batch, *spatial, channels]`, or `[batch, channels, *spatial]`.
        kernel: tensor `[*kernel_size, filters, channels]`.
        lengths: the output's spatial lengths, ints or scalar tensors.
        strides: sequence of int.
        padding: `"valid"` or `"same"`.
        dilation_rate: sequence of int.
        data_format: `"channels_last"` or `"channels_first"`.

    Returns:
        Tensor of the same layout as `x` with `filters` channels.
    """
    batch, filters = tf.shape(x)[0], kernel.shape[-2]
    last = data_format == "channels_last"
    return tf.nn.conv_transpose(
        x,
        kernel,
        [batch, *lengths, filters] if last else [batch, filters, *lengths],
        strides=list(strides),
        padding=padding.upper(),
        data_format=_DATA_FORMATS[data_format][len(strides)],
        dilations=list(dilation_rate),
    )


def padded(
    x: Any, kernel: Any, padding: str, dilation_rate: Sequence[int], data_format: str
) -> tuple[Any, str]:
    """Applies causal padding; returns the input and the padding that remains to be applied."""
    if padding != "causal":
        return x, padding
    left = [dilation_rate[0] * (kernel.shape[0] - 1), 0]
    if left[0]:
        last = data_format == "channels_last"
        x = tf.pad(x, [[0, 0], left, [0, 0]] if last else [[0, 0], [0, 0], left])
    return x, "valid"


# -- Devices and compilers -----------------------------------------------------------------------


_for_cpu = contextvars.ContextVar("for_cpu", default=False)


@contextlib.contextmanager
def for_cpu() -> Iterator[None]:
    """Trace for a CPU while inside, on whatever device the trace itself is made."""
    token = _for_cpu.set(True)
    try:
        yield
    finally:
        _for_cpu.reset(token)


def on_cpu() -> bool:
    """Tell whether TensorFlow sees only CPUs.

    Returns:
        `True` if no GPU or TPU is visible to this process, and inside `for_cpu`.
    """
    return _for_cpu.get() or all(
        device.device_type == "CPU" for device in tf.config.get_visible_devices()
    )


def in_xla_trace() -> bool:
    """Tell whether the current code is being traced for XLA (`jit_compile=True`).

    `tf.function(jit_compile=True)` opens an XLA control-flow context for its trace, and inner
    functions find it through their outer graphs. This uses a private function of TensorFlow. If it
    is missing, the result is `False`, and a slower implementation is used.

    Returns:
        `True` inside such a trace, `False` in eager execution and in ordinary graphs.
    """
    if tf.executing_eagerly():
        return False
    try:
        from tensorflow.python.ops import control_flow_util
    except ImportError:
        return False
    ask = getattr(control_flow_util, "GraphOrParentsInXlaContext", None)
    return bool(ask(tf.compat.v1.get_default_graph())) if ask else False


def grouped_convolution_trains(dtype: str) -> bool:
    """Tell whether this machine's CPU kernels can differentiate a grouped convolution.

    TensorFlow's own CPU kernels cannot ("Gradients for grouped convolutions are not supported on
    CPU"). oneDNN's can, for float32 and bfloat16, if oneDNN is enabled. A tiny gradient is tried
    once per dtype.

    Args:
        dtype: str, the layer's compute dtype.

    Returns:
        `True` if the gradient of a grouped 2D convolution can be computed; `False` in a graph of
        TensorFlow 1, where nothing can be tried.
    """
    with tf.init_scope():
        return tf.executing_eagerly() and _differentiates_groups(dtype)


@functools.cache
def _differentiates_groups(dtype: str) -> bool:
    image, kernel = tf.ones([1, 3, 3, 4], dtype), tf.ones([3, 3, 2, 4], dtype)
    options = {"out_backprop": image, "strides": [1, 1, 1, 1], "padding": "SAME"}
    try:  # with raw operations, as gradient tapes do not record in this scope
        tf.raw_ops.Conv2DBackpropInput(input_sizes=image.shape, filter=kernel, **options)
        tf.raw_ops.Conv2DBackpropFilter(input=image, filter_sizes=kernel.shape, **options)
    except (tf.errors.OpError, TypeError, ValueError):
        return False
    return True
