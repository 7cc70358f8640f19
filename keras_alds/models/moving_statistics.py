"""Moving statistics of BatchNormalization that fit a changed network.

Small errors of many layers add up: the inputs of a later BatchNormalization have another mean and
variance than in training. The moving statistics then no longer normalize them. Their values on a
few examples would not do either: these differ from those of the training data by chance, which
costs more than it gains. So the same examples are run through the original and through the changed
network, and the moving statistics follow what changes between them,

    σ'² + ε = r² (σ² + ε),   μ' = m̂ + r (μ − m),   r² = (v̂ + ε) / (v + ε),

with the mean m and variance v of a channel in the original network, m̂ and v̂ in the changed one.
A channel that was only scaled and moved is so put back exactly.
Each layer is corrected while the examples run, so that those behind it see corrected inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend import layers_of, tensors
from keras_alds._backend.calls import Replacement, replaced_calls
from keras_alds._backend.loops import compiled_loops, passing
from keras_alds.core.slicing import Array
from keras_alds.models.data import KeptExamples
from keras_alds.models.scale import Channels

# Entries of a call's inputs that are looked at: evenly spaced positions.
_ENTRIES = 1 << 20
# Variances change at most by this factor.
_MOST = 16.0


def batch_normalizations(model: Any) -> list[Any]:
    """The BatchNormalization layers of a model that normalize one axis."""
    kind = _backend.backend_of(model).keras.layers.BatchNormalization
    found = [layer for layer in layers_of(model) if isinstance(layer, kind) and layer.built]
    return [x for x in found if not isinstance(x.axis, (list, tuple)) or len(x.axis) == 1]


def axis_of(layer: Any) -> int:
    """The axis that a BatchNormalization normalizes."""
    return layer.axis[0] if isinstance(layer.axis, (list, tuple)) else layer.axis


def moving(layer: Any) -> tuple[Array, Array]:
    """The moving mean and variance of a BatchNormalization."""
    value = _backend.backend_of(layer).value
    mean, variance = value(layer.moving_mean), value(layer.moving_variance)
    return mean.astype(np.float64), variance.astype(np.float64)


def mapped(x: Any, axis: int, factor: Array, summand: Array) -> Any:
    """A tensor times a factor plus a summand, for every channel."""
    shape = [1] * len(x.shape)
    shape[axis] = -1
    kind = tensors.numpy_dtype(x.dtype)
    return x * factor.reshape(shape).astype(kind) + summand.reshape(shape).astype(kind)


def with_changed(change: Callable[[Any], Any]) -> Replacement:
    """Replaces a call by one with a change of its first argument."""

    def replaced(call: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            return call(change(args[0]), *args[1:], **kwargs)
        (name, first), *rest = kwargs.items()
        return call(**{name: change(first), **dict(rest)})

    return replaced


class Drift:
    """What a change of a network does to the inputs of its BatchNormalization layers.

    The network is run on some examples with the calls that `original` replaces, and after the
    change on the same ones with those that `changed` replaces.

    Example:
    ```python
    drift = Drift(model)
    with replaced_calls(drift.original()):
        model(x, training=False)
    ...  # the kernels change
    with replaced_calls(drift.changed()):
        model(x, training=False)
    drift.statistics()
    ```
    """

    def __init__(self, model: Any) -> None:
        self._layers = batch_normalizations(model)
        self._own: dict[Any, list[Channels]] = {layer: [] for layer in self._layers}
        self._new: dict[Any, list[Channels]] = {}

    def __bool__(self) -> bool:
        """Whether there are such layers."""
        return bool(self._layers)

    def original(self) -> Mapping[Any, Replacement]:
        """Replacements that note the inputs, in the original network."""

        def noting(layer: Any) -> Replacement:
            def see(x: Any) -> Any:
                _note(self._own[layer], layer, x)
                return x

            return with_changed(see)

        return {layer: noting(layer) for layer in self._layers}

    def changed(self) -> Mapping[Any, Replacement]:
        """Replacements that note the inputs and correct each layer, in the changed network."""
        self._new = {layer: [] for layer in self._layers}

        def correcting(layer: Any) -> Replacement:
            def change(x: Any) -> Any:
                _note(self._new[layer], layer, x)
                return self._corrected(layer, x)

            return with_changed(change)

        return {layer: correcting(layer) for layer in self._layers}

    def corrected(self) -> Mapping[Any, Replacement]:
        """Replacements that compute with the corrected statistics, and note nothing more."""

        def correcting(layer: Any) -> Replacement:
            return with_changed(functools.partial(self._corrected, layer))

        return {layer: correcting(layer) for layer in self._layers}

    def statistics(self) -> dict[Any, tuple[Array, Array]]:
        """The corrected moving mean and variance of each layer whose inputs were seen."""
        found = {layer: self._statistics(layer) for layer in self._layers}
        return {layer: statistics for layer, statistics in found.items() if statistics}

    def _corrected(self, layer: Any, x: Any) -> Any:
        """The inputs with which the layer gives the outputs that it should."""
        found = self._statistics(layer)
        if found is None:
            return x
        mean, variance = moving(layer)
        factor = np.sqrt((variance + layer.epsilon) / (found[1] + layer.epsilon))
        return mapped(x, axis_of(layer), factor, mean - factor * found[0])

    def _statistics(self, layer: Any) -> tuple[Array, Array] | None:
        noted, found = self._own[layer], self._new.get(layer, [])
        count = min(len(noted), len(found))
        if not count:
            return None
        own, new = _joined(noted[:count]), _joined(found[:count])
        mean, variance = moving(layer)
        ratio = (new[1] + layer.epsilon) / (own[1] + layer.epsilon)
        ratio = np.clip(ratio, 1 / _MOST, _MOST)
        corrected = (variance + layer.epsilon) * ratio - layer.epsilon
        return new[0] + np.sqrt(ratio) * (mean - own[0]), np.maximum(corrected, 0.0)


def correction(model: Any, examples: KeptExamples) -> Callable[[list[Callable[[], None]]], None]:
    """Runs a network on some examples, before it changes.

    Returns:
        A function to be called after the change, with the list of functions that undo it. It
        corrects the moving statistics.
    """
    drift = Drift(model)

    def run(replacements: Mapping[Any, Replacement]) -> None:
        with passing(model), replaced_calls(compiled_loops(model), replacements):
            for batch, _ in examples:
                model(batch, training=False)

    def correct(undo: list[Callable[[], None]]) -> None:
        run(drift.changed())
        for layer, values in drift.statistics().items():
            for variable, value, old in zip(
                (layer.moving_mean, layer.moving_variance), values, moving(layer), strict=True
            ):
                undo.append(functools.partial(variable.assign, old))
                variable.assign(value)

    run(drift.original())
    return correct


def _note(seen: list[Channels], layer: Any, x: Any) -> None:
    if not tensors.has_values(x):
        return  # in a graph
    channels = Channels()
    rows = np.moveaxis(tensors.to_numpy(x), axis_of(layer), -1)
    rows = rows.reshape(-1, rows.shape[-1])
    channels.add(rows[:: -(-rows.size // _ENTRIES)])
    seen.append(channels)


def _joined(calls: list[Channels]) -> tuple[Array, Array]:
    """The mean and variance of the inputs of some calls."""
    means = np.stack([channels.mean for channels in calls])
    squares = np.stack([channels.variance for channels in calls]) + means**2
    mean = means.mean(axis=0)
    return mean, np.maximum(squares.mean(axis=0) - mean**2, 0.0)
