"""Finds channels that one layer makes, that stay apart, and that one pointwise convolution reads.

In the blocks of mobile networks, a convolution makes channels, a depthwise convolution and all
between filter each of them alone, and a 1×1 convolution reads them. Such channels can be removed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from keras_alds import _backend
from keras_alds._backend import tensors as nest
from keras_alds.models.inventory import Inventory

# Activations that treat each number alone.
_ELEMENTWISE = frozenset(
    (
        *("celu", "elu", "exponential", "gelu", "hard_sigmoid", "hard_silu"),
        *("hard_swish", "hard_tanh", "leaky_relu", "linear", "mish", "relu"),
        *("relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "swish", "tanh"),
    )
)


@dataclasses.dataclass(frozen=True)
class Channels:
    """Channels between two convolutions.

    Attributes:
        path: Path of the layer that reads them.
        maker: The convolution that makes them.
        between: The layers through which they pass, one of them a depthwise convolution.
        reader: The pointwise convolution that reads them.
    """

    path: str
    maker: Any
    between: tuple[Any, ...]
    reader: Any

    @property
    def count(self) -> int:
        """The number of channels."""
        return int(self.reader.kernel.shape[-2])


def find_channels(inventory: Inventory) -> tuple[list[Channels], dict[str, str]]:
    """The channels of a symbolic model that can be removed.

    Returns:
        The channels in the order of the model, and for every other pointwise convolution that
        reads a depthwise one, by path, why its channels stay.
    """
    finder = _Finder(inventory)
    found: list[Channels] = []
    reasons: dict[str, str] = {}
    for record in inventory.records:
        if not finder.is_pointwise(record.layer):
            continue
        maker, between, reason = finder.traced(record.layer)
        if not any(map(finder.is_depthwise, between)):
            continue
        if record.layer.data_format == "channels_first":
            reason = f"'{record.layer.name}' is channels_first"
        if reason is None and record.excluded:
            reason = "it is excluded"
        if reason is None and not finder.is_rebuilt(record.layer):
            reason = "it is inside a wrapper or a layer that calls it in Python code"
        if reason is not None:
            reasons[record.path] = reason
        else:
            found.append(Channels(record.path, maker, tuple(between), record.layer))
    return found, reasons


class _Finder:
    """The graphs of a model, nested ones included."""

    def __init__(self, inventory: Inventory) -> None:
        backend = inventory.backend
        self._keras = backend.keras
        self._calls: dict[Any, list[_backend.GraphCall]] = {}
        self._writers: dict[int, _backend.GraphCall] = {}
        self._reads: dict[int, int] = {}
        self._rebuilt: set[Any] = {inventory.model}
        pending = [inventory.model]
        while pending:
            for call in backend.graph(pending.pop()):
                if call.layer not in self._rebuilt and backend.is_symbolic(call.layer):
                    pending.append(call.layer)
                self._rebuilt.add(call.layer)
        models = [inventory.model, *(layer for _, layer in inventory.layers)]
        for model in models:
            if not backend.has_graph(model):
                continue
            for call in backend.graph(model):
                self._calls.setdefault(call.layer, []).append(call)
                self._writers.update((id(tensor), call) for tensor in call.outputs)
                for tensor in nest.flatten((call.args, call.kwargs)):
                    self._reads[id(tensor)] = self._reads.get(id(tensor), 0) + 1
            for tensor in nest.flatten(backend.graph_ends(model)[1]):
                self._reads[id(tensor)] = self._reads.get(id(tensor), 0) + 1

    def traced(self, reader: Any) -> tuple[Any, list[Any], str | None]:
        """What made the input of a layer, what lies between, and why it cannot be cut, or None."""
        between: list[Any] = []
        layer, form = reader, reader.data_format
        while True:
            calls = self._calls.get(layer, [])
            if len(calls) != 1:
                return None, between, f"'{layer.name}' is called {len(calls)} times"
            tensors = [
                tensor
                for tensor in nest.flatten((calls[0].args, calls[0].kwargs))
                if id(tensor) in self._writers
            ]
            call = self._writers[id(tensors[0])] if len(tensors) == 1 else None
            if call is None:
                return None, between, f"'{layer.name}' has several inputs"
            layer = call.layer
            if self._reads[id(tensors[0])] > 1:
                return None, between, f"the output of '{layer.name}' is used elsewhere too"
            if self._is_convolution(layer, form):
                made_once = len(self._calls[layer]) == 1
                reason = None if made_once else f"'{layer.name}' is called several times"
                return layer, between, reason
            if not self._keeps_channels_apart(layer, form):
                reason = f"'{layer.name}' ({type(layer).__name__}) may mix channels"
                return None, between, reason
            between.insert(0, layer)

    def is_rebuilt(self, layer: Any) -> bool:
        """Whether `GraphRebuilder` replaces a layer, not what holds it."""
        return layer in self._rebuilt

    def is_pointwise(self, layer: Any) -> bool:
        """Whether a layer is a stock 1×1 convolution."""
        return self._is_plain(layer) and tuple(layer.kernel_size) == (1, 1)

    def is_depthwise(self, layer: Any) -> bool:
        """Whether a layer is a stock depthwise convolution with one filter for each channel."""
        return (
            type(layer) is self._keras.layers.DepthwiseConv2D
            and layer.depth_multiplier == 1
            and self._is_elementwise(layer)
        )

    def _is_convolution(self, layer: Any, form: str) -> bool:
        return self._is_plain(layer) and layer.data_format == form and self._is_elementwise(layer)

    def _is_plain(self, layer: Any) -> bool:
        return (
            type(layer) is self._keras.layers.Conv2D
            and layer.groups == 1
            and not getattr(layer, "lora_enabled", False)
        )

    def _is_elementwise(self, layer: Any) -> bool:
        name = self._keras.activations.serialize(layer.activation)
        return isinstance(name, str) and name in _ELEMENTWISE  # of custom ones it is a dict

    def _keeps_channels_apart(self, layer: Any, form: str) -> bool:
        stock = self._keras.layers
        if type(layer) is stock.Activation:
            return self._is_elementwise(layer)
        if type(layer) is stock.BatchNormalization:
            axis = layer.axis
            (axis,) = axis if isinstance(axis, (list, tuple)) else (axis,)
            return axis in ((-1, 3) if form == "channels_last" else (1, -3))
        if type(layer) is stock.ZeroPadding2D or self.is_depthwise(layer):
            return bool(layer.data_format == form)
        return type(layer) in (
            stock.ReLU,
            stock.LeakyReLU,
            stock.ELU,
            stock.Dropout,
            stock.SpatialDropout2D,
        )
