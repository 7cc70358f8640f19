"""Dense layers: a block-diagonal encoder and a dense decoder along the last axis."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import keras
import numpy as np

from keras_alds._backend import tensors
from keras_alds._backend.layers import dtype_policy
from keras_alds.core.checks import positive_int
from keras_alds.core.slicing import Array, Unfolding, convolution_unfolding
from keras_alds.kinds import forms
from keras_alds.kinds.base import KernelKind, Shape, Writer, block_diagonal, register
from keras_alds.kinds.convolution import encoder_convolution
from keras_alds.kinds.factorized import FactorizedLayer


class BaseFactorizedDense(FactorizedLayer):
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
        self.units = positive_int(units, "units")
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
        """How the dense kernel `[channels, units]` unfolds; see `core.slicing`."""
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
            inputs: tensor `[batch, ..., channels]`, dense, sparse, or ragged before its last axis.
            training: bool or None; filled in by Keras. It changes the speed, never the result.

        Returns:
            Tensor `[batch, ..., units]`: ragged for ragged inputs, else dense.
        """
        if tensors.is_ragged(inputs):
            return tensors.on_rows(functools.partial(self.call, training=training), inputs)
        x = inputs if tensors.is_sparse(inputs) else tensors.tensor(inputs)
        x = tensors.cast(x, self.compute_dtype)
        leading, channels = x.shape[:-1], self.kernel_shape[0]
        form = self._form(
            channels=channels,
            filters=self.units,
            kernel_size=(),
            positions=forms.count_positions(list(leading)),
            training=training,
        )
        encoder, decoder = self._factors(x.dtype)
        rows = (
            x if len(leading) == 1 or tensors.is_sparse(x) else tensors.reshape(x, [-1, channels])
        )
        y = forms.factorized_matmul(rows, encoder, decoder, slices=self.slices, form=form)
        if self.use_bias:
            y += tensors.cast(tensors.tensor(self.bias), y.dtype)
        if len(leading) > 1:
            y = tensors.reshape(y, [*tensors.known_shape(x, len(leading) + 1)[:-1], self.units])
        elif not tensors.executing_eagerly():
            y.set_shape([leading[0], self.units])
        return y if self.activation is None else self.activation(y)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the output's shape for an input shape."""
        return self._shape_type([*tuple(input_shape)[:-1], self.units])

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), **self._shared_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="keras_alds")
class FactorizedDense(BaseFactorizedDense, keras.layers.Layer):
    """A dense layer held as a block-diagonal encoder and a dense decoder.

    The layer computes `activation(decoder(encoder(x)) + bias)` along the last axis. The encoder
    maps each of `slices` contiguous groups of inputs to `rank` values, the decoder maps all of them
    to `units`. It equals a stock `Dense` whose kernel has rank `rank` within every slice of its
    rows; that kernel is `layer.kernel`.

    Weights, in this order: `encoder` `[channels / slices, slices * rank]` (slice i owns the columns
    `i * rank` to `(i + 1) * rank - 1`), `decoder` `[slices * rank, units]`, `bias` `[units]`.
    Together `rank * (slices * units + channels)` parameters and the bias.

    Args:
        units: int, size of the output's last axis.
        slices: int, number of contiguous channel slices, k. Must divide the input's channels.
        rank: int, rank per slice, j; at most `min(channels / slices, units)`.
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
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Input shape:
        `(batch, ..., channels)`, at least two axes. Dense, sparse and ragged tensors; a ragged one
        must not be ragged in its last axis.

    Output shape:
        `(batch, ..., units)`.

    Raises:
        ValueError: If an argument is out of its range, if `slices` does not divide the input's
            channels, if `rank` exceeds the full rank of a slice, or if the last axis is unknown.

    Source:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS 2021 (arXiv 2107.11442), section 2.

    Example:
        >>> import numpy as np
        >>> from keras_alds.layers import FactorizedDense
        >>> layer = FactorizedDense(6, slices=2, rank=3)
        >>> layer(np.ones((2, 8), "float32")).shape
        TensorShape([2, 6])
        >>> [tuple(weight.shape) for weight in layer.weights]
        [(4, 6), (6, 6), (6,)]
    """


