"""Synthetic examples: a stand-in for calibration data where there are none.

What the inputs of a layer look like in training, only data can tell. But a network with
BatchNormalization keeps part of it: the mean and the variance of every normalized channel. So
smooth noise is run through the network. Its offset and scale are those for which the inputs of the
first BatchNormalization have the moving mean and variance. At every BatchNormalization, the mean
and the variance of the noise are brought to the moving ones. The layers then see inputs with the
scale, the sparsity and much of the correlation that real examples give.

Two thirds of it have the spectrum of natural signals, 1/f to 1/f^1.5 (D. J. Field, "Relations
between the statistics of natural images and the response properties of cortical cells", JOSA A
1987). One third are "dead leaves", balls that cover each other (A. B. Lee, D. Mumford, J. Huang,
"Occlusion models for natural images", IJCV 2001), which have edges. Use of the moving statistics to
make data: M. Haroush et al., "The knowledge within", CVPR 2020.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from keras_alds import _backend
from keras_alds._backend import tensors
from keras_alds._backend.calls import Replacement, replaced_calls, watched
from keras_alds._backend.loops import passing
from keras_alds.core.slicing import Array
from keras_alds.models.calibration import CalibrationStats, fingerprint
from keras_alds.models.curves import measure_curves
from keras_alds.models.data import fixed_batch_size
from keras_alds.models.inventory import Inventory, LayerRecord
from keras_alds.models.moving_statistics import (
    axis_of,
    batch_normalizations,
    mapped,
    moving,
    with_changed,
)
from keras_alds.models.observe import Observer, when_known
from keras_alds.models.scale import Channels
from keras_alds.progress import progress_bar

# The fewest and most examples, and the entries of all of them in between.
_FEWEST, _MOST, _ENTRIES = 64, 256, 1 << 23
# Examples with which the offset and scale are found.
_FITTED = 8
# Entries of the examples in one forward pass.
_BATCH_ENTRIES = 1 << 22
# The most and fewest examples on which the outputs are compared, and the multiply–accumulates of
# them all, with one run for each layer: a network for large images takes minutes otherwise.
_PROBES, _FEWEST_PROBES, _PROBED_MACS = 16, 4, 1e12
# The least ridge of a second moment, as a part of its mean eigenvalue: real inputs also vary in
# directions in which noise does not.
_RIDGE = 0.1
# The most bytes of statistics that are kept for the next call.
_KEPT_BYTES = 1 << 27
# The most channels of the inputs that get an offset each.
_CHANNELS = 4
# Standard deviations of the examples' contrast (of its logarithm) and brightness, and the part of
# the variance that all channels share.
_CONTRAST, _BRIGHTNESS, _SHARED = 0.4, 0.5, 0.9
_SPECTRA = (1.0, 1.5)
_LEAVES = 60
_SMALLEST, _LARGEST = 0.03, 0.5


class _Known(NamedTuple):
    """Statistics, and the layers whose effect on the outputs was measured."""

    stats: CalibrationStats
    curves: frozenset[str]


# An entry is dropped with its model.
_CACHE: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def unsuitable(inventory: Inventory) -> str | None:
    """Why no synthetic examples can be made for a model, or None."""
    model = inventory.model
    backend = _backend.backend_of(model)
    if not backend.is_model(model):
        return "it is a layer, and the shape of its inputs is not known"
    try:
        specs = tensors.flatten(backend.input_specs(model))
    except ValueError:
        return "the shape of its inputs is not known"
    if len(specs) != 1 or not tensors.is_dense_spec(specs[0]) or not specs[0].dtype.is_floating:
        return "its inputs are not one tensor of floating-point numbers"
    shape = tuple(specs[0].shape)[1:]
    if len(shape) < 2 or None in shape or min(shape[:-1]) < 2:
        return "its inputs are not images or signals of a known size"
    norms = batch_normalizations(model)
    if not norms or not 2 * len(norms) >= len(inventory.candidates):
        return "it has few BatchNormalization layers, or none"
    if not all(map(_is_trained, norms)):
        return "its BatchNormalization layers are not trained"
    return None


def synthetic_stats(
    inventory: Inventory, *, curves: bool = True, verbose: int = 1
) -> CalibrationStats:
    """Calibration statistics of synthetic examples, of a model for which nothing is `unsuitable`.

    The moments are those with the inputs of BatchNormalization at their moving statistics. What the
    layers' errors do to the outputs is measured on other examples, in the network as it is. (With
    the moved inputs, the effect of the last layers is underestimated most.)

    Args:
        inventory: The model.
        curves: Whether to measure what the layers' errors do to the outputs.
        verbose: As for `CalibrationStats.collect`.
    """
    model, records = inventory.model, inventory.factorizable
    key = fingerprint(model)
    wanted = frozenset(record.path for record in inventory.candidates) if curves else frozenset()
    known = _CACHE.get(model)
    if known is not None and known.stats.fingerprint == key and wanted <= known.curves:
        with contextlib.suppress(ValueError):  # other layers, after one was made dense
            known.stats.match(inventory)
            return known.stats
    made = Synthetic(model)
    observer = Observer(records)
    with progress_bar(verbose) as progress:
        with observer.watching(model, made.normalized()) as run:
            batches = made.batches(made.examples)
            task = progress.add_task("synthetic inputs", total=len(batches))
            for batch in batches:
                run(batch, False)
                progress.advance(task)
        moments = {
            path: moment and moment.with_ridge(max(moment.relative_ridge, _RIDGE))
            for path, moment in observer.moments().items()
        }
        stats = CalibrationStats(
            {record.path: moments.get(record.path) for record in records},
            {record.path: tuple(record.kernel_shape or ()) for record in records},
            examples=len(made.examples),
            fingerprint=key,
        )
        seen = [r for r in stats.match(inventory).candidates if r.moment is not None]
        if curves and seen:
            task = progress.add_task("outputs", total=len(seen))
            probes = made.probes[: _affordable(seen, len(made.examples))]
            found = measure_curves(
                model, seen, stats, made.batches(probes), lambda: progress.advance(task)
            )
            stats.curves = MappingProxyType(found)
    if sum(8 * moment.side**2 for moment in moments.values() if moment) <= _KEPT_BYTES:
        _CACHE[model] = _Known(stats, wanted)
    return stats


def _affordable(records: Sequence[LayerRecord], examples: int) -> int:
    """The number of examples on which to probe layers, whose moments are those of `examples`."""
    macs = sum(record.dense_weights * record.moment.count for record in records if record.moment)
    of_one = len(records) * macs / examples
    return int(np.clip(_PROBED_MACS / max(of_one, 1), _FEWEST_PROBES, _PROBES))


class _EnoughSeen(BaseException):
    """Ends a run of the model; no `except Exception` inside catches it."""


class Synthetic:
    """Synthetic examples for a model for which nothing is `unsuitable`.

    Attributes:
        examples: Array `[examples, *spatial, channels]` of float32, always the same.
        probes: A few others.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._backend = _backend.backend_of(model)
        self._layers = batch_normalizations(model)
        (self._spec,) = tensors.flatten(self._backend.input_specs(model))
        shape = tuple(self._spec.shape)[1:]
        count = min(max(_ENTRIES // math.prod(shape), _FEWEST), _MOST)
        unit = noise(count + _PROBES, shape)
        with passing(model):
            scale, offset = self._fit(unit[:_FITTED])
            found = (unit * scale + offset).astype(np.float32)
            self.examples, self.probes = found[:count], found[count:]
            self._maps = self._measured()

    def normalized(self) -> dict[Any, Replacement]:
        """Replacements that give the inputs of every BatchNormalization its moving statistics."""

        def changing(layer: Any) -> Replacement:
            return with_changed(lambda x: mapped(x, *self._maps[layer]))

        return {layer: changing(layer) for layer in self._maps}

    def batches(self, x: Array) -> list[Any]:
        """Examples as inputs of the model, in batches as large as fits in memory."""
        fixed = fixed_batch_size(self._model)
        size = fixed or max(1, _BATCH_ENTRIES // math.prod(x.shape[1:]))
        if fixed is not None:  # the first examples come again, for whole batches
            x = x[np.arange(-(-len(x) // size) * size) % len(x)]
        x = x.astype(tensors.numpy_dtype(self._spec.dtype))
        parts = [x[start : start + size] for start in range(0, len(x), size)]
        return [tensors.as_input(part, self._spec) for part in parts]

    def _run(self, x: Array, replacements: Mapping[Any, Replacement]) -> None:
        for batch in self.batches(x):
            with replaced_calls(replacements), contextlib.suppress(_EnoughSeen):
                self._model(batch, training=False)

    def _fit(self, unit: Array) -> tuple[float, Array]:
        """The scale and offset with which the first BatchNormalization sees its statistics.

        They are searched: on a grid, then step by step.
        """
        order: list[Any] = []

        def note(layer: Any, inputs: Any, outputs: Any) -> Any:
            order.append(layer)
            raise _EnoughSeen

        self._run(unit, watched(self._layers, note))
        ones = np.ones(unit.shape[-1])
        if not order:
            return 1.0, 0 * ones
        first = order[0]
        mean, variance = moving(first)
        varies = variance > 1e-6 * variance.max(initial=0.0)
        deviation = np.sqrt(variance + first.epsilon)
        statistics = self._statistics(first, unit)

        def misfit(scale: float, offset: Array) -> float:
            means, variances = statistics(scale, offset)
            ratio = (variances + 1e-12) / (variance + 1e-12)
            off = [np.log(ratio)[varies], ((means - mean) / deviation)[varies]]
            found = float(np.minimum(np.abs(np.concatenate(off)), 3.0).mean())
            return found if np.isfinite(found) else math.inf

        starts = [(4.0**n, 4.0**n * m * ones) for n in range(-4, 5) for m in (0, 1, -1)]
        best, scale, offset = min(
            ((misfit(*start), *start) for start in starts), key=lambda found: found[0]
        )
        step = 1.0
        single = [*np.eye(len(ones))] if 1 < len(ones) <= _CHANNELS else [ones]
        while step > 0.1:
            moves: list[tuple[float, Array]] = []
            for change in (math.exp(step), math.exp(-step)):
                moves += [(scale * change, offset), (scale * change, offset * change)]
            for channel in (ones, *single):
                moves += [(scale, offset + sign * step * scale * channel) for sign in (1, -1)]
            value, move = min(((misfit(*move), move) for move in moves), key=lambda found: found[0])
            if value < best:
                best, (scale, offset) = value, move
            else:
                step /= 2
        return scale, offset

    def _statistics(self, first: Any, unit: Array) -> Callable[[float, Array], tuple[Array, Array]]:
        """A function of scale and offset: the mean and variance of the inputs of a layer.

        What is before the layer is mostly one convolution. An affine function needs few runs.
        """

        def inputs(x: Array) -> Array:
            seen: list[Array] = []

            def see(layer: Any, inputs: Any, outputs: Any) -> Any:
                when_known(inputs, outputs, seen.append)
                raise _EnoughSeen

            self._run(x.astype(np.float32), watched([first], see))
            found = np.concatenate(seen) if seen else np.zeros((1, 1), np.float32)
            return np.moveaxis(found, axis_of(first), -1).astype(np.float64)

        def run(scale: float, offset: Array) -> tuple[Array, Array]:
            rows = inputs(unit * scale + offset)
            axes = tuple(range(rows.ndim - 1))
            return rows.mean(axis=axes), rows.var(axis=axes)

        channels = unit.shape[-1]
        zero = inputs(0 * unit)
        once, twice = inputs(unit) - zero, inputs(2 * unit) - zero
        if channels > _CHANNELS or np.abs(twice - 2 * once).max() > 1e-3 * np.abs(twice).max():
            return run
        parts = [inputs(0 * unit + row) - zero for row in np.eye(channels)]
        rows = np.stack([once, *parts, zero]).reshape(channels + 2, -1, zero.shape[-1])
        means = rows.mean(axis=1)
        centred = rows - means[:, np.newaxis]
        covariance = np.einsum("anf,bnf->fab", centred, centred) / rows.shape[1]

        def combined(scale: float, offset: Array) -> tuple[Array, Array]:
            factors = np.array([scale, *offset, 1.0])
            return factors @ means, factors @ covariance @ factors

        return combined

    def _measured(self) -> dict[Any, tuple[int, Array, Array]]:
        """The axis, factor and summand that bring each layer's inputs to the moving statistics."""
        maps: dict[Any, tuple[int, Array, Array]] = {}
        seen: dict[Any, Channels] = {}  # of all batches so far

        def measuring(layer: Any) -> Replacement:
            def change(x: Any) -> Any:
                if not tensors.has_values(x):
                    return x  # in a graph
                channels = seen.setdefault(layer, Channels(axis_of(layer)))
                channels.add(x.numpy())
                mean, variance = moving(layer)
                factor = np.sqrt((variance + layer.epsilon) / (channels.variance + layer.epsilon))
                maps[layer] = (axis_of(layer), factor, mean - factor * channels.mean)
                return mapped(x, *maps[layer])

            return with_changed(change)

        self._run(self.examples[:_FEWEST], {layer: measuring(layer) for layer in self._layers})
        return maps


def noise(count: int, shape: Sequence[int], seed: int = 0) -> Array:
    """Smooth noise with edges, of various contrasts and brightnesses.

    Args:
        count: Number of examples.
        shape: Shape `(*spatial, channels)` of one.
        seed: Seed of the random numbers.

    Returns:
        Array `[count, *spatial, channels]`; every channel has mean 0 and variance 1.

    Example:
        >>> noise(9, (8, 8, 3)).shape
        (9, 8, 8, 3)
    """
    random = np.random.default_rng(seed)
    *spatial, channels = shape
    kinds = [
        *(lambda p=p: _spectral(random, shape, p) for p in _SPECTRA),
        lambda: _leaves(random, shape),
    ]
    x = np.stack([kinds[n % len(kinds)]() for n in range(count)])
    axes = tuple(range(1, len(spatial) + 1))
    each = (count, *(1 for _ in spatial))
    x *= np.exp(_CONTRAST * random.standard_normal((*each, 1)))
    x += _BRIGHTNESS * _mixed(random, each, channels)
    x -= x.mean(axis=(0, *axes))
    return x / x.std(axis=(0, *axes))


def _mixed(random: np.random.Generator, places: Sequence[int], channels: int) -> Array:
    """White noise, most of which all channels share."""
    shared = random.standard_normal((*places, 1))
    own = random.standard_normal((*places, channels))
    return math.sqrt(_SHARED) * shared + math.sqrt(1 - _SHARED) * own


def _spectral(random: np.random.Generator, shape: Sequence[int], power: float) -> Array:
    """Noise whose amplitude falls with this power of the frequency."""
    *spatial, channels = shape
    frequencies = np.meshgrid(*map(np.fft.fftfreq, spatial), indexing="ij")
    radius = np.sqrt(sum(f**2 for f in frequencies))
    radius.flat[0] = np.inf
    axes = tuple(range(len(spatial)))
    white = np.fft.fftn(_mixed(random, spatial, channels), axes=axes)
    x = np.fft.ifftn(white / radius[..., np.newaxis] ** power, axes=axes).real
    return x / np.maximum(x.std(axis=axes), 1e-9)


def _leaves(random: np.random.Generator, shape: Sequence[int]) -> Array:
    """Balls of one colour each that cover each other; their radii have a power law."""
    *spatial, channels = shape
    grids = np.meshgrid(*map(np.arange, spatial), indexing="ij", sparse=True)
    x = np.empty(tuple(shape))
    x[...] = _mixed(random, (), channels)
    for _ in range(_LEAVES):
        radius = max(spatial) * _SMALLEST / random.uniform(_SMALLEST / _LARGEST, 1.0)
        center = [random.uniform(0, length) for length in spatial]
        distance = sum((g - c) ** 2 for g, c in zip(grids, center, strict=True))
        x[distance < radius**2] = _mixed(random, (), channels)
    return x


def _is_trained(layer: Any) -> bool:
    mean, variance = moving(layer)
    return bool((variance != 1).any() and mean.any())
