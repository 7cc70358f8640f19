"""What the factorized layers of both Kerases share: arguments, weights, call, shapes, config."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import tensorflow as tf

from keras_alds.layers import _forms

# The real bases are the two `Layer` classes; a type checker sees neither through a mixin.
if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object

_PARTS = ("encoder", "decoder", "bias")


def _positive_int(value: Any, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"Expected `{name}` to be a positive integer. Received: {name}={value!r}")
    return number


def _int_tuple(value: Any, length: int, name: str) -> tuple[int, ...]:
    message = (
        f"Expected `{name}` to be a positive integer or a tuple of {length} positive integers. "
        f"Received: {name}={value!r}"
    )
    items = tuple(value) if isinstance(value, Sequence) else (value,) * length
    if len(items) != length:
        raise ValueError(message)
    try:
        return tuple(_positive_int(item, name) for item in items)
    except ValueError:
        raise ValueError(message) from None


class FactorizedMixin(_Base):
    """Arguments, weights and config that every factorized layer has.

    A subclass adds a Keras `Layer` as the last base and sets `_keras` to that Keras's module and
    `_shape_type` to the type its `compute_output_shape` returns.
    """

    _keras: ClassVar[Any]
    _shape_type: ClassVar[Any] = tuple
    _width_name: ClassVar[str]  # "filters" or "units"

    def _set_arguments(
        self,
        *,
        width: Any,
        slices: Any,
        rank: Any,
        activation: Any,
        use_bias: bool,
        encoder_form: str,
        **parts: Any,
    ) -> None:
        """Check and store the arguments that convolutions and dense layers share."""
        setattr(self, self._width_name, _positive_int(width, self._width_name))
        self.slices = _positive_int(slices, "slices")
        self.rank = _positive_int(rank, "rank")
        if encoder_form != "auto" and encoder_form not in _forms.FORMS:
            raise ValueError(
                f"Expected `encoder_form` to be 'auto' or one of {_forms.FORMS}. "
                f"Received: encoder_form={encoder_form!r}"
            )
        self.encoder_form = encoder_form
        self.use_bias = bool(use_bias)
        self.activation = self._keras.activations.get(activation)
        for part in _PARTS:
            for kind in ("initializer", "regularizer", "constraint"):
                module = getattr(self._keras, f"{kind}s")
                setattr(self, f"{part}_{kind}", module.get(parts[f"{part}_{kind}"]))

    def _add_factors(self, channels: Any, kernel_size: tuple[int, ...]) -> int:
        """Check the input's channels, create encoder, decoder and bias, and return the channels."""
        if channels is None:
            raise ValueError(
                f"Expected the channel axis of the input of layer {self.name!r} to be known. "
                "Received: channels=None"
            )
        channels = int(channels)
        if channels % self.slices:
            raise ValueError(
                "Expected the number of input channels to be divisible by `slices`. "
                f"Received: slices={self.slices}, channels={channels}"
            )
        width = getattr(self, self._width_name)
        unfolded = channels // self.slices
        for size in kernel_size:
            unfolded *= size
        full_rank = min(unfolded, width)
        if self.rank > full_rank:
            raise ValueError(
                f"Expected `rank` to be at most {full_rank}, the full rank of an unfolded slice "
                f"(the smaller of {unfolded} and {self._width_name}={width}). "
                f"Received: rank={self.rank}"
            )
        hidden = self.slices * self.rank
        ones = (1,) * len(kernel_size)
        shapes = {
            "encoder": (*kernel_size, channels // self.slices, hidden),
            "decoder": (*ones, hidden, width),
            "bias": (width,),
        }
        for part in _PARTS:
            if part == "bias" and not self.use_bias:
                self.bias = None
                continue
            weight = self.add_weight(
                name=part,
                shape=shapes[part],
                initializer=getattr(self, f"{part}_initializer"),
                regularizer=getattr(self, f"{part}_regularizer"),
                constraint=getattr(self, f"{part}_constraint"),
                trainable=True,
                dtype=self.dtype,
            )
            setattr(self, part, weight)
        return channels

    @property
    def kernel(self) -> Any:
        """The dense kernel that the factors stand for: tensor `[*kernel_size, channels, filters]`.

        It is multiplied out at every access, in the variables' dtype, and gradients flow through it
        to both factors. Assign to `encoder` and `decoder`; the product cannot be assigned to.
        """
        if not self.built:
            raise AttributeError("You must build the layer before accessing `kernel`.")
        return _forms.recompose(
            tf.convert_to_tensor(self.encoder), tf.convert_to_tensor(self.decoder), self.slices
        )

    # What TF-MOT asks of a layer of one's own, by these names.

    def get_prunable_weights(self) -> list[Any]:
        """The weights that TF-MOT's `prune_low_magnitude` prunes: both factors."""
        return [self.encoder, self.decoder]

    def get_clusterable_weights(self) -> list[tuple[str, Any]]:
        """The weights that TF-MOT's `cluster_weights` clusters, by name: both factors."""
        return [("encoder", self.encoder), ("decoder", self.decoder)]

    def get_clusterable_algorithm(self, weight_name: str) -> None:
        """None: TF-MOT's own algorithm fits any shape."""

    def quantize(self, mode: Any = None, **kwargs: Any) -> None:
        """Say why the layer stays in float; Keras 3's `model.quantize` prints it as a warning."""
        raise NotImplementedError(
            f"{type(self).__name__} '{self.name}' stays in float: Keras quantizes Dense and "
            "Embedding layers, and no convolutions. Remedy: `keras_alds.expand` writes factorized "
            "dense layers of one slice out as two Dense layers, which it quantizes; for int8 "
            "convolutions see `keras_alds.litert.convert`."
        )

    def _factors(self, dtype: Any) -> tuple[Any, Any]:
        # Both Kerases autocast variables that are read inside `call`; the cast is for direct calls.
        return (
            tf.cast(tf.convert_to_tensor(self.encoder), dtype),
            tf.cast(tf.convert_to_tensor(self.decoder), dtype),
        )

    def _form(
        self, *, channels: int, kernel_size: tuple[int, ...], positions: int, training: Any
    ) -> str:
        if self.encoder_form != "auto":
            return self.encoder_form
        return _forms.choose_form(
            slices=self.slices,
            rank=self.rank,
            channels=channels,
            filters=getattr(self, self._width_name),
            kernel_size=kernel_size,
            positions=positions,
            # A symbolic flag (TF1 learning phase) cannot choose a form; every form may be trained.
            training=not tf.is_tensor(training) and bool(training),
            dtype=tf.as_dtype(self.compute_dtype).name,
            cpu=_forms.on_cpu(),
            xla=_forms.in_xla_trace(),
        )

    def _shared_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            self._width_name: getattr(self, self._width_name),
            "slices": self.slices,
            "rank": self.rank,
            "activation": self._keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "activity_regularizer": self._keras.regularizers.serialize(self.activity_regularizer),
            "encoder_form": self.encoder_form,
        }
        for part in _PARTS:
            for kind in ("initializer", "regularizer", "constraint"):
                value = getattr(self, f"{part}_{kind}")
                config[f"{part}_{kind}"] = getattr(self._keras, f"{kind}s").serialize(value)
        return config


