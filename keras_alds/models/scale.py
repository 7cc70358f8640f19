"""Warns of examples of another scale than the training data, such as pixels in 0–255 for 0–1."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend import tensors
from keras_alds._backend.calls import Replacement, replaced_calls, watched
from keras_alds._backend.loops import passing
from keras_alds.core.slicing import Array
from keras_alds.models.data import Examples, KeptExamples
from keras_alds.models.inventory import walk
from keras_alds.models.observe import when_known

# Standard deviations that differ by more than this are those of other data.
_FACTOR = 3.0
# How many BatchNormalization layers are compared, from the input on.
_LAYERS = 3
# How many examples are compared with the training data, and with how many the model is run if it is
# run for this alone.
_EXAMPLES, _RUN = 256, 32
_REMEDY = (
    "Preprocess the examples as for training, for example to images in 0–1 instead of 0–255, or "
    "not at all if the model does it."
)


class Channels:
    """The mean and variance of every channel of some arrays, which are given one by one.

    Args:
        axis: The axis of the channels.
    """

    def __init__(self, axis: int = -1) -> None:
        self._axis = axis
        self._count = 0
        self._mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, x: Array) -> None:
        """Takes in an array."""
        rows = np.moveaxis(x, self._axis, -1).reshape(-1, x.shape[self._axis])
        mean, count = rows.mean(0, dtype=np.float64), len(rows)
        self._squares += count * (rows.var(0, dtype=np.float64) + mean**2)
        self._mean = (self._count * self._mean + count * mean) / (self._count + count)
        self._count += count

    @property
    def mean(self) -> Array:
        """The mean of every channel; empty if there were no arrays."""
        return np.asarray(self._mean) if self._count else np.zeros(0)

    @property
    def variance(self) -> Array:
        """The variance of every channel; empty if there were no arrays."""
        if not self._count:
            return np.zeros(0)
        return np.maximum(self._squares / self._count - self._mean**2, 0.0)


def times(variance: Array, expected: Array, epsilon: float = 0.0) -> float:
    """How many times as large standard deviations are as expected, in the median over channels.

    Channels that are all but constant are left out; 1 if there are no others.
    """
    varies = expected > 1e-6 * expected.max(initial=0.0)
    if variance.shape != expected.shape or not varies.any():
        return 1.0
    return math.sqrt(np.median((variance[varies] + epsilon) / (expected[varies] + epsilon)))


def is_off(factor: float) -> bool:
    """Whether standard deviations that differ by this factor are those of other data."""
    return not 1 / _FACTOR <= factor <= _FACTOR


class ScaleCheck:
    """Compares the inputs of the first BatchNormalization layers with their moving variance.

    Args:
        model: The model, before it is run on the examples.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._backend = model, _backend.backend_of(model)
        norm = self._backend.keras.layers.BatchNormalization
        self._seen: dict[Any, Channels] = {}
        self._paths: dict[Any, str] = {}
        for path, layer in walk(model):
            if not isinstance(layer, norm) or not layer.built or len(self._seen) == _LAYERS:
                continue
            axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
            if len(axes) == 1 and (self._variance(layer) != 1).any():
                self._seen[layer], self._paths[layer] = Channels(axes[0]), path

    @property
    def layers(self) -> list[Any]:
        """The layers that are compared."""
        return list(self._seen)

    def _variance(self, layer: Any) -> Array:
        return self._backend.value(layer.moving_variance)

    def watched(self) -> dict[Any, Replacement]:
        """Replacements of calls that watch the layers."""

        def see(layer: Any, inputs: Any, outputs: Any) -> Any:
            return when_known(inputs, outputs, self._seen[layer].add)

        return watched(self.layers, see)

    def warn(self, *, stacklevel: int) -> None:
        """Warns if the variances of a layer's inputs were far from those in training."""
        for layer, seen in self._seen.items():
            factor = self._factor(layer, seen.variance)
            if is_off(factor):
                warnings.warn(
                    "The examples seem to be of another scale than the training data: the inputs "
                    f"of BatchNormalization '{self._paths[layer]}' vary {factor:.3g} times as much "
                    f"as its moving variance says. {_REMEDY} After a short training of fewer than "
                    "about 500 steps, this variance has not settled, and nothing may be wrong.",
                    stacklevel=stacklevel + 1,
                )
                return

    def _factor(self, layer: Any, variance: Array) -> float:
        optimizer = getattr(self._model, "optimizer", None)
        iterations = getattr(optimizer, "iterations", None)
        steps = 0 if iterations is None else int(self._backend.value(iterations))
        # A moving variance starts at 1. After n steps it still holds momentumⁿ of that, unless it
        # comes from an earlier training.
        expected = self._variance(layer)
        factors = [
            times(rest + (1 - rest) * variance, expected, layer.epsilon)
            for rest in {0.0, float(layer.momentum) ** steps if steps else 0.0}
        ]
        return min(factors, key=lambda factor: abs(math.log(factor)) if factor else math.inf)


def check_scale(model: Any, examples: KeptExamples, *, stacklevel: int) -> None:
    """Runs the model on the first examples, and warns as `ScaleCheck.warn` does."""
    scales = ScaleCheck(model)
    if not scales.layers:
        return
    with passing(model):
        seen = 0
        for batch, count in examples:
            with replaced_calls(scales.watched()):
                model(batch, training=False)
            seen += count
            if seen >= _RUN:
                break
    scales.warn(stacklevel=stacklevel + 1)


def warn_of_other_inputs(model: Any, data: Any, training: Any, *, stacklevel: int) -> None:
    """Warns if calibration examples are of another scale than the training data.

    Only arrays and data that are read by index are compared: reading a data set may take long,
    and an iterator can be read only once.

    Args:
        model: The model.
        data: The user's `calibration_data`.
        training: The `x` of `fit`.
        stacklevel: The frame that the warning names; 1 is the caller of this function.
    """
    if any(_is_read_once(given) for given in (data, training)):
        return
    try:
        found, expected = (_variances(model, given) for given in (data, training))
    except ValueError:
        return  # other checks say what is wrong with the data
    for key in found.keys() & expected.keys():
        factor = times(found[key], expected[key])
        if is_off(factor):
            warnings.warn(
                "The calibration data are of another scale than the training data: they vary "
                f"{factor:.3g} times as much. {_REMEDY}",
                stacklevel=stacklevel + 1,
            )
            return


def _is_read_once(data: Any) -> bool:
    readable = hasattr(data, "__array__") or isinstance(data, (list, tuple, dict))
    return tensors.is_dataset(data) or not (readable or hasattr(data, "__getitem__"))


def _variances(model: Any, data: Any) -> dict[tuple[Any, ...], Array]:
    """The variance of every channel of each floating-point input, by name, place and channels."""
    inputs: dict[tuple[Any, ...], Channels] = {}
    names = _backend.backend_of(model).input_names(model)
    for batch, _ in Examples(model, data, _EXAMPLES):
        if isinstance(batch, (list, tuple)) and len(batch) == len(names):
            batch = dict(zip(names, batch, strict=True))
        parts = batch if isinstance(batch, dict) else {"": batch}
        for name, part in parts.items():
            for place, array in enumerate(tensors.flatten(part)):
                value = tensors.to_numpy(array)
                if value.dtype.kind == "f":
                    key = (name, place, value.shape[-1])
                    inputs.setdefault(key, Channels()).add(value)
    return {key: channels.variance for key, channels in inputs.items()}
