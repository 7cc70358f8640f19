"""Depthwise convolutions: they have no factorized form."""

from __future__ import annotations

import math
from typing import Any

from keras_alds import _backend
from keras_alds.kinds.base import Kind, Shape, register, size_of, without_channels
from keras_alds.plan import Skip, Skipped


class Depthwise(Kind):
    """`DepthwiseConv1D` and `DepthwiseConv2D`."""

    output_axes = (-2, -1)  # channels and multiplier

    def skipped(self, layer: Any) -> Skipped | None:
        return Skipped(
            Skip.NO_FORM,
            "its kernel filters each channel separately, so it has no matrix to factorize",
        )

    def variable(self, layer: Any) -> Any:
        return _backend.backend_of(layer).own_variables(layer)[0]

    def macs(self, layer: Any, inputs: Shape, outputs: Shape) -> int:
        positions = size_of(layer, without_channels(layer, outputs))
        return positions * math.prod(self.variable(layer).shape)


class Depthwise2D(Depthwise):
    """`DepthwiseConv2D`, the only one that LiteRT has."""

    encodes = True


register(Depthwise("DepthwiseConv1D"), Depthwise2D("DepthwiseConv2D"))
