"""Chooses how many channels stay between two convolutions, and rebuilds the model with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds.core.calibration.channels import ChannelOrder, refitted
from keras_alds.core.calibration.curves import Curve
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.slicing import Array
from keras_alds.models.channels import Channels
from keras_alds.models.inventory import Inventory
from keras_alds.models.rebuild import GraphRebuilder
from keras_alds.models.resources import Macs

# Halvings of the logarithm of the price of a multiply–accumulate, and its limits.
_HALVINGS, _LIMITS = 60, (-60.0, 20.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """Channels that can be removed, and what that costs.

    Attributes:
        channels: The channels.
        moment: The second moment of the inputs of the layer that reads them.
        order: The order of their removal.
        curve: What an error of that layer does to the model's outputs, or None.
        multiple: Numbers of channels are multiples of it.
    """

    channels: Channels
    moment: SecondMoment
    order: ChannelOrder
    curve: Curve | None
    multiple: int

    @property
    def sizes(self) -> Array:
        """The numbers of channels that may stay."""
        count = self.channels.count
        return np.array([*range(self.multiple, count, self.multiple), count])


class MacsOfSizes:
    """Multiply–accumulates of a model with fewer channels.

    Attributes:
        total: Those of the model as it is.
    """

    def __init__(self, inventory: Inventory, candidates: Sequence[Candidate]) -> None:
        resource = Macs(inventory)
        self.total = resource.total
        self._candidates = candidates
        # The layers whose cost is proportional to the number of channels of each candidate.
        self._layers = [
            {c.channels.maker, c.channels.reader, *c.channels.between} for c in candidates
        ]
        affected = set().union(*self._layers)
        self._macs = {r.layer: resource.of(r) for r in inventory.records if r.layer in affected}

    def unit(self, index: int) -> float:
        """The cost of one channel of a candidate, if the others stay as they are."""
        layers = self._layers[index] & self._macs.keys()
        return sum(self._macs[x] for x in layers) / self._candidates[index].channels.count

    def of(self, sizes: Sequence[int]) -> float:
        """The cost of the model if so many channels of each candidate are left."""
        left = dict.fromkeys(self._macs, 1.0)
        for candidate, layers, size in zip(self._candidates, self._layers, sizes, strict=True):
            for layer in layers & left.keys():
                left[layer] *= size / candidate.channels.count
        return self.total - sum(macs * (1 - left[x]) for x, macs in self._macs.items())


def choose_sizes(
    candidates: Sequence[Candidate], macs: MacsOfSizes, cr: float
) -> tuple[list[int], float]:
    """The numbers of channels that remove `cr` at the least sum of divergences.

    Returns:
        The numbers, and the multiply–accumulates that are left. These are more than asked for if
        no numbers remove so much.
    """
    by_curve = all(candidate.curve is not None for candidate in candidates)

    def loss(candidate: Candidate) -> Array:
        errors = candidate.order.errors[candidate.sizes]
        return candidate.curve(errors) if by_curve and candidate.curve else errors

    tables = [
        (candidate.sizes, loss(candidate), candidate.sizes * macs.unit(index))
        for index, candidate in enumerate(candidates)
    ]

    def at(logarithm: float) -> list[int]:
        price = math.exp(logarithm)
        return [int(sizes[(lost + price * cost).argmin()]) for sizes, lost, cost in tables]

    limit = (1 - cr) * macs.total
    low, high = _LIMITS
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if macs.of(at(middle)) <= limit else (middle, high)
    sizes = at(high)
    return sizes, macs.of(sizes)


class Narrower(GraphRebuilder):
    """Rebuilds a model in which so many channels of each candidate are left.

    The layers that read them get other weights.
    """

    def __init__(self, backend: _backend.Backend, sizes: Sequence[tuple[Candidate, int]]) -> None:
        super().__init__(backend, backend)
        self._kept: dict[Any, Array] = {}
        self._fitted: dict[Any, Callable[[Array], tuple[Array, Array]]] = {}
        for candidate, size in sizes:
            channels = candidate.channels
            if size == channels.count:
                continue
            kept = candidate.order.kept(size)
            for layer in (channels.maker, *channels.between):
                self._kept[layer] = kept
            self._fitted[channels.reader] = _fit(candidate.moment, kept)

    def changed(self, layer: Any) -> tuple[dict[str, Any], list[Array], list[Any]]:
        """As for `GraphRebuilder`."""
        changes, values, origins = super().changed(layer)
        if layer in self._fitted:
            changes["use_bias"] = True
            bias = values[1] if layer.use_bias else 0.0
            kernel, gained = self._fitted[layer](values[0][0, 0])
            values = [
                new.astype(values[0].dtype)
                for new in (kernel[np.newaxis, np.newaxis], bias + gained)
            ]
            origins = [layer.kernel, layer.bias if layer.use_bias else None]
        if layer in self._kept:
            kept = self._kept[layer]
            stock = self.source.keras.layers
            deep = isinstance(layer, stock.DepthwiseConv2D)
            if isinstance(layer, stock.Conv2D) and not deep:
                changes["filters"] = len(kept)
            values = [
                value[:, :, kept] if deep and value.ndim == 4 else value[..., kept]
                for value in values
            ]
        return changes, values, origins


def _fit(moment: SecondMoment, kept: Array) -> Callable[[Array], tuple[Array, Array]]:
    return lambda kernel: refitted(kernel, moment, kept)