class Dense(KernelKind):
    """`Dense`."""

    copied: ClassVar[tuple[str, ...]] = ("units",)
    sample: ClassVar[tuple[Any, ...]] = (1,)
    output_axes: tuple[int, ...] | None = (-1,)
    encodes = decodes = measured = equalized = True

    def unfolding(self, layer: Any) -> Unfolding:
        return convolution_unfolding(0)

    def input_shape(self, layer: Any) -> Shape:
        return (None, self.shape(layer)[0])

    def encoded(self, layer: Any, inputs: Array) -> Array:
        x = tensors.tensor(self.batches(layer, inputs))
        encoder = tensors.cast(tensors.tensor(layer.encoder), x.dtype)
        return np.asarray(forms.encode(x, encoder, slices=layer.slices, form="grouped"))

    def timed_call(self, layer: Any, shape: Sequence[int]) -> dict[str, Any]:
        rows, channels = math.prod(shape[:-1]), shape[-1]
        return {"kind": "dense", "input": (rows, channels), "filters": int(layer.units)}

    def pieces(self, writer: Writer, layer: Any, shape: Shape, masked: bool) -> list[Any]:
        unknown = sum(size is None for size in shape[1:-1])
        no_reshape = masked or (unknown > 1 and len(shape) != 4)
        merged = layer.slices > 1 and no_reshape
        encoder, decoder = writer.once(
            layer, "pieces", lambda: self._factors(writer, layer, merged)
        )
        if isinstance(encoder, writer.layers.Dense) or len(shape) == 4:
            return [encoder, decoder]
        if merged:  # shared, and replaced before in a call that allows a Reshape
            raise ValueError(
                f"Expected all calls of the shared layer '{layer.name}' to have a mask, or none. "
                "Received: some of both. Remedy: skip it with `exclude=` when compressing, or "
                "compress it with `max_slices=1`."
            )
        hidden, channels = layer.slices * layer.rank, layer.slices * int(layer.encoder.shape[0])
        rows = (1 if len(shape) == 2 else -1, 1, channels)
        back = (*(-1 if size is None else size for size in shape[1:-1]), hidden)
        return [
            _reshape(writer, layer, "rows", rows),
            encoder,
            _reshape(writer, layer, "ranks", back),
            decoder,
        ]

    def _factors(self, writer: Writer, layer: Any, merged: bool) -> list[Any]:
        """Encoder and decoder; a merged encoder stores its zeros as weights."""
        decoder = writer.layers.Dense(layer.units, **writer.decoder_options(layer))
        if layer.slices > 1 and not merged:
            if layer.encoder_constraint is not None:
                writer.warn(
                    f"The encoder_constraint of '{layer.name}' is not copied: its "
                    "encoder becomes a convolution, whose kernel has other axes."
                )
            encoder = encoder_convolution(
                writer,
                layer,
                4,
                constrained=False,
                kernel_size=(1, 1),
                strides=(1, 1),
                padding="valid",
                dilation_rate=(1, 1),
                data_format="channels_last",
            )
            return writer.pair(layer, encoder, decoder)
        values = writer.value(layer.encoder)
        if merged:
            values = block_diagonal(values, layer.slices)
            warn_of_zeros(
                writer,
                layer,
                values,
                "Dense",
                "a mask, a sparse or ragged input, or several unknown sizes prevent a Reshape",
            )
        encoder = writer.layers.Dense(layer.slices * layer.rank, **writer.encoder_options(layer))
        writer.record(layer, encoder, [values], [layer.encoder])
        return writer.pair(layer, encoder, decoder)


def warn_of_zeros(writer: Writer, layer: Any, values: np.ndarray, kind: str, why: str) -> None:
    """Warns that the zeros of a block-diagonal encoder become weights."""
    writer.warn(
        f"The encoder of '{layer.name}' becomes one {kind} layer that stores its zeros too "
        f"({values.size:,} weights instead of {layer.encoder.shape[0]}×{layer.encoder.shape[1]}), "
        f"because {why}."
    )


def _reshape(writer: Writer, layer: Any, suffix: str, target: tuple[int, ...]) -> Any:
    def make() -> Any:
        name = writer.unique(f"{layer.name}_{suffix}")
        return writer.layers.Reshape(target, name=name, dtype=dtype_policy(layer))

    return writer.once(layer, (suffix, target), make)


#: The kind of `Dense`, which other kinds use too.
DENSE = Dense("Dense", FactorizedDense)
register(DENSE)
