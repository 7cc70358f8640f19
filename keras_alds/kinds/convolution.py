"""Convolutions: a grouped encoder and a pointwise decoder; fold schemes split the window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import keras
import numpy as np

from keras_alds._backend import tensors
from keras_alds.core.calibration.patches import patch_chunks
from keras_alds.core.chains import CP, is_chain
from keras_alds.core.checks import positive_int
from keras_alds.core.slicing import (
    Array,
    Unfolding,
    convolution_unfolding,
    decoder_axes,
    distinct_schemes,
)
from keras_alds.kinds import forms
from keras_alds.kinds.base import (
    KernelKind,
    Shape,
    Writer,
    channels_last,
    register,
    without_channels,
)
from keras_alds.kinds.factorized import FactorizedLayer


def _int_tuple(value: Any, length: int, name: str) -> tuple[int, ...]:
    message = (
        f"Expected `{name}` to be a positive integer or a tuple of {length} positive integers. "
        f"Received: {name}={value!r}"
    )
    items = tuple(value) if isinstance(value, Sequence) else (value,) * length
    if len(items) != length:
        raise ValueError(message)
    try:
        return tuple(positive_int(item, name) for item in items)
    except ValueError:
        raise ValueError(message) from None


class BaseFactorizedConv(FactorizedLayer):
    """A factorized convolution over `_dimensions` spatial axes."""

    _dimensions: ClassVar[int]
    _paddings: ClassVar[tuple[str, ...]] = ("valid", "same")
    # Whether a fold scheme may split the window between encoder and decoder.
    _folds: ClassVar[bool] = True

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        slices: int,
        rank: int,
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = 1,
        activation: Any = None,
        use_bias: bool = True,
        encoder_initializer: Any = "glorot_uniform",
        decoder_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        encoder_regularizer: Any = None,
        decoder_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        encoder_constraint: Any = None,
        decoder_constraint: Any = None,
        bias_constraint: Any = None,
        encoder_form: str = "auto",
        scheme: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.scheme = self._checked_scheme(scheme)
        self.filters = positive_int(filters, "filters")
        self._set_arguments(
            slices=slices,
            rank=rank,
            activation=activation,
            use_bias=use_bias,
            encoder_form=encoder_form,
            encoder_initializer=encoder_initializer,
            decoder_initializer=decoder_initializer,
            bias_initializer=bias_initializer,
            encoder_regularizer=encoder_regularizer,
            decoder_regularizer=decoder_regularizer,
            bias_regularizer=bias_regularizer,
            encoder_constraint=encoder_constraint,
            decoder_constraint=decoder_constraint,
            bias_constraint=bias_constraint,
        )
        self._set_window(
            kernel_size=kernel_size,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
        )

    def _set_window(
        self, *, kernel_size: Any, strides: Any, padding: Any, data_format: Any, dilation_rate: Any
    ) -> None:
        """Check and store the window, padding and data format."""
        self.kernel_size = _int_tuple(kernel_size, self._dimensions, "kernel_size")
        self.strides = _int_tuple(strides, self._dimensions, "strides")
        self.dilation_rate = _int_tuple(dilation_rate, self._dimensions, "dilation_rate")
        if max(self.strides) > 1 and max(self.dilation_rate) > 1:
            raise ValueError(
                "Expected `strides` or `dilation_rate` to be 1 along every axis. "
                f"Received: strides={self.strides}, dilation_rate={self.dilation_rate}"
            )
        self.padding = str(padding).lower()
        if self.padding not in self._paddings:
            raise ValueError(
                f"Expected `padding` to be one of {self._paddings}. Received: padding={padding!r}"
            )
        if data_format is None:
            data_format = self._keras.backend.image_data_format()
        self.data_format = str(data_format).lower()
        if self.data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                "Expected `data_format` to be 'channels_last' or 'channels_first'. "
                f"Received: data_format={data_format!r}"
            )
        self.input_spec = self._keras.layers.InputSpec(min_ndim=self._dimensions + 2)

    def _checked_scheme(self, value: Any) -> int:
        known = tuple(distinct_schemes((2,) * self._dimensions)) if self._folds else (0,)
        if not isinstance(value, int) or isinstance(value, bool) or value not in known:
            raise ValueError(
                f"Expected `scheme` of a {type(self).__name__} to be one of {known}. "
                f"Received: scheme={value!r}"
            )
        return value

    @property
    def unfolding(self) -> Unfolding:
        """How the dense kernel `[*kernel_size, channels, filters]` unfolds; see `core.slicing`."""
        return convolution_unfolding(self._dimensions, self.scheme)

    def window(self, *, decoder: bool) -> dict[str, Any]:
        """Kernel size, strides, padding, dilation and data format of one of the two convolutions.

        Args:
            decoder: bool, whether the decoder's are returned; else the encoder's.
        """
        axes = decoder_axes(self.scheme, self._dimensions)
        sizes = enumerate(self.kernel_size)
        size = tuple(n if (axis in axes) == decoder else 1 for axis, n in sizes)
        settings = {
            "strides": self.strides,
            "padding": self.padding if max(size) > 1 else "valid",
            "dilation_rate": self.dilation_rate,
            "data_format": self.data_format,
        }
        return {"kernel_size": size, **forms.owned(settings, axes, decoder=decoder)}

    def _dense_shape(self, channels: int) -> tuple[int, ...]:
        return (*self.kernel_size, channels, self.filters)

    def _factor_shapes(
        self, per_slice: int, hidden: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        first, second = (self.window(decoder=part)["kernel_size"] for part in (False, True))
        return (*first, per_slice, hidden), (*second, hidden, self.filters)

    def _channel_axis(self) -> int:
        return -1 if self.data_format == "channels_last" else -1 - self._dimensions

    def build(self, input_shape: Any) -> None:
        """Create encoder, decoder and bias for inputs of `input_shape`."""
        shape = tuple(input_shape)
        axis = self._channel_axis()
        self.compute_output_shape(shape)  # raises for inputs that are too small
        channels = self._known_channels(shape[axis])
        self._add_weights(channels)
        self.input_spec = self._keras.layers.InputSpec(
            min_ndim=self._dimensions + 2, axes={axis: channels}
        )
        super().build(input_shape)

    def _add_weights(self, channels: int) -> None:
        self._add_factors(self._dense_shape(channels))
        self._add_bias(self.filters)

    def call(self, inputs: Any, training: Any = None) -> Any:
        """Apply encoder, decoder, bias and activation.

        Args:
            inputs: tensor `[batch, *spatial, channels]`, or `[batch, channels, *spatial]`.
            training: bool or None; filled in by Keras. It changes the speed, never the result.

        Returns:
            Tensor of the same layout with `filters` channels.
        """
        dimensions = self._dimensions
        x = tensors.cast(tensors.tensor(inputs), self.compute_dtype)
        batch_shape = None
        if x.shape.rank > dimensions + 2:  # several batch axes, as stock layers allow
            batch_shape = tensors.shape(x)[: -dimensions - 1]
            x = tensors.reshape(x, [-1, *tensors.known_shape(x, dimensions + 1)])
        data_format = self.data_format
        # TensorFlow's own CPU kernels are channels-last only.
        transposed = data_format == "channels_first" and tensors.on_cpu()
        if transposed:
            x = tensors.transpose(x, [0, *range(2, dimensions + 2), 1])
            data_format = "channels_last"
        y = self._convolve(x, data_format, training)
        if transposed:
            y = tensors.transpose(y, [0, dimensions + 1, *range(1, dimensions + 1)])
        if self.use_bias:
            ones = [1] * dimensions
            last = self.data_format == "channels_last"
            bias = tensors.cast(tensors.tensor(self.bias), y.dtype)
            shape = [1, *ones, self.filters] if last else [1, self.filters, *ones]
            # As in the stock layer: Keras 3 adds a channels-first bias along the columns if there
            # are as many columns as filters. A trained model relies on that.
            y = self._add(y, tensors.reshape(bias, shape))
        if batch_shape is not None:
            tail = tensors.shape(y)[1:]
            y = tensors.reshape(y, tensors.concat([batch_shape, tail], axis=0))
        if not tensors.executing_eagerly():
            y.set_shape(self.compute_output_shape(tuple(inputs.shape)))
        return y if self.activation is None else self.activation(y)

    def _convolve(self, x: Any, data_format: str, training: Any) -> Any:
        """Encoder and decoder on a tensor with one batch axis, without bias and activation."""
        last = data_format == "channels_last"
        spatial = x.shape[1:-1] if last else x.shape[2:]
        first, second = (self.window(decoder=part) for part in (False, True))
        form = self._form(
            channels=x.shape[-1] if last else x.shape[1],
            filters=self.filters * math.prod(second["kernel_size"]),
            kernel_size=first["kernel_size"],
            positions=forms.count_positions([x.shape[0], *spatial], first["strides"]),
            training=training,
        )
        encoder, decoder = self._factors(x.dtype)
        return forms.factorized_convolution(
            x,
            encoder,
            decoder,
            slices=self.slices,
            form=form,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=data_format,
            scheme=self.scheme,
        )

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the output's shape for an input shape, batch axes included."""
        shape = tuple(input_shape)
        if len(shape) < self._dimensions + 2:
            raise ValueError(
                f"Expected inputs of layer {self.name!r} to have at least "
                f"{self._dimensions + 2} axes. Received: input_shape={shape}"
            )
        batch, rest = shape[: -self._dimensions - 1], shape[-self._dimensions - 1 :]
        last = self.data_format == "channels_last"
        lengths: list[int | None] = []
        for axis, length in enumerate(rest[:-1] if last else rest[1:]):
            out = None if length is None else self._output_length(int(length), axis)
            if out is not None and out < 1:
                raise ValueError(
                    f"Expected the input of layer {self.name!r} to be large enough for its "
                    f"kernel. Received: input_shape={shape}, kernel_size={self.kernel_size}, "
                    f"dilation_rate={self.dilation_rate}, padding={self.padding!r}"
                )
            lengths.append(out)
        out_rest = [*lengths, self.filters] if last else [self.filters, *lengths]
        return self._shape_type([*batch, *out_rest])

    def _output_length(self, length: Any, axis: int) -> Any:
        """The length of a spatial axis of the output; below 1 for an input that is too short."""
        reach = self.dilation_rate[axis] * (self.kernel_size[axis] - 1)
        if self.padding != "valid":
            reach = 0
        return (length - reach - 1) // self.strides[axis] + 1

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {
            **super().get_config(),
            **self._shared_config(),
            **({"scheme": self.scheme} if self._folds else {}),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "dilation_rate": self.dilation_rate,
        }


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv1D(BaseFactorizedConv, keras.layers.Layer):
    """A one-dimensional convolution held as a grouped encoder and a pointwise decoder.

    The layer computes `activation(decoder(encoder(x)) + bias)`. The encoder is a convolution with
    the layer's kernel size, strides, padding and dilation over `slices` groups of channels, `rank`
    outputs each; the decoder is a pointwise convolution over all of them. It equals a
    stock `Conv1D` whose kernel, unfolded slice by slice, has rank `rank`; that kernel is
    `layer.kernel`.

    Weights, in this order: `encoder` `[size, channels / slices, slices * rank]` (slice i owns the
    outputs `i * rank` to `(i + 1) * rank - 1`), `decoder` `[1, slices * rank, filters]`, `bias`
    `[filters]`. Together `rank * (slices * filters + channels * size)` parameters and the bias.

    Args:
        filters: int, number of output channels.
        kernel_size: int or tuple of 1 int, the encoder's window.
        slices: int, number of contiguous channel slices, k. Must divide the input's channels.
        rank: int, rank per slice, j; at most `min(channels / slices * size, filters)`.
        strides: int or tuple of 1 int. Default 1. Above 1 it excludes `dilation_rate` above 1.
        padding: `"valid"`, `"same"` or `"causal"`. Default `"valid"`.
        data_format: `"channels_last"` or `"channels_first"`. Default: the Keras configuration's.
        dilation_rate: int or tuple of 1 int. Default 1.
        activation: str, callable or None, applied to the decoder's output.
        use_bias: bool, whether a bias is added after the decoder. Default `True`.
        encoder_initializer: initializer of the encoder. Default `"glorot_uniform"`.
        decoder_initializer: initializer of the decoder. Default `"glorot_uniform"`.
        bias_initializer: initializer of the bias. Default `"zeros"`.
        encoder_regularizer: optional regularizer of the encoder.
        decoder_regularizer: optional regularizer of the decoder.
        bias_regularizer: optional regularizer of the bias.
        activity_regularizer: optional regularizer of the layer's output.
        encoder_constraint: optional constraint of the encoder.
        decoder_constraint: optional constraint of the decoder.
        bias_constraint: optional constraint of the bias.
        encoder_form: str, how the numbers are computed; see `FactorizedDense`. Default `"auto"`.
        scheme: int, the fold scheme. 0 (default): the window is the encoder's, as above. 3: the
            encoder is pointwise and the decoder has the window, with its strides, padding and
            dilation; `encoder` then is `[1, channels / slices, slices * rank]`, `decoder`
            `[size, slices * rank, filters]`, and `rank` at most
            `min(channels / slices, filters * size)`.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        `(batch, steps, channels)`, or `(batch, channels, steps)` for `"channels_first"`.

    Output shape:
        As a stock `Conv1D`: `(batch, new_steps, filters)`, or channels first.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the input's
            channels, if `rank` exceeds the full rank of a slice, or if the input is smaller than
            the window.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedConv1D
        >>> layer = FactorizedConv1D(8, 3, slices=2, rank=3, padding="same")
        >>> layer(np.ones((1, 5, 4), "float32")).shape
        TensorShape([1, 5, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(3, 2, 6), (1, 6, 8), (8,)]
    """

    _dimensions = 1
    _paddings = ("valid", "same", "causal")


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv2D(BaseFactorizedConv, keras.layers.Layer):
    """A two-dimensional convolution held as a grouped encoder and a pointwise decoder.

    The layer computes `activation(decoder(encoder(x)) + bias)`. The encoder is a convolution with
    the layer's kernel size, strides, padding and dilation over `slices` groups of channels, `rank`
    outputs each; the decoder is a pointwise convolution over all of them. It equals a
    stock `Conv2D` whose kernel, unfolded slice by slice, has rank `rank`; that kernel is
    `layer.kernel`.

    Weights, in this order: `encoder` `[kh, kw, channels / slices, slices * rank]` (slice i owns the
    outputs `i * rank` to `(i + 1) * rank - 1`), `decoder` `[1, 1, slices * rank, filters]`, `bias`
    `[filters]`. Together `rank * (slices * filters + channels * kh * kw)` parameters and the bias.

    Args:
        filters: int, number of output channels.
        kernel_size: int or tuple of 2 int, the encoder's window.
        slices: int, number of contiguous channel slices, k. Must divide the input's channels.
        rank: int, rank per slice, j; at most `min(channels / slices * kh * kw, filters)`.
        strides: int or tuple of 2 int. Default 1. Above 1 it excludes `dilation_rate` above 1.
        padding: `"valid"` or `"same"`. Default `"valid"`.
        data_format: `"channels_last"` or `"channels_first"`. Default: the Keras configuration's.
        dilation_rate: int or tuple of 2 int. Default 1.
        activation: str, callable or None, applied to the decoder's output.
        use_bias: bool, whether a bias is added after the decoder. Default `True`.
        encoder_initializer: initializer of the encoder. Default `"glorot_uniform"`.
        decoder_initializer: initializer of the decoder. Default `"glorot_uniform"`.
        bias_initializer: initializer of the bias. Default `"zeros"`.
        encoder_regularizer: optional regularizer of the encoder.
        decoder_regularizer: optional regularizer of the decoder.
        bias_regularizer: optional regularizer of the bias.
        activity_regularizer: optional regularizer of the layer's output.
        encoder_constraint: optional constraint of the encoder.
        decoder_constraint: optional constraint of the decoder.
        bias_constraint: optional constraint of the bias.
        encoder_form: `"auto"` (default), `"grouped"`, `"split"`, `"merged"` or `"recomposed"`: how
            the same numbers are computed. `"auto"` chooses by device, phase and sizes; see
            `keras_alds.layers.choose_form`. Weights and results do not depend on it (but for float
            rounding).
        scheme: int, the fold scheme: which axes of the window the decoder has, with their strides,
            padding and dilation, in place of the encoder. 0 (default): none, as above; 1: the
            height; 2: the width; 3: both. The weights' window axes follow, and `rank` is at most
            `min(channels / slices * encoder_window, filters * decoder_window)`.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)` for
        `"channels_first"`.

    Output shape:
        As a stock `Conv2D`: `(batch, new_height, new_width, filters)`, or channels first.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the input's
            channels, if `rank` exceeds the full rank of a slice, or if the input is smaller than
            the window.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedConv2D
        >>> layer = FactorizedConv2D(8, 3, slices=2, rank=3, padding="same")
        >>> layer(np.ones((1, 5, 5, 4), "float32")).shape
        TensorShape([1, 5, 5, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(3, 3, 2, 6), (1, 1, 6, 8), (8,)]
    """

    _dimensions = 2


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedConv3D(BaseFactorizedConv, keras.layers.Layer):
    """A three-dimensional convolution held as a grouped encoder and a pointwise decoder.

    The layer computes `activation(decoder(encoder(x)) + bias)`. The encoder is a convolution with
    the layer's kernel size, strides, padding and dilation over `slices` groups of channels, `rank`
    outputs each; the decoder is a pointwise convolution over all of them. It equals a
    stock `Conv3D` whose kernel, unfolded slice by slice, has rank `rank`; that kernel is
    `layer.kernel`.

    Weights, in this order: `encoder` `[kd, kh, kw, channels / slices, slices * rank]` (slice i
    owns the outputs `i * rank` to `(i + 1) * rank - 1`), `decoder` `[1, 1, 1, slices * rank,
    filters]`, `bias` `[filters]`. Together `rank * (slices * filters + channels * kd * kh * kw)`
    parameters and the bias. TensorFlow has no grouped 3D convolution on CPUs, so the form
    `"grouped"` is computed as `"split"`.

    Args:
        filters: int, number of output channels.
        kernel_size: int or tuple of 3 int, the encoder's window.
        slices: int, number of contiguous channel slices, k. Must divide the input's channels.
        rank: int, rank per slice, j; at most
            `min(channels / slices * kd * kh * kw, filters)`.
        strides: int or tuple of 3 int. Default 1. Above 1 it excludes `dilation_rate` above 1.
        padding: `"valid"` or `"same"`. Default `"valid"`.
        data_format: `"channels_last"` or `"channels_first"`. Default: the Keras configuration's.
        dilation_rate: int or tuple of 3 int. Default 1.
        activation: str, callable or None, applied to the decoder's output.
        use_bias: bool, whether a bias is added after the decoder. Default `True`.
        encoder_initializer: initializer of the encoder. Default `"glorot_uniform"`.
        decoder_initializer: initializer of the decoder. Default `"glorot_uniform"`.
        bias_initializer: initializer of the bias. Default `"zeros"`.
        encoder_regularizer: optional regularizer of the encoder.
        decoder_regularizer: optional regularizer of the decoder.
        bias_regularizer: optional regularizer of the bias.
        activity_regularizer: optional regularizer of the layer's output.
        encoder_constraint: optional constraint of the encoder.
        decoder_constraint: optional constraint of the decoder.
        bias_constraint: optional constraint of the bias.
        encoder_form: str, how the numbers are computed; see `FactorizedDense`. Default `"auto"`.
        scheme: int, the fold scheme. 0 (default): the window is the encoder's, as above. 3: the
            encoder is pointwise and the decoder has the window, with its strides, padding and
            dilation. The weights' window axes follow, and `rank` is at most
            `min(channels / slices, filters * window)`.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        `(batch, depth, height, width, channels)`, or channels first for `"channels_first"`.

    Output shape:
        As a stock `Conv3D`: `(batch, new_depth, new_height, new_width, filters)`, or
        channels first.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the input's
            channels, if `rank` exceeds the full rank of a slice, or if the input is smaller than
            the window.

    Source:
        Liebenwein et al., NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedConv3D
        >>> layer = FactorizedConv3D(8, 3, slices=2, rank=3, padding="same")
        >>> layer(np.ones((1, 5, 5, 5, 4), "float32")).shape
        TensorShape([1, 5, 5, 5, 8])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(3, 3, 3, 2, 6), (1, 1, 1, 6, 8), (8,)]
    """

    _dimensions = 3


