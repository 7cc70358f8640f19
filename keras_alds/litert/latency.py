"""`measure_latency`: times the layers of a model on this machine, dense and factorized."""

from __future__ import annotations

import collections
import functools
import os
import reprlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_alds import _backend
from keras_alds._backend import wrappers
from keras_alds.core.costs import DENSE, Costs, Point, SampledCosts
from keras_alds.litert import _package
from keras_alds.litert.conversion import ConvertOptions, convert_quietly
from keras_alds.litert.layer_files import Calls, LayerCall, empty_file, layer_calls, layer_file
from keras_alds.litert.runs import check_local
from keras_alds.litert.sampling import Measure, Ranks, sample_costs
from keras_alds.litert.table import MOST_NOISE, LatencyTable, Settings
from keras_alds.litert.timing import MOST_SWEPT, Repeats, Timing, time_files
from keras_alds.models.data import MIN_EXAMPLES
from keras_alds.models.inventory import Inventory, LayerRecord, already_compressed
from keras_alds.naming import check_exclude
from keras_alds.plan import Skip, Skipped
from keras_alds.progress import progress_bar


class MeasuredLatency:
    """Measured latency in nanoseconds, as a `models.resources.Resource` for `select`.

    Attributes:
        total: Latency of the whole original, never less than the sum over its layers.
        runtime: The settings of the measurement, such as `"float32, 1 thread"`.

    Raises:
        ValueError: If the table lacks a layer, or belongs to another model.
    """

    name = "latency"

    def __init__(self, inventory: Inventory, table: LatencyTable) -> None:
        records = measured_records(inventory)
        calls = layer_calls(inventory, records)
        _check_of_model(inventory, records, calls, table)
        self._costs = {
            record.layer: table.costs(calls[record.layer])
            for record in records
            if calls[record.layer]
        }
        self.total = max(table.total, sum(cost.dense for cost in self._costs.values()))
        threads = f"{table.threads} thread{'s' if table.threads > 1 else ''}"
        self.runtime: str | None = f"{table.quantize or 'float32'}, {threads}"

    def of(self, record: LayerRecord) -> int | None:
        """The latency of a layer, or None if it is skipped and was not measured."""
        return None if record.skipped else self.costs(record).dense

    def costs(self, record: LayerRecord) -> Costs:
        """The costs of a layer's choices, summed over all its calls."""
        return self._costs[record.layer]

    def skipped(self, record: LayerRecord) -> Skipped | None:
        """Why a layer has no measured latency: its kind is not measured, or it is never called."""
        if not record.kind.measured:
            detail = f"the latency of {record.class_name} is not measured"
            return Skipped(Skip.NOT_COUNTED, detail)
        if record.layer not in self._costs:
            return Skipped(Skip.NOT_COUNTED, "the forward pass does not call it")
        return None


def measure_latency(
    model: Any,
    *,
    quantize: str | None = None,
    threads: int = 1,
    target: str = "litert",
    exclude: Any = (),
    max_slices: int | None = None,
    representative_data: Any = None,
    verbose: int = 1,
) -> LatencyTable:
    """Measures the latency of a model's layers with LiteRT on this machine, dense and factorized.

    The whole original is converted and measured once. For every layer that can be factorized, and
    every input size it is called with, small files are written directly: the dense layer, or the
    encoder and decoder of a choice: slices, rank and fold scheme. Only some ranks are measured,
    enough to know the others to about 4 % of the dense layer's time. Everything is measured at
    least twice, and again, up to 5 times, until it is reproduced to 3 % of that. A warning says if
    the machine was too busy for that. Other measurements are cached for the process. One forward
    pass takes one example. On one thread, processor time is measured, so that other programs have
    little effect.

    Args:
        model: A built Keras 3 or tf_keras model, not compressed, whose input sizes are known.
        quantize: None for float32, or `"int8"`.
        threads: Integer. Number of threads of the runtime. Defaults to 1.
        target: `"litert"` (with XNNPACK) or `"litert-reference"` (built-in kernels). Defaults to
            `"litert"`. Only slices and ranks that it allows are measured.
        exclude: As for `select`: layers not to measure.
        max_slices: Integer or None. Largest number of slices k to measure.
        representative_data: As for `convert`, for the int8 file of the whole model. Defaults to
            random numbers: the time does not depend on the data.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.

    Returns:
        A `LatencyTable`. Its `noise` says how well the times were reproduced.

    Raises:
        ImportError: If LiteRT is not installed.
        ValueError: If an argument is not as above; if the model is not built, is already
            compressed, cannot be converted, has an unknown input size, or has no layer that can be
            factorized.

    Example:
    ```python
    table = keras_alds.litert.measure_latency(model, verbose=0)
    print(f"{table.total / 1e6:.3f} ms, {len(table.layers)} layers")
    ```
    """
    target = check_local(target)
    settings = Settings(quantize, threads, target, max_slices)
    inventory = measurable(model, exclude, stacklevel=2)
    table = _measured(inventory, settings, representative_data, verbose)
    table.warn_of_noise(stacklevel=2)
    return table


