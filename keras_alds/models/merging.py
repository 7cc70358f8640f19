"""Moves BatchNormalization that follows an activation into the layers around it, before int8.

A file merges BatchNormalization with the convolution before it, unless an activation stands between
the two. Then it multiplies and adds, with one int8 scale for all channels. If their factors differ
much, small channels are lost. But ReLU(s·x) = s·ReLU(x) for s > 0. So the factors can go into the
layer before the activation, where every channel has a scale of its own. What is added goes into the
bias of the layer behind, if that layer pads with no zeros.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from keras_alds import _backend
from keras_alds.core.slicing import Array
from keras_alds.kinds.base import is_factorized, stock_kind
from keras_alds.models.ranges import Graph, held_once, symbolic_models
from keras_alds.models.turns import alone

# Layers through which positive factors pass, and those through which what is added passes.
_POOLS = ("MaxPooling{}D", "AveragePooling{}D", "GlobalMaxPooling{}D", "GlobalAveragePooling{}D")
_POOLING = tuple(name.format(axes) for name in _POOLS for axes in (1, 2, 3))
_SCALED = (*_POOLING, "Activation", "Dropout", "LeakyReLU", "ReLU")
_SHIFTED = (*_POOLING, "Dropout", "Flatten")


class Normalization(NamedTuple):
    """A BatchNormalization, the layer whose outputs it gets, and the layer that gets its own.

    Attributes:
        layer: The BatchNormalization.
        writer: A convolution or dense layer, an activation or none behind it.
        reader: A convolution or dense layer with a bias, which pads with no zeros, or None.
    """

    layer: Any
    writer: Any
    reader: Any


@contextlib.contextmanager
def merged(model: Any) -> Iterator[None]:
    """Within the context, BatchNormalization behind activations does as little as possible.

    Outputs stay the same up to float rounding. Afterwards, all weights have exactly their old
    values.

    Args:
        model: A built model; only graphs of Functional and Sequential models are looked at.
    """
    backend = _backend.backend_of(model)
    before: list[tuple[Any, Array]] = []

    def assign(variable: Any, value: Array) -> None:
        old = backend.value(variable)
        before.append((variable, old))
        variable.assign(value.astype(old.dtype))

    with alone(model):
        try:
            for found in find_normalizations(model):
                _merge(backend, found, assign)
            yield
        finally:
            for variable, value in reversed(before):  # a reader may be the next one's writer
                variable.assign(value)


def _merge(backend: _backend.Backend, found: Normalization, assign: Any) -> None:
    """Takes the factors out of one BatchNormalization, and what it adds if there is a reader."""
    layer, writer, reader = found

    def value(variable: Any) -> Array:
        return backend.value(variable).astype(np.float64)

    mean, variance = value(layer.moving_mean), value(layer.moving_variance)
    gamma = value(layer.gamma) if layer.scale else np.ones_like(mean)
    beta = value(layer.beta) if layer.center else np.zeros_like(mean)
    scale = np.where(gamma == 0, 1.0, np.abs(gamma)) / np.sqrt(variance + layer.epsilon)
    sign, shift = np.sign(gamma), beta - gamma * mean / np.sqrt(variance + layer.epsilon)
    kernel = writer.decoder if is_factorized(writer) else stock_kind(writer).variable(writer)
    changed = [(kernel, value(kernel) * scale)]
    if writer.use_bias:
        changed.append((writer.bias, value(writer.bias) * scale))
    changed.append((layer.moving_variance, np.full_like(variance, 1 - layer.epsilon)))
    if layer.scale:
        changed.append((layer.gamma, sign))
    if reader is None:
        changed.append((layer.moving_mean, mean * scale))
    else:
        weights = np.asarray(reader.kernel, np.float64)
        weights = weights.reshape(-1, *weights.shape[-2:]).sum(0)
        tiled = np.tile(shift, len(weights) // len(shift))  # of all positions that were flattened
        changed += [
            (reader.bias, value(reader.bias) + tiled @ weights),
            (layer.moving_mean, np.zeros_like(mean)),
        ]
        if layer.center:
            changed.append((layer.beta, np.zeros_like(beta)))
    if all(np.isfinite(new).all() for _, new in changed):
        for variable, new in changed:
            assign(variable, new)


# -- Finding them ----------------------------------------------------------------------------------


def find_normalizations(model: Any) -> list[Normalization]:
    """The BatchNormalization layers whose factors can go into the layer before an activation."""
    backend = _backend.backend_of(model)
    graph = Graph(backend, symbolic_models(model))
    held = held_once(model)
    found = []
    for layer, (call, *_) in graph.calls.items():
        if type(layer) is not backend.keras.layers.BatchNormalization or layer.epsilon >= 1:
            continue
        last = (-1, len(call.outputs[0].shape) - 1)
        if any(axis not in last for axis in np.atleast_1d(layer.axis)):  # a list in tf_keras
            continue
        if call.kwargs.get("training") or not _can_change(layer, held):
            continue  # statistics of a batch do not change with the factors
        writer, reader = _writer(backend, graph, layer), _reader(backend, graph, layer)
        if writer is not None and _can_change(writer, held):
            free = reader is not None and _can_change(reader, held)
            found.append(Normalization(layer, writer, reader if free else None))
    return found


def _can_change(layer: Any, held: set[int]) -> bool:
    """Whether no other layer has weights of this one."""
    return all(id(variable) in held for variable in layer.weights)


def _only(graph: Graph, layer: Any) -> Any:
    """The only call of a layer, or None."""
    calls = graph.calls.get(layer, [])
    return calls[0] if len(calls) == 1 else None


def _writer(backend: _backend.Backend, graph: Graph, layer: Any) -> Any:
    """The layer before an activation and poolings whose outputs nothing else reads, or None."""
    passed = tuple(getattr(backend.keras.layers, name) for name in _SCALED)
    behind: list[Any] = []
    while (call := _only(graph, layer)) is not None:
        writer = graph.writer(call)
        before = _only(graph, writer)
        if before is None or graph.reader(before) is not layer:
            return None
        layer = writer
        is_passed = type(layer) in passed
        if not (is_passed or _mixes(layer)) or not _is_homogeneous(backend, layer):
            return None
        if not is_passed:
            # Without an activation, the converter merges the two.
            activated = behind or layer.activation is not backend.keras.activations.linear
            return layer if activated else None
        behind.append(layer)
    return None


def _reader(backend: _backend.Backend, graph: Graph, layer: Any) -> Any:
    """The only layer that reads a layer's outputs, perhaps pooled, if it adds a bias; or None."""
    passed = tuple(getattr(backend.keras.layers, name) for name in _SHIFTED)
    while (call := _only(graph, layer)) is not None:
        layer = graph.reader(call)
        if layer is None or _only(graph, layer) is None:
            return None
        if type(layer) not in passed:
            pads = getattr(layer, "padding", "valid") != "valid"
            if not _mixes(layer) or (pads and math.prod(layer.kernel_size) > 1):
                return None
            return layer if layer.use_bias else None
    return None


def _mixes(layer: Any) -> bool:
    """Whether a layer is a convolution without groups or a dense layer, factorized or not."""
    kind = stock_kind(layer)
    known = kind.decodes and (is_factorized(layer) or kind.is_stock(layer)) and layer.built
    first = getattr(layer, "data_format", None) == "channels_first"
    adapted = getattr(layer, "lora_enabled", False)  # its kernel is no variable
    return known and not first and not adapted and getattr(layer, "groups", 1) == 1


def _is_homogeneous(backend: _backend.Backend, layer: Any) -> bool:
    """Whether s times the inputs, and s times the bias, give s times the outputs for s > 0."""
    functions = backend.keras.activations
    if isinstance(layer, backend.keras.layers.ReLU):
        return layer.max_value is None and not layer.threshold
    return getattr(layer, "activation", None) in (None, functions.linear, functions.relu)