class BaseConvolution(KernelKind):
    """The base of all kinds with a window."""

    copied: ClassVar[tuple[str, ...]] = (
        "filters",
        "kernel_size",
        "strides",
        "padding",
        "data_format",
        "dilation_rate",
    )

    def channels(self, layer: Any) -> int:
        """The channels of the layer's input."""
        return self.shape(layer)[-2]

    def input_shape(self, layer: Any) -> Shape:
        spatial = (None,) * len(layer.kernel_size)
        if layer.data_format == "channels_first":
            return (None, self.channels(layer), *spatial)
        return (None, *spatial, self.channels(layer))

    def patches(self, layer: Any, inputs: Array) -> Iterator[Array]:
        return patch_chunks(
            inputs,
            layer.kernel_size,
            strides=layer.strides,
            dilation=layer.dilation_rate,
            padding=layer.padding,
        )

    def batches(self, layer: Any, inputs: Array) -> Array:
        inputs = channels_last(layer, inputs)
        first = inputs.ndim - 1 - len(layer.kernel_size)
        return np.reshape(inputs, (-1, *inputs.shape[first:]))

    def positions(self, layer: Any, inputs: Shape, outputs: Shape) -> Shape:
        return without_channels(layer, outputs)


class Convolution(BaseConvolution):
    """`Conv1D` and `Conv2D`."""

    output_axes = (-1,)
    equalized = measured = encodes = decodes = True

    def unfolding(self, layer: Any) -> Unfolding:
        return convolution_unfolding(len(layer.kernel_size))

    def schemes(self, layer: Any) -> dict[int, int]:
        return distinct_schemes(layer.kernel_size)

    def folded(self, layer: Any, scheme: int) -> Unfolding:
        return convolution_unfolding(len(layer.kernel_size), 0 if is_chain(scheme) else scheme)

    def is_decoder(self, layer: Any, bias: bool) -> bool:
        # A padded window reads zeros, not the first layer's bias.
        pointwise = math.prod(layer.kernel_size) == 1
        return super().is_decoder(layer, bias) and layer.groups == 1 and (pointwise or not bias)

    def refusal(self, layer: Any) -> str | None:
        groups = layer.groups
        return f"its convolution is already grouped (groups={groups})" if groups != 1 else None

    def encoded(self, layer: Any, inputs: Array) -> Array:
        x = tensors.tensor(self.batches(layer, inputs))
        settings = {**layer.window(decoder=False), "data_format": "channels_last"}
        del settings["kernel_size"]
        encoder = tensors.cast(tensors.tensor(layer.encoder), x.dtype)
        y = forms.convolve_encoder(x, encoder, slices=layer.slices, form="grouped", **settings)
        return np.asarray(y)

    def timed_call(self, layer: Any, shape: Sequence[int]) -> dict[str, Any]:
        kernel, strides, dilation = (
            tuple(map(int, value))
            for value in (layer.kernel_size, layer.strides, layer.dilation_rate)
        )
        axes, padding = len(kernel), layer.padding
        batch, sizes = shape[: -axes - 1], list(shape[-axes - 1 :])
        if layer.data_format == "channels_first":
            sizes = [*sizes[1:], sizes[0]]
        if padding == "causal":
            sizes[0] += dilation[0] * (kernel[0] - 1)
            padding = "valid"
        if axes == 1:  # runs as a 2D convolution of height one
            sizes, kernel = [1, *sizes], (1, *kernel)
            strides, dilation = (strides[0], strides[0]), (1, *dilation)
        return {
            "kind": "conv",
            "input": (math.prod(batch), *sizes),
            "filters": int(layer.filters),
            "kernel": kernel,
            "strides": strides,
            "padding": padding,
            "dilation": dilation,
        }

    def encoder_positions(self, layer: Any, scheme: int, inputs: Shape, outputs: Shape) -> Shape:
        # The encoder's outputs have the input's length along the decoder's axes.
        found = list(self.positions(layer, inputs, outputs))
        before = without_channels(layer, inputs)
        first = len(found) - len(layer.kernel_size)
        # The first part of a chain is pointwise.
        for axis in decoder_axes(3 if is_chain(scheme) else scheme, len(layer.kernel_size)):
            found[first + axis] = before[first + axis]
        return tuple(found)

    def earlier_positions(
        self, layer: Any, scheme: int, inputs: Shape, outputs: Shape
    ) -> list[Shape]:
        found = super().earlier_positions(layer, scheme, inputs, outputs)
        if scheme == CP:  # the height first, as an encoder in fold scheme 2
            found.append(self.encoder_positions(layer, 2, inputs, outputs))
        return [*found, self.positions(layer, inputs, outputs)] if is_chain(scheme) else found

    def written_out(self, writer: Writer, layer: Any, axes: int) -> list[Any]:
        conv = getattr(writer.layers, f"Conv{len(layer.kernel_size)}D")
        decoder = conv(layer.filters, **layer.window(decoder=True), **writer.decoder_options(layer))
        encoder = encoder_convolution(writer, layer, axes, **layer.window(decoder=False))
        return writer.pair(layer, encoder, decoder)