def measurable(model: Any, exclude: Any = (), *, stacklevel: int = 1) -> Inventory:
    """The inventory of a model with at least one layer whose latency can be measured.

    Warns of entries of `exclude` that match no layer.

    Raises:
        ValueError: If there is no such layer, or if the model is not built or already compressed.
    """
    inventory = Inventory.of(model, check_exclude(exclude))
    if factorized := [record for record in inventory.factorized if not record.excluded]:
        raise already_compressed(factorized)
    inventory.warn_of_unmatched(stacklevel=stacklevel + 1)
    if not measured_records(inventory):
        raise ValueError(
            f"Expected the model '{model.name}' to hold a layer that can be factorized, to measure "
            "its latency. Received: none"
        )
    return inventory


def measured_records(inventory: Inventory) -> list[LayerRecord]:
    """The layers that can be factorized and whose latency is measured."""
    return [record for record in inventory.candidates if record.kind.measured]


def check_table(latency: Any, target: str | None, quantize: str | None) -> LatencyTable | None:
    """Returns the table for `latency_table=` of `select`, or None if latency must be measured.

    Raises:
        ValueError: If it is not a table, is for another target or number format, or is missing but
            required.
    """
    if latency is None:
        check_local(target)
        return None
    if isinstance(latency, (str, os.PathLike)):
        latency = LatencyTable.load(latency)
    if not isinstance(latency, LatencyTable):
        raise ValueError(
            "Expected `latency_table` to be a `keras_alds.litert.LatencyTable` or the path of one. "
            f"Received: latency_table={reprlib.repr(latency)}"
        )
    if latency.target != target:
        raise ValueError(
            f"Expected a latency table that was measured for target={target!r}. Received: one for "
            f"target={latency.target!r}. Pass that as `target`, or measure again."
        )
    if quantize not in (None, latency.quantize):
        raise ValueError(
            f"Expected a latency table that was measured with quantize={quantize!r}. Received: one "
            f"in {latency.quantize or 'float32'}. Leave `quantize` out, or measure again: "
            f"`measure_latency(model, quantize={quantize!r})`."
        )
    return latency


def measured_latency(
    inventory: Inventory,
    table: LatencyTable | None,
    settings: Settings,
    *,
    verbose: int = 1,
    stacklevel: int = 1,
) -> MeasuredLatency:
    """The latency of a model's layers, from a table or measured now.

    Warns if the table is noisy.

    Args:
        inventory: The model.
        table: A table of this model, or None to measure.
        settings: How to measure without a table.
        verbose: As for `measure_latency`.
        stacklevel: The frame that the warning names; 1 is the caller of this function.

    Raises:
        ValueError: If the table lacks a layer, or belongs to another model.
    """
    if table is None:
        table = _measured(inventory, settings, verbose=verbose)
    latency = MeasuredLatency(inventory, table)
    table.warn_of_noise(stacklevel=stacklevel + 1)
    return latency


def _check_of_model(
    inventory: Inventory, records: Sequence[LayerRecord], calls: Calls, table: LatencyTable
) -> None:
    """Raises a ValueError if a table lacks a layer of a model, or belongs to another model."""
    name = inventory.model.name
    for record in records:
        for call in calls[record.layer]:
            if call not in table.layers:
                raise ValueError(
                    f"Expected a latency table of the model '{name}'. Received: one without its "
                    f"layer '{record.path}' ({call}). Measure the model: "
                    "`keras_alds.litert.measure_latency`, or on a device "
                    "`python -m keras_alds latency-files`."
                )
    # Extra layers in the table suggest another model, unless layers are excluded here.
    complete = not any(record.excluded for record in inventory.records)
    counts = _counts(calls)
    for call in sorted(table.calls):
        there, here = table.calls[call], counts[call]
        if here > there or (complete and here < there):
            raise ValueError(
                f"Expected a latency table of the model '{name}'. Received: one of another model, "
                f"with another total time: it has {there} calls of {call}, where '{name}' has "
                f"{here}. Measure this model."
            )


# -- Measurement ---------------------------------------------------------------------------------


#: Most measurements of one file.
MOST_REPEATS = 5
# Cached measurements: layers by call, runtime, bytes swept and ranks; models by their calls, with
# the size of the file.
_LAYERS: dict[tuple, dict[Point, Timing]] = {}
_MODELS: weakref.WeakKeyDictionary[Any, dict[tuple, tuple[Timing, int]]] = (
    weakref.WeakKeyDictionary()
)


