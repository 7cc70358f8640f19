"""What the factorized layers of both Kerases share: arguments, weights, call, shapes, config."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import tensorflow as tf

from keras_alds.core.slicing import (
    Unfolding,
    convolution_unfolding,
    decoder_axes,
    distinct_schemes,
)
from keras_alds.kinds import forms as _forms

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


def checked_factorizations(
    argument: str, value: Any, names: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Slices and rank of some parts of a layer, `{name: {"slices": k, "rank": j}}`, checked.

    Args:
        argument: str, the constructor argument, for the error.
        value: what was given for it; None is no part.
        names: sequence of str, the parts that the layer has.

    Raises:
        ValueError: If `value` is no such dict.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(
        name in names and isinstance(choice, Mapping) and set(choice) == {"slices", "rank"}
        for name, choice in value.items()
    ):
        raise ValueError(
            f'Expected `{argument}` to be a dict such as {{"{names[0]}": {{"slices": 1, "rank": '
            f"8}}}}, with names of {names}. Received: {argument}={value!r}"
        )
    return {
        name: {key: _positive_int(choice[key], key) for key in ("slices", "rank")}
        for name, choice in value.items()
    }


class FactorizedMixin(_Base):
    """Arguments, weights and config that every factorized layer has.

    A subclass adds a Keras `Layer` as the last base and sets `_keras` to that Keras's module and
    `_shape_type` to the type its `compute_output_shape` returns.
    """

    _keras: ClassVar[Any]
    _shape_type: ClassVar[Any] = tuple
    # Every further weight that has an initializer, a regularizer and a constraint of its own.
    _parts: ClassVar[tuple[str, ...]] = _PARTS
    # Shape of the dense kernel that the factors stand for, in the stock layer's layout.
    kernel_shape: tuple[int, ...]

    @property
    def unfolding(self) -> Unfolding:
        """How the dense kernel is read as a matrix for every slice; see `core.slicing`."""
        raise NotImplementedError

    def _set_arguments(
        self,
        *,
        slices: Any,
        rank: Any,
        encoder_form: str,
        activation: Any = None,
        use_bias: bool = False,
        **parts: Any,
    ) -> None:
        """Check and store the arguments that all layers share."""
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
        self._set_parts(parts)

    def _set_parts(self, settings: dict[str, Any]) -> None:
        """Store initializers, regularizers and constraints by their argument's name."""
        for name, value in settings.items():
            module = getattr(self._keras, f"{name.rpartition('_')[2]}s")
            setattr(self, name, module.get(value))

    def _known_channels(self, channels: Any) -> int:
        if channels is None:
            raise ValueError(
                f"Expected the channel axis of the input of layer {self.name!r} to be known. "
                "Received: channels=None"
            )
        return int(channels)

    def _add_factors(self, kernel_shape: tuple[int, ...]) -> None:
        """Check slices and rank, and create encoder and decoder for a kernel of some shape."""
        *spatial, channels, filters = self.unfolding.shape(kernel_shape)
        if channels % self.slices:
            raise ValueError(
                "Expected the number of input channels to be divisible by `slices`. "
                f"Received: slices={self.slices}, channels={channels}"
            )
        unfolded = math.prod(spatial) * channels // self.slices
        if self.rank > min(unfolded, filters):
            raise ValueError(
                f"Expected `rank` to be at most {min(unfolded, filters)}, the full rank of an "
                f"unfolded slice (the smaller of {unfolded} and {filters}). "
                f"Received: rank={self.rank}"
            )
        self.kernel_shape = kernel_shape
        hidden = self.slices * self.rank
        per_slice = channels // self.slices
        for part, shape in zip(_PARTS, self._factor_shapes(per_slice, hidden), strict=False):
            self._add_part(part, shape)

    def _factor_shapes(
        self, per_slice: int, hidden: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of encoder and decoder."""
        *spatial, _, filters = self.unfolding.shape(self.kernel_shape)
        return (*spatial, per_slice, hidden), (hidden, filters)

    def _add_part(self, part: str, shape: tuple[int, ...]) -> None:
        weight = self.add_weight(
            name=part,
            shape=shape,
            initializer=getattr(self, f"{part}_initializer"),
            regularizer=getattr(self, f"{part}_regularizer"),
            constraint=getattr(self, f"{part}_constraint"),
            trainable=True,
            dtype=self.dtype,
        )
        setattr(self, part, weight)

    def _add_bias(self, width: int) -> None:
        if self.use_bias:
            self._add_part("bias", (width,))
        else:
            self.bias = None

    @property
    def kernel(self) -> Any:
        """The dense kernel that the factors stand for: a tensor of the stock kernel's shape.

        It is multiplied out at every access, in the variables' dtype, and gradients flow through it
        to both factors. Assign to `encoder` and `decoder`; the product cannot be assigned to.
        """
        if not self.built:
            raise AttributeError("You must build the layer before accessing `kernel`.")
        return self._recomposed(
            tf.convert_to_tensor(self.encoder), tf.convert_to_tensor(self.decoder)
        )

    def _recomposed(self, encoder: Any, decoder: Any) -> Any:
        return _forms.dense_kernel(encoder, decoder, self.slices, self.unfolding, self.kernel_shape)

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
        self,
        *,
        channels: int,
        filters: int,
        kernel_size: tuple[int, ...],
        positions: int,
        training: Any,
    ) -> str:
        if self.encoder_form != "auto":
            return self.encoder_form
        return _forms.choose_form(
            slices=self.slices,
            rank=self.rank,
            channels=channels,
            filters=filters,
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
            "slices": self.slices,
            "rank": self.rank,
            "activation": self._keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "activity_regularizer": self._keras.regularizers.serialize(self.activity_regularizer),
            "encoder_form": self.encoder_form,
        }
        for part in self._parts:
            for kind in ("initializer", "regularizer", "constraint"):
                value = getattr(self, f"{part}_{kind}")
                config[f"{part}_{kind}"] = getattr(self._keras, f"{kind}s").serialize(value)
        return config


class FactorizedConvMixin(FactorizedMixin):
    """A factorized convolution over `_dimensions` spatial axes."""

    _dimensions: ClassVar[int]
    _paddings: ClassVar[tuple[str, ...]] = ("valid", "same")
    # Whether the window may be shared between encoder and decoder by a fold scheme.
    _folds: ClassVar[bool] = True
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
        scheme: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.scheme = self._checked_scheme(scheme)
        self.filters = _positive_int(filters, "filters")
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
        """Check and store what a convolution has beside its weights."""
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
        """How the dense kernel `[*kernel_size, channels, filters]` is read; see `core.slicing`."""
        return convolution_unfolding(self._dimensions, self.scheme)

    def window(self, *, decoder: bool) -> dict[str, Any]:
        """Kernel size, strides, padding, dilation and data format of one of the two convolutions.

        Args:
            decoder: bool, whether of the decoder; else of the encoder.
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
        return {"kernel_size": size, **_forms.owned(settings, axes, decoder=decoder)}

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
        self.compute_output_shape(shape)  # complains of inputs that are too small
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
        y = self._convolve(x, data_format, training)
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

    def _convolve(self, x: Any, data_format: str, training: Any) -> Any:
        """Encoder and decoder on a tensor with one batch axis, without bias and activation."""
        last = data_format == "channels_last"
        spatial = x.shape[1:-1] if last else x.shape[2:]
        first, second = (self.window(decoder=part) for part in (False, True))
        form = self._form(
            channels=x.shape[-1] if last else x.shape[1],
            filters=self.filters * math.prod(second["kernel_size"]),
            kernel_size=first["kernel_size"],
            positions=_forms.count_positions([x.shape[0], *spatial], first["strides"]),
            training=training,
        )
        encoder, decoder = self._factors(x.dtype)
        return _forms.factorized_convolution(
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
        """How long a spatial axis of the output is: below 1 for an input that is too short."""
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


class FactorizedDenseMixin(FactorizedMixin):
    """A factorized dense layer on the last axis."""

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
        self.units = _positive_int(units, "units")
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
        self.input_spec = self._keras.layers.InputSpec(min_ndim=2)
        self.supports_masking = True

    @property
    def unfolding(self) -> Unfolding:
        """How the dense kernel `[channels, units]` is read; see `core.slicing`."""
        return convolution_unfolding(0)

    def build(self, input_shape: Any) -> None:
        """Create encoder, decoder and bias for inputs of `input_shape`."""
        channels = self._known_channels(tuple(input_shape)[-1])
        self._add_factors((channels, self.units))
        self._add_bias(self.units)
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
            filters=self.units,
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
        return {**super().get_config(), **self._shared_config(), "units": self.units}


def _known_or_dynamic(x: Any, count: int) -> list[Any]:
    """The last `count` axes of a tensor's shape: ints where known, else scalar tensors."""
    dynamic = None
    sizes: list[Any] = list(x.shape[x.shape.rank - count :])
    for axis, size in enumerate(sizes):
        if size is None:
            dynamic = tf.shape(x) if dynamic is None else dynamic
            sizes[axis] = dynamic[x.shape.rank - count + axis]
    return sizes
