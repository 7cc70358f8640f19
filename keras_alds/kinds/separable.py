"""Factorized separable convolutions: the depthwise part stays, the pointwise one is factorized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_alds.kinds import forms as _forms
from keras_alds.kinds.factorized import _PARTS, FactorizedConvMixin, _positive_int


class FactorizedSeparableConvMixin(FactorizedConvMixin):
    """A depthwise convolution over `_dimensions` spatial axes, then a factorized pointwise one."""

    _folds = False
    _parts = (*_PARTS, "depthwise")

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
        depth_multiplier: int = 1,
        depthwise_initializer: Any = "glorot_uniform",
        depthwise_regularizer: Any = None,
        depthwise_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filters,
            kernel_size,
            slices,
            rank,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            **kwargs,
        )
        if len(set(self.strides)) > 1:
            raise ValueError(
                "Expected equal `strides` along all axes of a separable convolution. "
                f"Received: strides={self.strides}"
            )
        self.depth_multiplier = _positive_int(depth_multiplier, "depth_multiplier")
        self._set_parts(
            {
                "depthwise_initializer": depthwise_initializer,
                "depthwise_regularizer": depthwise_regularizer,
                "depthwise_constraint": depthwise_constraint,
            }
        )

    def _dense_shape(self, channels: int) -> tuple[int, ...]:
        return (*(1,) * self._dimensions, channels * self.depth_multiplier, self.filters)

    def _factor_shapes(
        self, per_slice: int, hidden: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ones = (1,) * self._dimensions
        return (*ones, per_slice, hidden), (*ones, hidden, self.filters)

    def _add_weights(self, channels: int) -> None:
        self._add_factors(self._dense_shape(channels))
        self._add_part("depthwise", (*self.kernel_size, channels, self.depth_multiplier))
        self._add_bias(self.filters)

    @property
    def depthwise_kernel(self) -> Any:
        """The depthwise kernel, `[*kernel_size, channels, depth_multiplier]`."""
        return self.depthwise

    @property
    def pointwise_kernel(self) -> Any:
        """The dense pointwise kernel that the factors stand for; `kernel` by its stock name."""
        return self.kernel

    def _convolve(self, x: Any, data_format: str, training: Any) -> Any:
        x = _forms.depthwise(
            x,
            tf.cast(tf.convert_to_tensor(self.depthwise), x.dtype),
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=data_format,
        )
        last = data_format == "channels_last"
        ones = (1,) * self._dimensions
        form = self._form(
            channels=x.shape[-1] if last else x.shape[1],
            filters=self.filters,
            kernel_size=ones,
            positions=_forms.count_positions(
                [x.shape[0], *(x.shape[1:-1] if last else x.shape[2:])]
            ),
            training=training,
        )
        encoder, decoder = self._factors(x.dtype)
        return _forms.factorized_convolution(
            x,
            encoder,
            decoder,
            slices=self.slices,
            form=form,
            strides=ones,
            padding="valid",
            dilation_rate=ones,
            data_format=data_format,
        )

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "depth_multiplier": self.depth_multiplier}
