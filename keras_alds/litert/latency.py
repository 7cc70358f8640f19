"""`LatencyTable`: how long the layers of a model take, dense and factorized, in a runtime."""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from rich.progress import Progress

from keras_alds import _backend
from keras_alds._backend import wrappers
from keras_alds.core.checks import positive_int
from keras_alds.core.choices import offered_ranks
from keras_alds.core.costs import Costs, SampledCosts, sum_costs
from keras_alds.litert import _package
from keras_alds.litert.conversion import ConvertOptions, convert_quietly
from keras_alds.litert.layer_files import Calls, LayerCall, empty_file, layer_calls, layer_file
from keras_alds.litert.sampling import sample_costs
from keras_alds.litert.timing import MOST_SWEPT, time_files
from keras_alds.models.data import MIN_EXAMPLES
from keras_alds.models.inventory import Inventory, LayerRecord, already_compressed
from keras_alds.naming import check_exclude
from keras_alds.plan import Skip, Skipped
from keras_alds.targets import TARGETS

QUANTIZE = (None, "int8")
#: Targets whose runtime is on this machine, and whether XNNPACK is in it.
LOCAL = {"litert": True, "litert-reference": False}
COLUMNS = (
    *(field.name for field in dataclasses.fields(LayerCall)),
    *("calls", "quantize", "threads", "target", "slices", "rank", "nanoseconds"),
)


