"""Counts the resources that a plan can limit: parameters and multiply–accumulates.

A resource gives the cost of a whole model, of a layer, and of every choice for it. To add one,
write a class with the members of `Resource`, name it in `keras_alds.resources`, and make it in
`choosing._resources`. `litert.latency` has one.
"""

from __future__ import annotations

import functools
from typing import Protocol

from keras_alds._backend.layers import KerasModel
from keras_alds.core.costs import Costs, WeightCosts
from keras_alds.core.methods import Method
from keras_alds.kinds.base import macs_of_call, size_of
from keras_alds.models.inventory import Inventory, LayerRecord
from keras_alds.plan import Skip, Skipped


class Resource(Protocol):
    """Something that a model uses and a plan can limit.

    Attributes:
        name: Its name in `keras_alds.resources.RESOURCES`.
        runtime: What it was measured with, or None if it is counted.
    """

    name: str
    runtime: str | None

    @property
    def total(self) -> int:
        """The cost of the whole model."""

    def of(self, record: LayerRecord) -> int | None:
        """The cost of a layer as it is, or None if this is unknown."""

    def costs(self, record: LayerRecord) -> Costs:
        """The costs of a layer's choices, summed over its calls."""

    def skipped(self, record: LayerRecord) -> Skipped | None:
        """Why a layer is skipped under this resource, or None."""


class Params:
    """Parameters: the weights of kernels and factors, and biases that a method adds."""

    name = "params"
    runtime: str | None = None

    def __init__(self, inventory: Inventory, method: Method) -> None:
        self._inventory, self._method = inventory, method

    @property
    def total(self) -> int:
        """All parameters of the model."""
        return self._inventory.params

    def of(self, record: LayerRecord) -> int:
        """Parameters of one layer, biases included."""
        return record.params

    def added(self, record: LayerRecord) -> int:
        """Parameters that the method adds to a layer: a bias, if it has none."""
        adds = self._method.factorize_with_bias and not getattr(record.layer, "use_bias", True)
        return (record.kernel_shape or (0,))[-1] if adds else 0

    def costs(self, record: LayerRecord) -> Costs:
        """One per weight."""
        forms = tuple((scheme, record.shape_in(scheme), 1) for scheme in record.schemes)
        return WeightCosts(forms, 1, self.added(record))

    def skipped(self, record: LayerRecord) -> Skipped | None:
        """None: every kernel has parameters."""
        return None


class Macs:
    """Multiply–accumulates of one forward pass of one example.

    `Kind.macs` counts them for each kind of layer. Every call of a layer counts.

    Args:
        inventory: The model.
        only: Whether nothing else is limited. Layers that the forward pass does not call are then
            skipped.
    """

    name = "macs"
    runtime: str | None = None

    def __init__(self, inventory: Inventory, *, only: bool = True) -> None:
        self._inventory, self._only = inventory, only

    @functools.cached_property
    def total(self) -> int:
        """All multiply–accumulates of the model."""
        return sum(map(self.of, self._inventory.records))

    def of(self, record: LayerRecord) -> int:
        """Multiply–accumulates of one layer.

        Raises:
            ValueError: If an input or feature map has an unknown size.
        """
        calls = self._inventory.calls[record.layer]
        return sum(macs_of_call(record.layer, *shapes) for shapes in calls)

    def costs(self, record: LayerRecord) -> Costs:
        """One per weight and position at which it is applied."""
        unit = self.of(record) // max(record.kind.weights_per_position(record.layer), 1)
        forms = tuple(
            (scheme, record.shape_in(scheme), self._units(record, scheme, unit))
            for scheme in record.schemes
        )
        return WeightCosts(forms, unit)

    def _units(self, record: LayerRecord, scheme: int, unit: int) -> int | tuple[int, ...]:
        """The numbers of positions of all parts but the last, which may differ from its own."""
        if not scheme:
            return unit
        layer, kind = record.layer, record.kind
        calls = [
            [size_of(layer, some) for some in kind.earlier_positions(layer, scheme, *shapes)]
            for shapes in self._inventory.calls[layer]
        ]
        return tuple(map(sum, zip(*calls, strict=True))) if calls else 0

    def skipped(self, record: LayerRecord) -> Skipped | None:
        """Skips lookup tables, which use no multiply–accumulates, and layers without calls."""
        if record.kind.lookup:
            detail = "it looks up rows of a table, which takes no multiply–accumulates"
            return Skipped(Skip.NOT_COUNTED, detail)
        if self._only and not self.of(record):
            return Skipped(Skip.NOT_COUNTED, "the forward pass does not call it")
        return None


def count_macs(model: KerasModel) -> int:
    """Multiply–accumulates of one forward pass of `model` on one example.

    Convolutions of every kind, Dense and EinsumDense layers count, as do the kernels of LSTM, GRU
    and SimpleRNN layers in every time step, and all their factorized forms. All other layers
    count as zero. A shared layer counts once per call.

    Args:
        model: A built Keras 3 or tf_keras model whose input shape is known.

    Returns:
        The number of multiply–accumulates (half the number of floating-point operations).

    Raises:
        ValueError: If `model` is not a model, or its input shape has unknown dimensions.

    Example:
    >>> import keras
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
    >>> count_macs(model)  # 6·6 positions × 3·3·3 × 4
    3888
    """
    return Macs(Inventory.of(model)).total
