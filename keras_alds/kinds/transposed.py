"""Factorized transposed convolutions: arguments, weights, call, shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import tensorflow as tf

from keras_alds.core.slicing import Unfolding, transposed_unfolding
from keras_alds.kinds import forms as _forms
from keras_alds.kinds.factorized import FactorizedConvMixin


class FactorizedConvTransposeMixin(FactorizedConvMixin):
    """A factorized transposed convolution over `_dimensions` spatial axes.

    The encoder is pointwise and the decoder is the transposed convolution, so that both work at the
    input's positions: per weight this takes the fewest multiply–accumulates, since an upsampled map
    has more positions.
    """

    _folds: ClassVar[bool] = False
    # Whether the stock layer heeds its `dilation_rate`.
    _dilates: ClassVar[bool] = True

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        slices: int,
        rank: int,
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        output_padding: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filters, kernel_size, slices, rank, strides=strides, padding=padding, **kwargs
        )
        self.output_padding = self._checked_output_padding(output_padding)
        if not self._dilates:
            self.dilation_rate = (1,) * self._dimensions

    def _checked_output_padding(self, value: Any) -> tuple[int, ...] | None:
        if value is None:
            return None
        items = tuple(value) if isinstance(value, Sequence) else (value,) * self._dimensions
        if (
            len(items) != self._dimensions
            or not all(isinstance(item, int) and item >= 0 for item in items)
            or any(item >= stride for item, stride in zip(items, self.strides, strict=True))
        ):
            raise ValueError(
                "Expected `output_padding` to be None, or along every axis an integer from 0 to "
                f"the stride less 1. Received: output_padding={value!r}, strides={self.strides}"
            )
        return items

    @property
    def unfolding(self) -> Unfolding:
        """How the dense kernel `[*kernel_size, filters, channels]` is read; see `core.slicing`."""
        return transposed_unfolding(self._dimensions)

    def _dense_shape(self, channels: int) -> tuple[int, ...]:
        return (*self.kernel_size, self.filters, channels)

    def _factor_shapes(
        self, per_slice: int, hidden: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ones = (1,) * self._dimensions
        return (*ones, per_slice, hidden), (*self.kernel_size, self.filters, hidden)

    def _convolve(self, x: Any, data_format: str, training: Any) -> Any:
        dimensions = self._dimensions
        last = data_format == "channels_last"
        spatial = x.shape[1:-1] if last else x.shape[2:]
        form = self._form(
            channels=x.shape[-1] if last else x.shape[1],
            filters=math.prod(self.kernel_size) * self.filters,
            kernel_size=(1,) * dimensions,
            positions=_forms.count_positions([x.shape[0], *spatial]),
            training=training,
        )
        encoder, decoder = self._factors(x.dtype)
        if form == "recomposed":
            kernel = self._recomposed(encoder, decoder)
        else:
            x = _forms.convolve_encoder(
                x,
                encoder,
                slices=self.slices,
                form=form,
                strides=(1,) * dimensions,
                padding="valid",
                dilation_rate=(1,) * dimensions,
                data_format=data_format,
            )
            kernel = decoder
        dynamic = tf.shape(x)
        lengths = []
        for axis, length in enumerate(spatial):
            known = dynamic[axis + (1 if last else 2)] if length is None else length
            lengths.append(self._output_length(known, axis))
        return tf.nn.conv_transpose(
            x,
            kernel,
            [dynamic[0], *lengths, self.filters] if last else [dynamic[0], self.filters, *lengths],
            strides=list(self.strides),
            padding=self.padding.upper(),
            data_format=_forms.tf_data_format(data_format, dimensions),
            dilations=list(self.dilation_rate),
        )

    def _output_length(self, length: Any, axis: int) -> Any:
        size = self.dilation_rate[axis] * (self.kernel_size[axis] - 1) + 1
        stride = self.strides[axis]
        if self.output_padding is not None:
            cut = 2 * (size // 2) if self.padding == "same" else 0
            return (length - 1) * stride + size - cut + self.output_padding[axis]
        return length * stride + (max(size - stride, 0) if self.padding == "valid" else 0)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "output_padding": self.output_padding}
