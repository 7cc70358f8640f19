"""What a plan can limit: parameters and multiply–accumulates. `litert.latency` adds latency.

A resource says how much of it a model takes, and what the choices of a layer cost. Another one is
a class with the four members of `Resource`, handed to `models.selection`.
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
    """Something that a model takes and that a plan can limit.

    Attributes:
        name: Its name, as in `objective`.
    """

    name: str

    @property
    def total(self) -> int:
        """All that the model takes of it."""

    def costs(self, record: LayerRecord) -> Costs:
        """What the choices of a layer that can be factorized cost, all its calls together."""

    def skipped(self, record: LayerRecord) -> Skipped | None:
        """Why a layer is not factorized for this resource's sake, or None."""


class Params:
    """Parameters: the weights of kernels and factors, and biases that a method adds."""

    name = "params"

    def __init__(self, inventory: Inventory, method: Method) -> None:
        self._inventory, self._method = inventory, method

    @property
    def total(self) -> int:
        """All parameters of the model."""
        return self._inventory.params

    def added(self, record: LayerRecord) -> int:
        """Parameters that the method adds to a layer: those of a bias that it has not."""
        adds = self._method.factorize_with_bias and not getattr(record.layer, "use_bias", True)
        return (record.kernel_shape or (0,))[-1] if adds else 0

    def costs(self, record: LayerRecord) -> Costs:
        """One for every weight."""
        forms = tuple((scheme, record.shape_in(scheme), 1) for scheme in record.schemes)
        return WeightCosts(forms, 1, self.added(record))

    def skipped(self, record: LayerRecord) -> Skipped | None:
        """None: every kernel has parameters."""
        return None


class Macs:
    """Multiply–accumulates of one forward pass of one example.

    Every kind of layer counts its own in `Kind.macs`; a layer that is called several times counts
    every time.

    Args:
        inventory: The model.
        only: Whether nothing else is limited. A layer that the forward pass does not call is then
            not factorized.
    """

    name = "macs"

    def __init__(self, inventory: Inventory, *, only: bool = True) -> None:
        self._inventory, self._only = inventory, only

    @functools.cached_property
    def total(self) -> int:
        """All multiply–accumulates of the model."""
        return sum(map(self.of, self._inventory.records))

    def of(self, record: LayerRecord) -> int:
        """Those of one layer.

        Raises:
            ValueError: If an input or feature map has an unknown size.
        """
        calls = self._inventory.calls[record.layer]
        return sum(macs_of_call(record.layer, *shapes) for shapes in calls)

    def costs(self, record: LayerRecord) -> Costs:
        """A weight costs as much as there are positions that it works at."""
        unit = self.of(record) // max(record.kind.applied(record.layer), 1)
        forms = tuple(
            (scheme, record.shape_in(scheme), self._encoder_unit(record, scheme, unit))
            for scheme in record.schemes
        )
        return WeightCosts(forms, unit)

    def _encoder_unit(self, record: LayerRecord, scheme: int, unit: int) -> int:
        """The positions of the encoder, which in some fold schemes are not the decoder's."""
        if not scheme:
            return unit
        layer, kind = record.layer, record.kind
        return sum(
            size_of(layer, kind.encoder_positions(layer, scheme, *shapes))
            for shapes in self._inventory.calls[layer]
        )

    def skipped(self, record: LayerRecord) -> Skipped | None:
        """A table that rows are looked up in takes none: two factors would take more."""
        if record.kind.lookup:
            detail = "it looks rows of a table up, which takes no multiply–accumulates"
            return Skipped(Skip.NOT_COUNTED, detail)
        if self._only and not self.of(record):
            return Skipped(Skip.NOT_COUNTED, "the forward pass does not call it")
        return None


def count_macs(model: KerasModel) -> int:
    """Multiply–accumulates of one forward pass of `model` on one example.

    Counted are convolutions of every kind, Dense and EinsumDense layers, the kernels of LSTM, GRU
    and SimpleRNN layers, once for every time step, and their factorized forms. All other layers
    count as zero. A shared layer counts once for every call.

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