class Convolution3D(Convolution):
    """`Conv3D`; LiteRT measures and quantizes convolutions of at most two axes."""

    measured = encodes = decodes = False


def pointwise(layer: Any) -> dict[str, Any]:
    """The settings of a pointwise convolution with a layer's data format."""
    ones = (1,) * len(layer.kernel_size)
    return {
        "kernel_size": ones,
        "strides": ones,
        "padding": "valid",
        "dilation_rate": ones,
        "data_format": layer.data_format,
    }


def encoder_convolution(
    writer: Writer,
    layer: Any,
    axes: int,
    *,
    part: str = "encoder",
    slices: int | None = None,
    constrained: bool = True,
    **settings: Any,
) -> Any:
    """The stock convolution, grouped or depthwise, that replaces an encoder, with its weights.

    Args:
        writer: Helper that collects weights and warnings.
        layer: The factorized layer.
        axes: Number of axes of its input.
        part: Name of the factor. Defaults to the encoder.
        slices: Its groups of channels. Defaults to the layer's slices.
        constrained: Whether the encoder's constraint is kept. Defaults to True.
        **settings: Kernel size, strides, padding, dilation and data format.
    """
    size = settings["kernel_size"]
    factor = getattr(layer, part)
    slices = layer.slices if slices is None else slices
    values = writer.value(factor)
    per_slice, hidden = values.shape[-2:]
    common = writer.encoder_options(layer, part)
    if not constrained:
        common["kernel_constraint"] = None
    if (
        len(size) == 2
        and axes == 4
        and 1 == per_slice < slices
        and len(set(settings["strides"])) == 1
        and common["kernel_constraint"] is None
    ):
        for name in ("initializer", "regularizer", "constraint"):
            common[f"depthwise_{name}"] = common.pop(f"kernel_{name}")
        encoder = writer.layers.DepthwiseConv2D(
            depth_multiplier=hidden // slices, **common, **settings
        )
        shape: tuple[int, ...] = (*size, slices, hidden // slices)
    else:
        conv = getattr(writer.layers, f"Conv{len(size)}D")
        encoder = conv(hidden, groups=slices, **common, **settings)
        shape = (*size, per_slice, hidden)
    writer.record(layer, encoder, [values.reshape(shape)], [factor])
    return encoder


register(
    Convolution("Conv1D", FactorizedConv1D),
    Convolution("Conv2D", FactorizedConv2D),
    Convolution3D("Conv3D", FactorizedConv3D),
)