@dataclasses.dataclass(frozen=True, repr=False)
class LatencyTable:
    """Latencies of a model and of its layers' choices, in one runtime; see `measure_latency`.

    Attributes:
        total: Latency of the whole original model, in nanoseconds.
        layers: `SampledCosts` of every layer and input size, in nanoseconds.
        calls: How often each of them is called in one forward pass.
        quantize: None for float32, or `"int8"`.
        threads: Number of threads.
        target: The runtime, as `target` of `select`.

    Example:
    ```python
    table = keras_alds.litert.measure_latency(model, quantize="int8", verbose=0)
    table.save("latency.csv")
    table = keras_alds.litert.LatencyTable.load("latency.csv")
    # plan = keras_alds.select(model, cr=0.3, objective="latency", latency=table)
    ```
    """

    total: int
    layers: Mapping[LayerCall, SampledCosts]
    calls: Mapping[LayerCall, int]
    quantize: str | None = None
    threads: int = 1
    target: str = "litert"

    def __repr__(self) -> str:
        return (
            f"LatencyTable(total={self.total}, layers={{{len(self.layers)} of them}}, "
            f"quantize={self.quantize!r}, threads={self.threads}, target={self.target!r})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table to `path` as CSV; docs/deploy.md has its columns."""
        with open(path, "w", encoding="utf-8", newline="") as file:
            write_rows(file, self.rows())

    def rows(self) -> Iterable[dict[str, Any]]:
        """The rows of the CSV file."""
        settings = {
            "quantize": self.quantize or "float32",
            "threads": self.threads,
            "target": self.target,
        }
        yield {
            **dict.fromkeys(COLUMNS, ""),
            **settings,
            "kind": "model",
            "calls": 1,
            "slices": 0,
            "rank": 0,
            "nanoseconds": self.total,
        }
        for call, costs in self.layers.items():
            for (slices, rank), time in costs.points.items():
                yield {
                    **call.to_row(),
                    **settings,
                    "calls": self.calls[call],
                    "slices": slices,
                    "rank": rank,
                    "nanoseconds": time,
                }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Reads a table that `save` or the command `latency-read` wrote.

        Raises:
            ValueError: If the file is no such table.
        """
        return cls.from_rows(read_rows(path), os.fspath(path))

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], where: str) -> LatencyTable:
        """The table of the rows of a CSV file.

        Raises:
            ValueError: If they are none.
        """
        missing = [name for name in COLUMNS if not rows or name not in rows[0]]
        if missing:
            raise ValueError(
                f"Expected a latency table in {where!r}, with the columns {', '.join(COLUMNS)}. "
                f"Received: {'no rows' if not rows else 'none named ' + ', '.join(missing)}"
            )
        totals: list[int] = []
        calls: dict[LayerCall, int] = {}
        points: dict[LayerCall, dict[tuple[int, int], int]] = {}
        try:
            settings = {(row["quantize"], int(row["threads"]), row["target"]) for row in rows}
            for row in rows:
                nanoseconds = round(float(row["nanoseconds"]))
                if row["kind"] == "model":
                    if nanoseconds < 1:
                        raise ValueError(f"{nanoseconds} ns for the whole model")
                    totals.append(nanoseconds)
                    continue
                call = LayerCall.from_row({key: str(value) for key, value in row.items()})
                calls[call] = int(row["calls"])
                point = int(row["slices"]), int(row["rank"])
                points.setdefault(call, {})[point] = nanoseconds
            layers = {call: SampledCosts.of_points(found) for call, found in points.items()}
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(
                f"Expected a latency table in {where!r}: numbers in the columns of sizes and "
                f"times, and a dense row for every layer. Received: one that does not fit ({error})"
            ) from error
        if len(settings) != 1 or len(totals) != 1:
            raise ValueError(
                f"Expected a latency table in {where!r} of one model under one quantization, "
                "number of threads and target: a table a model. "
                f"Received: {len(totals)} models, settings {sorted(map(str, settings))}"
            )
        ((quantize, threads, target),) = settings
        return cls(
            totals[0], layers, calls, None if quantize == "float32" else quantize, threads, target
        )


class MeasuredLatency:
    """Measured latency, in nanoseconds, as `select` limits it: a `models.resources.Resource`.

    Args:
        inventory: The model.
        table: The latencies of its layers.

    Attributes:
        total: Latency of the whole original, at least that of its layers together.
        runtime: What was measured: `"float32, 1 thread"`.

    Raises:
        ValueError: If the table lacks a layer, or is of another model.
    """

    name = "latency"

    def __init__(self, inventory: Inventory, table: LatencyTable) -> None:
        records = measured_records(inventory)
        calls = layer_calls(inventory, records)
        _check_of_model(inventory, records, calls, table)
        self._costs = {
            record.layer: sum_costs(
                [
                    (count, table.layers[call])
                    for call, count in collections.Counter(calls[record.layer]).items()
                ]
            )
            for record in records
            if calls[record.layer]
        }
        self.total = max(table.total, sum(cost.dense for cost in self._costs.values()))
        threads = f"{table.threads} thread{'s' if table.threads > 1 else ''}"
        self.runtime = f"{table.quantize or 'float32'}, {threads}"

    def costs(self, record: LayerRecord) -> Costs:
        """What the choices of a layer cost, all its calls together."""
        return self._costs[record.layer]

    def skipped(self, record: LayerRecord) -> Skipped | None:
        """Layers of other kinds, and those that are not called, have no measured latency."""
        if not record.kind.measured:
            detail = f"latency is not measured of {record.class_name}"
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
    """Measures with LiteRT, on this machine, how long a model's layers take, dense and factorized.

    The whole original is converted and measured once. Of every layer that can be factorized, and
    every input size that it is called with, small files are written directly, which hold the dense
    layer or the encoder and decoder of a choice (k, j), and some choices are measured: at as few
    ranks as leave the rest known to about 4 % of the dense layer's time. What was measured is kept
    for the process. One forward pass is of one example; on one thread the processor time is taken,
    so that other programs disturb little.

    Args:
        model: A built Keras 3 or tf_keras model, not compressed, whose input sizes are known.
        quantize: None for float32, or `"int8"`.
        threads: Integer. Number of threads of the runtime. Defaults to 1.
        target: `"litert"` (with XNNPACK) or `"litert-reference"` (built-in kernels). Defaults to
            `"litert"`. Its choices of slices and ranks are those that are measured.
        exclude: As for `select`: layers that are not measured.
        max_slices: Integer or None. Largest number of slices k that is measured.
        representative_data: As for `convert`, for the int8 file of the whole model. Defaults to
            random numbers: time does not depend on them.
        verbose: 0 for silence, else a progress bar is shown on a terminal. Defaults to 1.

    Returns:
        A `LatencyTable`.

    Raises:
        ImportError: If LiteRT is not installed.
        ValueError: If an argument is not as above, the model has no layer that can be factorized,
            is compressed already or not built, an input size is unknown, or the model cannot be
            converted.

    Example:
    ```python
    table = keras_alds.litert.measure_latency(model, verbose=0)
    print(f"{table.total / 1e6:.3f} ms, {len(table.layers)} layers")
    ```
    """
    check_settings(quantize, threads, max_slices)
    _check_local(target)
    runtime = _Runtime(quantize, threads, target)
    inventory = measurable(model, exclude, stacklevel=2)
    return _measured(inventory, runtime, max_slices, representative_data, verbose)


def check_settings(quantize: Any, threads: Any, max_slices: Any) -> None:
    """Raises a ValueError for settings under which nothing can be measured."""
    if quantize not in QUANTIZE:
        raise ValueError(
            f"Expected `quantize` to be None or 'int8', to measure latency. "
            f"Received: quantize={quantize!r}"
        )
    positive_int(threads, "threads")
    if max_slices is not None:
        positive_int(max_slices, "max_slices")


def measurable(model: Any, exclude: Any = (), *, stacklevel: int = 1) -> Inventory:
    """A model, inspected, of which some layers' latency can be measured.

    Warns of what `exclude` names in vain.

    Raises:
        ValueError: If there is no such layer, or if the model is not built or compressed already.
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


def check_table(latency: Any, target: str | None) -> LatencyTable | None:
    """Returns the table that `latency=` of `select` stands for; None if it is to be measured.

    Raises:
        ValueError: If it is none, of another target, or has to be given.
    """
    if latency is None:
        _check_local(target)
        return None
    if isinstance(latency, (str, os.PathLike)):
        latency = LatencyTable.load(latency)
    if not isinstance(latency, LatencyTable):
        raise ValueError(
            "Expected `latency` to be a `keras_alds.litert.LatencyTable` or the path of one. "
            f"Received: latency={latency!r}"
        )
    if latency.target != target:
        raise ValueError(
            f"Expected a latency table that was measured for target={target!r}. Received: one for "
            f"target={latency.target!r}. Pass that as `target`, or measure again."
        )
    return latency


def measured_latency(
    inventory: Inventory,
    table: LatencyTable | None,
    *,
    target: str,
    max_slices: int | None = None,
    verbose: int = 1,
) -> MeasuredLatency:
    """The latency of a model's layers, from a table or measured now.

    Args:
        inventory: The model.
        table: A table of this model, or None to measure: in float32, on one thread.
        target: The runtime.
        max_slices: Largest number of slices to measure.
        verbose: As for `measure_latency`.

    Raises:
        ValueError: If the table lacks a layer, or is of another model.
    """
    if table is None:
        table = _measured(inventory, _Runtime(None, 1, target), max_slices, verbose=verbose)
    return MeasuredLatency(inventory, table)


def _check_of_model(
    inventory: Inventory, records: Sequence[LayerRecord], calls: Calls, table: LatencyTable
) -> None:
    """Raises a ValueError if a table lacks a layer of a model, or is of another model."""
    expected = f"Expected a latency table of the model '{inventory.model.name}'. Received: "
    for record in records:
        for call in calls[record.layer]:
            if call not in table.layers:
                raise ValueError(
                    f"{expected}one without its layer '{record.path}' ({call}). Measure the model: "
                    "`keras_alds.litert.measure_latency`, or on a device "
                    "`python -m keras_alds latency-files`."
                )
    # A table with layers that were not asked for may be of a model with other ones.
    complete = not any(record.excluded for record in inventory.records)
    counts = _counts(calls)
    for call in sorted(table.calls):
        there, here = table.calls[call], counts[call]
        if here > there or (complete and here < there):
            raise ValueError(
                f"{expected}one of another model, whose time as a whole is not known of this one: "
                f"{there} calls of {call}, where '{inventory.model.name}' has {here}. Measure this "
                "model."
            )


def write_rows(
    file: Any, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS
) -> None:
    """Writes rows of a table as CSV."""
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Reads the rows of a CSV file; none of a file that is not text."""
    with open(path, encoding="utf-8", newline="") as file:
        try:
            return list(csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error):
            return []


# -- Measurement ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Runtime:
    quantize: str | None
    threads: int
    target: str

    def times(self, files: Sequence[Any], swept: int = 0) -> list[int]:
        return time_files(files, threads=self.threads, delegate=LOCAL[self.target], swept=swept)


# What was measured: of layers by call, runtime, bytes swept and ranks; of models by their calls.
_LAYERS: dict[tuple, SampledCosts] = {}
_MODELS: weakref.WeakKeyDictionary[Any, dict[tuple, tuple[int, int]]] = weakref.WeakKeyDictionary()


def _check_local(target: Any) -> None:
    if target not in LOCAL:
        raise ValueError(
            f"Expected target={' or '.join(map(repr, LOCAL))}, to measure latency here. Received: "
            f"target={target!r}. Measure on a device: `python -m keras_alds latency-files`."
        )


def ranks_to_measure(
    layer: Any, call: LayerCall, target: str, max_slices: int | None
) -> dict[int, tuple[int, ...]]:
    """The ranks of a layer's choices that a target allows and that are smaller, by slices."""
    rule = functools.partial(TARGETS[target].ranks, depthwise=len(set(call.strides)) <= 1)
    shape = tuple(map(int, layer.kernel.shape))
    offered = offered_ranks(shape, rule=rule, max_slices=max_slices)
    return {k: tuple(ranks) for k, ranks in offered.items()}


def _measured(
    inventory: Inventory,
    runtime: _Runtime,
    max_slices: int | None,
    representative_data: Any = None,
    verbose: int = 1,
) -> LatencyTable:
    _package.interpreter()  # complains before the work is done
    records = measured_records(inventory)
    calls = layer_calls(inventory, records)
    layers = {call: record.layer for record in records for call in calls[record.layer]}
    total, size = _model_latency(inventory.model, runtime, calls, representative_data, verbose)
    # The size that decides what stays in the caches, by powers of two: models share measurements.
    swept = min(1 << (size - 1).bit_length(), MOST_SWEPT)
    costs: dict[LayerCall, SampledCosts] = {}
    overhead = None
    with Progress(transient=True, disable=not verbose) as progress:
        for call in progress.track(sorted(layers), description="latency of layers"):
            ranks = ranks_to_measure(layers[call], call, runtime.target, max_slices)
            key = (call, runtime, swept, tuple(ranks.items()))
            if key not in _LAYERS:
                if overhead is None:
                    (overhead,) = runtime.times([empty_file])
                _LAYERS[key] = _layer_costs(call, ranks, runtime, swept, overhead)
            costs[call] = _LAYERS[key]
    return LatencyTable(
        total, costs, dict(_counts(calls)), runtime.quantize, runtime.threads, runtime.target
    )


def _counts(calls: Calls) -> collections.Counter[LayerCall]:
    return collections.Counter(call for found in calls.values() for call in found)


def _layer_costs(
    call: LayerCall,
    ranks: Mapping[int, Sequence[int]],
    runtime: _Runtime,
    swept: int,
    overhead: int,
) -> SampledCosts:
    def measure(points: Sequence[tuple[int, int]]) -> list[int]:
        files = [
            functools.partial(layer_file, call, *point, quantize=runtime.quantize)
            for point in points
        ]
        return [max(time - overhead, 1) for time in runtime.times(files, swept)]

    return sample_costs(measure, ranks)


def _model_latency(
    model: Any,
    runtime: _Runtime,
    calls: Calls,
    data: Any,
    verbose: int,
) -> tuple[int, int]:
    """Latency of the whole model and the size of its file."""
    known = _MODELS.setdefault(model, {})
    key = (runtime, tuple(map(tuple, calls.values())))
    if key not in known:
        content = converted(model, runtime.quantize, data, verbose)
        (time,) = runtime.times([lambda: content])
        known[key] = (time, len(content))
    return known[key]


def converted(model: Any, quantize: str | None, data: Any = None, verbose: int = 0) -> bytes:
    """The file of a whole model, to be measured: with pruning's wrappers off, whose ops cost."""
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