class FactorizedConvMixin(FactorizedMixin):
    """A factorized convolution over `_dimensions` spatial axes."""

    _dimensions: ClassVar[int]
    _width_name = "filters"
    # The stock layers' own addition of the bias. Keras 3's takes a channels-first bias for one of
    # columns where there are as many columns as filters; a trained model relies on what it does.
    _add: ClassVar[Any] = staticmethod(tf.add)

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
        **kwargs: Any,
    ) -> None:
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self._set_arguments(
            width=filters,
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
        self.kernel_size = _int_tuple(kernel_size, self._dimensions, "kernel_size")
        self.strides = _int_tuple(strides, self._dimensions, "strides")
        self.dilation_rate = _int_tuple(dilation_rate, self._dimensions, "dilation_rate")
        if max(self.strides) > 1 and max(self.dilation_rate) > 1:
            raise ValueError(
                "Expected `strides` or `dilation_rate` to be 1 along every axis. "
                f"Received: strides={self.strides}, dilation_rate={self.dilation_rate}"
            )
        paddings = ("valid", "same", "causal") if self._dimensions == 1 else ("valid", "same")
        self.padding = str(padding).lower()
        if self.padding not in paddings:
            raise ValueError(
                f"Expected `padding` to be one of {paddings}. Received: padding={padding!r}"
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

    def _channel_axis(self) -> int:
        return -1 if self.data_format == "channels_last" else -1 - self._dimensions

    def build(self, input_shape: Any) -> None:
        """Create encoder, decoder and bias for inputs of `input_shape`."""
        shape = tuple(input_shape)
        axis = self._channel_axis()
        self.compute_output_shape(shape)  # complains of inputs that are too small
        channels = self._add_factors(shape[axis], self.kernel_size)
        self.input_spec = self._keras.layers.InputSpec(
            min_ndim=self._dimensions + 2, axes={axis: channels}
        )
        super().build(input_shape)

    def call(self, inputs: Any, training: Any = None) -> Any:
        """Apply encoder, decoder, bias and activation.

        Args:
            inputs: tensor `[batch, *spatial, channels]`, or `[batch, channels, *spatial]`.
            training: bool or None; filled in by Keras. It changes the speed, never the result.

        Returns:
            Tensor of the same layout with `filters` channels.
        """
        dimensions = self._dimensions
        x = tf.cast(tf.convert_to_tensor(inputs), self.compute_dtype)
        batch_shape = None
        if x.shape.rank > dimensions + 2:  # several batch axes, as stock layers allow
            batch_shape = tf.shape(x)[: -dimensions - 1]
            x = tf.reshape(x, [-1, *_known_or_dynamic(x, dimensions + 1)])
        data_format = self.data_format
        # TensorFlow's own CPU kernels are channels-last only.
        transposed = data_format == "channels_first" and _forms.on_cpu()
        if transposed:
            x = tf.transpose(x, [0, *range(2, dimensions + 2), 1])
            data_format = "channels_last"
        last = data_format == "channels_last"
        spatial = x.shape[1:-1] if last else x.shape[2:]
        channels = x.shape[-1] if last else x.shape[1]
        form = self._form(
            channels=channels,
            kernel_size=self.kernel_size,
            positions=_forms.count_positions([x.shape[0], *spatial], self.strides),
            training=training,
        )
        padding = self.padding
        if padding == "causal":
            left = [self.dilation_rate[0] * (self.kernel_size[0] - 1), 0]
            x = tf.pad(x, [[0, 0], left, [0, 0]] if last else [[0, 0], [0, 0], left])
            padding = "valid"
        encoder, decoder = self._factors(x.dtype)
        y = _forms.factorized_convolution(
            x,
            encoder,
            decoder,
            slices=self.slices,
            form=form,
            strides=self.strides,
            padding=padding,
            dilation_rate=self.dilation_rate,
            data_format=data_format,
        )
        if transposed:
            y = tf.transpose(y, [0, dimensions + 1, *range(1, dimensions + 1)])
        if self.use_bias:
            ones = [1] * dimensions
            last = self.data_format == "channels_last"
            bias = tf.cast(tf.convert_to_tensor(self.bias), y.dtype)
            shape = [1, *ones, self.filters] if last else [1, self.filters, *ones]
            y = self._add(y, tf.reshape(bias, shape))
        if batch_shape is not None:
            tail = tf.shape(y)[1:]
            y = tf.reshape(y, tf.concat([batch_shape, tail], axis=0))
        if not tf.executing_eagerly():
            y.set_shape(self.compute_output_shape(tuple(inputs.shape)))
        return y if self.activation is None else self.activation(y)

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
        settings = zip(
            rest[:-1] if last else rest[1:],
            self.kernel_size,
            self.strides,
            self.dilation_rate,
            strict=True,
        )
        for length, size, stride, dilation in settings:
            if length is None:
                lengths.append(None)
                continue
            reach = dilation * (size - 1) if self.padding == "valid" else 0
            out = (int(length) - reach - 1) // stride + 1
            if out < 1:
                raise ValueError(
                    f"Expected the input of layer {self.name!r} to be large enough for its "
                    f"kernel. Received: input_shape={shape}, kernel_size={self.kernel_size}, "
                    f"dilation_rate={self.dilation_rate}, padding={self.padding!r}"
                )
            lengths.append(out)
        out_rest = [*lengths, self.filters] if last else [self.filters, *lengths]
        return self._shape_type([*batch, *out_rest])

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {
            **super().get_config(),
            **self._shared_config(),
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "dilation_rate": self.dilation_rate,
        }


class FactorizedDenseMixin(FactorizedMixin):
    """A factorized dense layer on the last axis."""

    _width_name = "units"

    def __init__(
        self,
        units: int,
        slices: int,
        rank: int,
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
        **kwargs: Any,
    ) -> None:
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self._set_arguments(
            width=units,
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
        self.input_spec = self._keras.layers.InputSpec(min_ndim=2)
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        """Create encoder, decoder and bias for inputs of `input_shape`."""
        channels = self._add_factors(tuple(input_shape)[-1], ())
        self.input_spec = self._keras.layers.InputSpec(min_ndim=2, axes={-1: channels})
        super().build(input_shape)

    def call(self, inputs: Any, training: Any = None) -> Any:
        """Apply encoder, decoder, bias and activation along the last axis.

        Args:
            inputs: tensor `[batch, ..., channels]`.
            training: bool or None; filled in by Keras. It changes the speed, never the result.

        Returns:
            Tensor `[batch, ..., units]`.
        """
        x = tf.cast(tf.convert_to_tensor(inputs), self.compute_dtype)
        leading, channels = x.shape[:-1], x.shape[-1]
        form = self._form(
            channels=channels,
            kernel_size=(),
            positions=_forms.count_positions(list(leading)),
            training=training,
        )
        encoder, decoder = self._factors(x.dtype)
        rows = x if len(leading) == 1 else tf.reshape(x, [-1, channels])
        y = _forms.factorized_matmul(rows, encoder, decoder, slices=self.slices, form=form)
        if self.use_bias:
            y += tf.cast(tf.convert_to_tensor(self.bias), y.dtype)
        if len(leading) > 1:
            y = tf.reshape(y, [*_known_or_dynamic(x, len(leading) + 1)[:-1], self.units])
        elif not tf.executing_eagerly():
            y.set_shape([leading[0], self.units])
        return y if self.activation is None else self.activation(y)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the output's shape for an input shape."""
        return self._shape_type([*tuple(input_shape)[:-1], self.units])

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), **self._shared_config()}


def _known_or_dynamic(x: Any, count: int) -> list[Any]:
    """The last `count` axes of a tensor's shape: ints where known, else scalar tensors."""
    dynamic = None
    sizes: list[Any] = list(x.shape[x.shape.rank - count :])
    for axis, size in enumerate(sizes):
        if size is None:
            dynamic = tf.shape(x) if dynamic is None else dynamic
            sizes[axis] = dynamic[x.shape.rank - count + axis]
    return sizes
