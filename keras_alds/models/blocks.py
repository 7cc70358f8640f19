"""Finds the blocks of a network: layers whose outputs a refined model is to keep.

In a graph, a block ends with a residual add and the activation behind it. A graph without adds has
a block for every layer with a kernel, which ends behind BatchNormalization and activation. The
layers in the code of a subclassed model are its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras_alds import _backend
from keras_alds._backend import tensors
from keras_alds._backend.layers import called_function
from keras_alds.kinds.base import below

# Classes and functions of layers and graph operations that follow a kernel or an add in one block.
_ADDS = ("Add", "add", "math.add", "__operators__.add")
_ACTIVATIONS = (
    *("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "ThresholdedReLU"),
    *("Relu", "Relu6", "LeakyRelu", "Elu", "Gelu", "Silu", "Selu", "HardSwish", "HardSilu"),
    *("Sigmoid", "Tanh", "Softplus", "nn.relu", "nn.relu6", "nn.gelu", "nn.silu", "nn.elu"),
)
_BETWEEN = ("BatchNormalization", "Dropout", "SpatialDropout2D")


def blocks_of(model: Any) -> dict[str, Any]:
    """The last layers of a model's blocks, by names that the model's copies share."""
    found: dict[str, Any] = {}
    _Finder(_backend.backend_of(model), found).visit(model, "")
    return found


def shared_blocks(small: Any, original: Any) -> dict[str, tuple[Any, Any]]:
    """The blocks that two models have in common, by name."""
    ours, theirs = blocks_of(small), blocks_of(original)
    return {name: (ours[name], theirs[name]) for name in theirs if name in ours}


class _Finder:
    """Collects the blocks of a model and the models inside it.

    They are named after layers in graphs, and numbered in code: code that gives no names makes
    layers of other names in a copy.
    """

    def __init__(self, backend: _backend.Backend, found: dict[str, Any]) -> None:
        self._backend, self._found = backend, found
        self._numbered = False

    def visit(self, model: Any, prefix: str) -> None:
        if self._backend.runs_graph(model):
            self._visit_graph(model, prefix)
            return
        self._numbered = True
        kernels = _kernels_in(model)
        for number, child in enumerate(dict.fromkeys(self._backend.children(model))):
            inside = _kernels_in(child)
            # One part with nearly all kernels, such as a backbone, is no block, but has some.
            nearly_all = 2 * inside > kernels and inside > 1
            if self._backend.runs_graph(child) or (nearly_all and not _is_wrapper(child)):
                self.visit(child, f"{prefix}{number}/")
            elif inside:
                self._add(f"{prefix}{number}", child)

    def _visit_graph(self, model: Any, prefix: str) -> None:
        backend = self._backend
        calls = backend.graph(model)
        ends = {id(tensor) for tensor in tensors.flatten(backend.graph_ends(model)[1])}
        readers: dict[int, list[Any]] = {}
        for call in calls:
            for leaf in tensors.flatten((call.args, call.kwargs)):
                readers.setdefault(id(leaf), []).append(call)

        def last_of(call: Any, following: Sequence[str]) -> Any | None:
            """The call that ends the block of a call; None if that is the model's own output."""
            while id(call.outputs[0]) not in ends:
                after = readers.get(id(call.outputs[0]), [])
                if len(after) != 1 or kind_of_call(after[0].layer) not in following:
                    return call
                call = after[0]
            return None

        adds = [call for call in calls if _is_add(call)]
        for number, call in enumerate(adds):
            last = last_of(call, _ACTIVATIONS)
            if last is not None:
                self._add(f"{prefix}add {number}", last.layer)
        for number, call in enumerate(calls):
            if not isinstance(call.layer, backend.keras.layers.Layer):
                continue
            name = prefix + (str(number) if self._numbered else call.layer.name)
            if backend.runs_graph(call.layer):
                self.visit(call.layer, f"{name}/")
            elif not adds and _kernels_in(call.layer):
                last = last_of(call, (*_BETWEEN, *_ACTIVATIONS))
                if last is not None:
                    self._add(name, last.layer)

    def _add(self, name: str, layer: Any) -> None:
        if layer not in self._found.values():
            self._found[name] = layer


def kind_of_call(layer: Any) -> str:
    """The class of a layer or graph operation, or the function that it calls."""
    return called_function(layer) or type(layer).__name__


def _is_add(call: Any) -> bool:
    """Whether a call adds tensors of one shape, and no constants."""
    if kind_of_call(call.layer) not in _ADDS:
        return False
    added = [x for x in tensors.flatten((call.args, call.kwargs)) if hasattr(x, "shape")]
    shapes = {tuple(x.shape) for x in added}
    return len(added) > 1 and len(shapes) == 1


def _kernels_in(layer: Any) -> int:
    """The number of layers in a layer, itself included, that have a kernel."""
    backend = _backend.backend_of(layer)
    return sum(
        any(len(v.shape) > 1 for v in backend.own_variables(inner))
        for inner in dict.fromkeys([layer, *below(layer)])
    )


def _is_wrapper(layer: Any) -> bool:
    """Whether a layer runs another one, such as `TimeDistributed` and `Bidirectional`."""
    keras = _backend.backend_of(layer).keras
    return isinstance(layer, (keras.layers.Wrapper, keras.layers.RNN))