def _measured(
    inventory: Inventory,
    settings: Settings,
    representative_data: Any = None,
    verbose: int = 1,
) -> LatencyTable:
    _package.interpreter()  # fails before the work starts
    records = measured_records(inventory)
    calls = layer_calls(inventory, records)
    ranks = ranks_of_calls(records, calls, settings)
    known = _MODELS.setdefault(inventory.model, {})
    this = (settings, tuple(map(tuple, calls.values())))
    content = b""  # the model's file, unless its latency is known
    if this in known:
        model, size = known[this]
    else:
        content = converted(inventory.model, settings.quantize, representative_data, verbose)
        model, size = Timing(0), len(content)
    # Rounded up to a power of two, so that models of similar size share measurements.
    swept = min(1 << (size - 1).bit_length(), MOST_SWEPT)
    keys = {call: (call, settings, swept, tuple(ranks[call].items())) for call in sorted(ranks)}
    timings = {call: _LAYERS[key] for call, key in keys.items() if key in _LAYERS}
    missing = {call: ranks[call] for call in keys if call not in timings}
    if content or missing:
        measured, layers = _passes(content, missing, settings, swept, verbose)
        model = measured if content else model
        timings |= layers
    table = LatencyTable(
        model,
        {call: timings[call] for call in keys},
        dict(_counts(calls)),
        settings.quantize,
        settings.threads,
        settings.target,
    )
    if table.noise <= MOST_NOISE:  # else measured anew the next time
        known[this] = (model, size)
        _LAYERS.update({keys[call]: found for call, found in timings.items()})
    return table


def _passes(
    content: bytes,
    ranks: Mapping[LayerCall, Ranks],
    settings: Settings,
    swept: int,
    verbose: int,
) -> tuple[Timing, dict[LayerCall, dict[Point, Timing]]]:
    """Measures a model and its layers in several passes, until their times are reproduced.

    So the measurements of one file lie apart in time: a busy moment of the machine affects one of
    them. Each pass decides anew which ranks to measure, by the times so far.

    Args:
        content: The file of the whole model, empty if its latency is known.
        ranks: The allowed ranks of the layers to measure.
        settings: How to measure.
        swept: As for `time_files`.
        verbose: As for `measure_latency`.

    Returns:
        The latency of the model and of the choices of its layers.
    """
    once = functools.partial(time_files, threads=settings.threads, target=settings.target)
    whole = Repeats(lambda keys: once([lambda: content or empty_file()] * len(keys)))
    empty = Repeats(lambda keys: once([empty_file] * len(keys)))
    layers = {call: Repeats(_layer_times(call, settings, swept), DENSE) for call in ranks}
    costs: dict[LayerCall, SampledCosts] = {}
    with progress_bar(verbose) as progress:
        for count in range(1, MOST_REPEATS + 1):
            whole.times([DENSE], count)
            (overhead,) = empty.times([DENSE], count)
            for call in progress.track(list(ranks), description=f"latency of layers, {count}"):
                costs[call] = sample_costs(_net(layers[call], count, overhead), ranks[call])
            done = all(layers[call].settled(p) for call in ranks for p in costs[call].points)
            if done and whole.settled(DENSE):
                break
    return whole.timing(DENSE), {
        call: {point: layers[call].timing(point, overhead) for point in costs[call].points}
        for call in ranks
    }


def _counts(calls: Calls) -> collections.Counter[LayerCall]:
    return collections.Counter(call for found in calls.values() for call in found)


def ranks_of_calls(
    records: Sequence[LayerRecord], calls: Calls, settings: Settings
) -> dict[LayerCall, dict[tuple[int, int], tuple[int, ...]]]:
    """The ranks to measure for every call, by number of slices and fold scheme.

    Args:
        records: Layers. Different layers may make one call, such as a Conv1D and a Conv2D.
        calls: Their calls.
        settings: The settings of the measurement.
    """
    found: dict[LayerCall, dict[tuple[int, int], set[int]]] = {}
    for record in records:
        for call in calls[record.layer]:
            rows = found.setdefault(call, {})
            for key, ranks in settings.ranks(record, call).items():
                rows.setdefault(key, set()).update(ranks)
    return {
        call: {key: tuple(sorted(rows[key])) for key in sorted(rows)}
        for call, rows in found.items()
    }


def _net(files: Repeats, count: int, overhead: int) -> Measure:
    """What measures files up to `count` times, without the overhead of a run."""
    return lambda points: [max(time - overhead, 1) for time in files.times(points, count)]


def _layer_times(call: LayerCall, settings: Settings, swept: int) -> Measure:
    """What measures choices of a layer once."""

    def measure(points: Sequence[Point]) -> list[int]:
        files = [
            functools.partial(layer_file, call, *point, quantize=settings.quantize)
            for point in points
        ]
        return time_files(files, threads=settings.threads, target=settings.target, swept=swept)

    return measure


def converted(model: Any, quantize: str | None, data: Any = None, verbose: int = 0) -> bytes:
    """The file of a whole model to measure, without pruning wrappers, whose operators cost time."""
    model = wrappers.without_pruning(model)
    if quantize == "int8" and data is None:
        rng = np.random.default_rng(0)
        arrays = [
            rng.random((MIN_EXAMPLES, *spec.shape[1:])).astype(spec.dtype.as_numpy_dtype)
            for spec in tf.nest.flatten(_backend.backend_of(model).input_specs(model))
        ]
        data = arrays if len(arrays) > 1 else arrays[0]
    options = ConvertOptions(quantize=quantize, representative_data=data, verbose=verbose)
    return convert_quietly(model, options)
