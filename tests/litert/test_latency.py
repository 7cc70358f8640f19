"""Latency as a budget: layer files, sampling, tables, the device's log, and plans made of them."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

import keras_alds
from keras_alds._backend.wrappers import without_pruning
from keras_alds.cli import main
from keras_alds.core.costs import DENSE, NEVER, Point, SampledCosts
from keras_alds.core.slicing import convolution_unfolding
from keras_alds.litert import device, latency
from keras_alds.litert.latency import measure_latency
from keras_alds.litert.layer_files import LayerCall, layer_calls, layer_file
from keras_alds.litert.sampling import sample_costs
from keras_alds.litert.table import ADDED, COLUMNS, LatencyTable, Settings, read_rows
from keras_alds.litert.timing import Timing, clock, time_files
from keras_alds.models.inventory import Inventory
from keras_alds.plan import CompressionPlan
from keras_alds.progress import progress_bar
from keras_alds.tables import write_csv

pytest.importorskip("ai_edge_litert")

from keras_alds.litert.runs import Runner

CONVERTED = latency.converted  # `runtime` puts another one in its place
WIDTH = 16  # of the tiles of the made-up runtime


def made_up(call: LayerCall, slices: int, rank: int, scheme: int = 0) -> int:
    """Nanoseconds in a made-up runtime: tiles of 16, a toll on every group, and no noise."""
    positions = math.prod(call.input[:-1])
    *kernel, channels, filters = call.kernel_shape
    area = math.prod(kernel)
    if slices == 0:
        return positions * channels * area * (-(-filters // WIDTH)) + 500
    tiles = -(-rank // WIDTH)
    decoder_area = math.prod(kernel[axis] for axis in {1: (0,), 2: (1,), 3: (0, 1)}.get(scheme, ()))
    encoder = positions * (channels * area // decoder_area * tiles + 40 * (slices - 1))
    return encoder + positions * slices * rank * decoder_area * (-(-filters // WIDTH)) + 500


TOTAL = 800_000


def calls_of(model: Any) -> dict[Any, list[LayerCall]]:
    """The calls of all layers with weights."""
    inventory = Inventory.of(model)
    return layer_calls(inventory, [r for r in inventory.records if r.layer.get_weights()])


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The made-up runtime in place of the clock; gives the list of what is measured in it."""
    measured: list[Any] = []

    def times(files: Sequence[Callable[[], bytes]], **options: Any) -> list[int]:
        result = []
        for file in files:
            measured.append(file)
            if isinstance(file, functools.partial):
                call, *choice = file.args
                result.append(made_up(call, *choice))
            else:
                result.append(0 if file is latency.empty_file else TOTAL)
        return result

    monkeypatch.setattr(latency, "time_files", times)
    forget(monkeypatch)
    monkeypatch.setattr(latency, "converted", lambda *_: b"model")
    return measured


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets all measurements."""
    monkeypatch.setattr(latency, "_LAYERS", {})
    monkeypatch.setattr(latency, "_MODELS", type(latency._MODELS)())


@pytest.fixture
def disturbed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives a function that forgets all measurements, and disturbs those to come."""
    quiet = latency.time_files

    def disturb(change: Callable[[float], float]) -> None:
        forget(monkeypatch)
        monkeypatch.setattr(
            latency, "time_files", lambda *a, **b: [round(change(t)) for t in quiet(*a, **b)]
        )

    return disturb


def wide(keras: ModuleType) -> Any:
    """A net whose layers have choices in the target `"litert"`; one of them is called twice."""
    layers = keras.layers
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(64, 3, padding="same", activation="relu", name="stem")(inputs)
    shared = layers.Conv2D(64, 3, padding="same", name="shared")
    x = shared(x)
    x = layers.ReLU()(x)
    x = shared(layers.MaxPooling2D()(x))
    x = layers.Conv2D(96, 3, strides=2, name="down")(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(128, activation="relu", name="hidden")(x)
    return keras.Model(inputs, layers.Dense(10, name="head")(x), name="wide")


# -- Files of layers -----------------------------------------------------------------------------

CALLS = [
    LayerCall("conv", (1, 9, 7, 16), 24, (3, 3), (1, 1), "same", (1, 1)),
    LayerCall("conv", (1, 9, 8, 16), 24, (3, 3), (2, 2), "same", (1, 1)),
    LayerCall("conv", (1, 9, 8, 16), 24, (3, 3), (2, 1), "valid", (1, 1)),
    LayerCall("conv", (2, 9, 9, 16), 24, (3, 2), (1, 1), "valid", (2, 2)),
    LayerCall("conv", (1, 1, 20, 16), 8, (1, 5), (1, 1), "same", (1, 1)),
    LayerCall("dense", (1, 16), 40),
    LayerCall("dense", (5, 16), 40),
]


def reference(call: LayerCall, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    if call.kind == "dense":
        return x @ kernel + bias
    y = tf.nn.convolution(
        x, kernel, list(call.strides), call.padding.upper(), dilations=list(call.dilation)
    )
    return y.numpy() + bias


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_files_compute_what_the_layer_computes(call: LayerCall, quantize: str | None):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, call.input).astype(np.float32)
    bias = rng.normal(size=call.filters).astype(np.float32) / 4
    channels = call.input[-1]
    for slices, rank in ((0, 0), (1, 5), (2, 4), (channels, 1)):
        scale = np.sqrt(np.prod(call.kernel_shape[:-1]))
        if slices == 0:
            kernels = [rng.normal(size=call.kernel_shape) / scale]
            dense = kernels[0]
        else:
            hidden = slices * rank
            encoder = rng.normal(size=(*call.kernel, channels // slices, hidden)) / scale * 2
            decoder = rng.normal(size=(hidden, call.filters)) / np.sqrt(hidden)
            kernels = [encoder, decoder.reshape(*(1,) * len(call.kernel), *decoder.shape)]
            dense = keras_alds.core.slicing.recompose(encoder, decoder, slices)
        kernels = [kernel.astype(np.float32) for kernel in kernels]
        content = layer_file(call, slices, rank, quantize=quantize, kernels=kernels, bias=bias)
        runner = Runner(content)
        expected = reference(call, x, dense.astype(np.float32), bias)
        runner.set_inputs([x.reshape(runner.inputs[0]["shape"])])
        runner.invoke()
        ours = runner.get_outputs()[0].reshape(expected.shape)
        tolerance = 1e-4 if quantize is None else 0.35  # int8 steps of 0.05 in every layer
        np.testing.assert_allclose(ours, expected, atol=tolerance)
        file = keras_alds.litert.read_file(content)
        types = {tensor.dtype for tensor in file.tensors}
        assert types == ({"float32"} if quantize is None else {"int8", "int32"})
        assert len(file.operators) == (1 if slices == 0 else 2)
        # Without weights, as they are measured: these run as well.
        Runner(layer_file(call, slices, rank, quantize=quantize)).invoke()


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((9, 8), {"kernel_size": 3, "padding": "same"}),
        ((9, 8), {"kernel_size": (3, 2), "strides": (2, 1), "padding": "same"}),
        ((9, 8), {"kernel_size": (2, 3), "strides": 2}),
        ((9, 9), {"kernel_size": (3, 2), "dilation_rate": 2}),
        ((11,), {"kernel_size": 5, "strides": 2}),
        ((11,), {"kernel_size": 3, "dilation_rate": 2, "padding": "causal"}),
    ],
    ids=str,
)
def test_files_of_fold_schemes_compute_what_the_layers_compute(
    size: tuple[int, ...], options: dict[str, Any], keras_module: ModuleType
):
    rng = np.random.default_rng(0)
    kind = f"Conv{len(size)}D"
    plain = getattr(keras_module.layers, kind)(6, **options)
    ((call,),) = calls_of(keras_module.Sequential([keras_module.Input((*size, 8)), plain])).values()
    own = keras_alds.layers if keras_module is keras else keras_alds.tf_keras
    x = rng.normal(size=(1, *size, 8)).astype(np.float32)
    for scheme in (0, 1, 2, 3) if len(size) == 2 else (0, 3):
        layer = getattr(own, f"Factorized{kind}")(6, slices=1, rank=4, scheme=scheme, **options)
        layer.build(x.shape)
        layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
        expected = np.array(layer(x))
        encoder, decoder, bias = layer.get_weights()
        kernels = [k if k.ndim == 4 else k[None] for k in (encoder, decoder)]
        runner = Runner(layer_file(call, 1, 4, scheme, kernels=kernels, bias=bias))
        before = call.input[-2] - size[-1]  # what a causal convolution pads
        padded = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(before, 0), (0, 0)])
        runner.set_inputs([padded.reshape(call.input)])
        runner.invoke()
        found = runner.get_outputs()[0].reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        Runner(layer_file(call, 1, 4, scheme, quantize="int8")).invoke()


def test_files_have_the_operators_of_the_converter(keras_module: ModuleType):
    model = wide(keras_module)
    options = {"target": "litert", "method": "energy", "schemes": "all"}
    small = keras_alds.compress(model, 0.6, **options)
    converted = keras_alds.litert.read_file(keras_alds.litert.convert(small, verbose=0))
    there = {
        (op.name, op.data.shape, op.weights.shape, op.outputs[0].shape) for op in converted.weighted
    }
    layers = {layer.name: layer for layer in model.layers}
    plan = keras_alds.select(model, 0.6, **options)
    assert len(plan.factorized) >= 2
    assert any(choice.scheme for choice in plan.factorized)
    for choice in plan.factorized:
        layer = layers[choice.layer]
        for call in calls_of(model)[layer]:
            content = layer_file(call, choice.slices, choice.rank, choice.scheme)
            for op in keras_alds.litert.read_file(content).weighted:
                assert (op.name, op.data.shape, op.weights.shape, op.outputs[0].shape) in there


def test_calls_of_every_kind_of_layer(keras_module: ModuleType):
    layers = keras_module.layers
    inputs = keras_module.Input((20, 6))
    x = layers.Conv1D(8, 3, padding="causal", dilation_rate=2, name="causal")(inputs)
    x = layers.Conv1D(8, 3, strides=2, name="strided")(x)
    outputs = layers.Dense(5, name="dense")(x)
    model = keras_module.Model(inputs, outputs)
    found = {layer.name: calls for layer, calls in calls_of(model).items()}
    assert found == {
        "causal": [LayerCall("conv", (1, 1, 24, 6), 8, (1, 3), (1, 1), "valid", (1, 2))],
        "strided": [LayerCall("conv", (1, 1, 20, 8), 8, (1, 3), (2, 2), "valid", (1, 1))],
        "dense": [LayerCall("dense", (9, 8), 5)],
    }
    for calls in found.values():
        assert LayerCall.from_row(calls[0].to_row()) == calls[0]
    first = keras_module.Sequential(
        [
            keras_module.Input((3, 8, 9)),
            layers.Conv2D(4, 3, data_format="channels_first", name="first"),
        ]
    )
    with_channels = calls_of(first)[first.layers[0]]
    assert with_channels[0].input == (1, 8, 9, 3)


def test_time_files_runs_every_file(monkeypatch: pytest.MonkeyPatch):
    made = []

    def file(rank: int) -> bytes:
        made.append(rank)
        return layer_file(CALLS[0], 1, rank)

    times = time_files([functools.partial(file, rank) for rank in (1, 2, 3)], swept=10**6)
    assert len(times) == 3
    assert min(times) > 0
    assert made == [1, 2, 3]
    assert time_files([]) == []
    assert clock(2) is not None


def test_files_that_leave_the_size_of_outputs_open():
    model = keras.Sequential([keras.Input((5, 8)), keras.layers.LSTM(4, return_sequences=True)])
    content = keras_alds.litert.convert(model, verbose=0)
    assert min(time_files([lambda: content] * 2)) > 0


# -- Sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        LayerCall("conv", (1, 8, 8, 128), 128, (3, 3), (1, 1), "same", (1, 1)),
        LayerCall("conv", (1, 8, 8, 64), 256, (1, 1), (1, 1), "same", (1, 1)),
        LayerCall("dense", (1, 512), 384),
    ],
    ids=str,
)
def test_few_measurements_tell_all_ranks(call: LayerCall):
    *_, channels, filters = call.kernel_shape
    folded = [(1, s) for s in (1, 2, 3) if len(call.kernel) == 2]
    ranks = {
        (k, s): range(1, min(channels // k * math.prod(call.kernel), filters))
        for k, s in [(1, 0), (2, 0), (4, 0), *folded]
    }
    asked: list[Point] = []

    def measure(points: Sequence[Point]) -> list[int]:
        asked.extend(points)
        return [made_up(call, *point) for point in points]

    costs = sample_costs(measure, ranks)
    assert len(asked) == len(set(asked)) < 0.5 * sum(map(len, ranks.values()))
    dense = made_up(call, 0, 0)
    assert costs.dense == dense
    assert {(k, s) for s, k, *_ in costs.samples} >= set(folded)
    for scheme, k, known, _ in costs.samples:
        row = ranks[k, scheme]
        for rank, cost in zip(row, costs.of(k, row, scheme), strict=True):
            truth = made_up(call, k, rank, scheme)
            if rank in known:
                assert cost == truth
            elif truth < dense:  # choices that are slower are never taken
                assert abs(cost - truth) <= 0.08 * dense


def test_useless_slices_are_hardly_measured():
    asked: list[Point] = []

    def time(k: int, j: int, scheme: int) -> int:
        # Ever slower with more slices, but for the depthwise form.
        return 100 if k == 0 else 10 * j if k == 32 else j + 50 * (k - 1) + 120 * (scheme == 2)

    def measure(points: Sequence[Point]) -> list[int]:
        asked.extend(points)
        return [time(*point) for point in points]

    ranks = {(k, 0): range(1, 33 // k + 1) for k in (1, 2, 4, 8, 16, 32)}
    ranks |= {(1, 1): range(1, 17), (1, 2): range(1, 90)}  # scheme 2 is slower than dense
    costs = sample_costs(measure, ranks)
    assert [(s, k) for s, k, *_ in costs.samples] == [(0, 1), (0, 32), (1, 1)]
    assert {k for k, _, scheme in asked if not scheme} == {0, 1, 2, 4, 32}
    assert len([point for point in asked if point[2] == 2]) == 2
    assert sample_costs(lambda points: [7] * len(points), {}) == SampledCosts(7, ())


# -- Tables --------------------------------------------------------------------------------------


def test_measure_latency_and_csv_round_trip(
    keras_module: ModuleType, runtime: list[Any], tmp_path: Path
):
    model = wide(keras_module)
    table = measure_latency(model, verbose=0)
    assert table.total == TOTAL
    assert sorted(table.calls.values()) == [1, 1, 1, 1, 1, 1]
    for call, costs in table.layers.items():
        for point, time in costs.points.items():
            assert time == made_up(call, *point)
        folds = {0, 1, 2, 3} if call.kernel and call.input[-1] > 3 else {0}
        assert {scheme for *_, scheme in costs.points} >= folds
    again = len(runtime)
    assert measure_latency(model, verbose=0) == table
    assert len(runtime) == again, "measured twice"
    path = tmp_path / "latency.csv"
    table.save(path)
    assert LatencyTable.load(path) == table
    with open(path, encoding="utf-8") as file:
        header = next(csv.reader(file))
    assert tuple(header) == COLUMNS
    int8 = measure_latency(model, quantize="int8", threads=2, max_slices=1, verbose=0)
    assert (int8.quantize, int8.threads) == ("int8", 2)
    assert all(k <= 1 for costs in int8.layers.values() for k, *_ in costs.points)
    options = {"objective": "latency", "latency_table": int8, "max_slices": 1}
    for quantize in (None, "int8"):
        plan = keras_alds.select(model, 0.02, quantize=quantize, **options)
        assert plan.runtime == "int8, 2 threads"
    with pytest.raises(ValueError, match=r"quantize='int8'\. Received: one in float32"):
        keras_alds.select(model, 0.02, objective="latency", latency_table=path, quantize="int8")


@pytest.mark.parametrize("seed", range(3))
def test_plans_of_noisy_tables_agree(seed: int, runtime: list[Any], disturbed: Any):
    """Times are 0 to 3 % too long, and one in ten is up to twice as long."""
    model = wide(keras)
    plans = []
    for number in range(2):
        rng = np.random.default_rng((seed, number))
        disturbed(functools.partial(busy, rng))
        table = measure_latency(model, verbose=0)
        timings = [t for found in table.timings.values() for t in found.values()]
        assert 0.002 < table.noise < 0.03
        assert {t.repeats for t in timings} >= {2, 3}
        for call, found in table.timings.items():
            for point, t in found.items():
                assert 0.99 <= t.nanoseconds / made_up(call, *point) < 1.05
        plans.append(
            keras_alds.select(
                model, 0.2, objective="latency", latency_table=table, method="energy", schemes="all"
            )
        )
    first, second = (true_latency(model, plan) for plan in plans)
    assert abs(first / second - 1) < 0.05
    for truth in (first, second):
        assert truth < 1.03 * 0.8 * TOTAL


def busy(rng: np.random.Generator, time: float) -> float:
    """A time as it is measured beside other programs."""
    disturbance = 1 + rng.random() if rng.random() < 0.1 else 1
    return time * (1 + 0.03 * rng.random()) * disturbance


def true_latency(model: Any, plan: CompressionPlan) -> int:
    """Nanoseconds of a compressed model in the made-up runtime."""
    calls = calls_of(model)
    saved = 0
    for choice in plan.factorized:
        for call in calls[model.get_layer(choice.layer)]:
            form = choice.slices, choice.rank, choice.scheme
            saved += made_up(call, 0, 0) - made_up(call, *form)
    return TOTAL - saved


def test_savings_count_in_steps_of_the_noise(runtime: list[Any]):
    model = wide(keras)
    table = measure_latency(model, verbose=0)
    assert table.noise == 0
    timings = {
        call: {point: dataclasses.replace(t, spread=0.05) for point, t in found.items()}
        for call, found in table.timings.items()
    }
    for noisy in (table, dataclasses.replace(table, timings=timings)):
        for call in table.layers:
            costs = noisy.costs([call, call])
            assert costs.step == max(round(2 * noisy.noise_of(call)), 1)
            ranks = next(ranks for s, k, ranks, _ in costs.samples if (s, k) == (0, 1))
            times = costs.of(1, ranks)
            assert not ((costs.dense - times) % costs.step).any()
            truth = 2 * np.array([made_up(call, 1, j) for j in ranks])
            assert ((truth <= times) & (times < truth + costs.step)).all()
        options = {"objective": "latency", "latency_table": noisy, "method": "energy"}
        plan = keras_alds.select(model, 0.1, **options)
        assert true_latency(model, plan) <= plan.costs["latency"].after <= 0.9 * TOTAL


def test_a_busy_machine_is_said_and_measured_again(
    runtime: list[Any], disturbed: Any, tmp_path: Path
):
    model = wide(keras)
    rng = np.random.default_rng(0)
    disturbed(lambda t: t * (1 + 4 * rng.random()))
    with pytest.warns(UserWarning, match=r"on a busy machine: .* differ by \d+%") as caught:
        table = measure_latency(model, verbose=0)
    assert [w.filename for w in caught] == [__file__]
    assert table.noise > 0.1
    table.save(tmp_path / "busy.csv")
    assert LatencyTable.load(tmp_path / "busy.csv").noise == table.noise
    for options in ({"latency_table": tmp_path / "busy.csv"}, {}):
        measured = len(runtime)
        with pytest.warns(UserWarning, match="on a busy machine") as caught:
            keras_alds.select(model, 0.05, objective="latency", **options)
        assert [w.filename for w in caught if "busy" in str(w.message)] == [__file__]
        assert (len(runtime) > measured) == (not options)
    disturbed(lambda t: t)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure_latency(model, verbose=0).noise == 0


def test_tables_of_older_versions_know_scheme_0(runtime: list[Any], tmp_path: Path):
    model = wide(keras)
    table = measure_latency(model, verbose=0)
    path = tmp_path / "old.csv"
    table.save(path)
    rows = [row for row in read_rows(path) if row["scheme"] in ("", "0")]
    assert len(rows) < len(read_rows(path))
    write_csv(path, [{k: row[k] for k in row if k not in ADDED} for row in rows])
    old = LatencyTable.load(path)
    assert old.total == table.total
    for call, costs in table.layers.items():
        expected = {point: time for point, time in costs.points.items() if not point[2]}
        assert old.layers[call].points == expected
    options = {"objective": "latency", "method": "energy", "schemes": "all"}
    plan = keras_alds.select(model, 0.2, latency_table=old, **options)
    assert {choice.scheme for choice in plan.factorized} == {0}


def test_the_plan_chooses_among_all_schemes(runtime: list[Any]):
    """Three convolutions that only one scheme approximates well each."""
    model = keras.Sequential(
        [keras.Input((12, 12, 32))]
        + [keras.layers.Conv2D(32, 3, padding="same", name=f"conv{s}") for s in (1, 2, 3)]
    )
    rng = np.random.default_rng(0)
    for scheme, layer in zip((1, 2, 3), model.layers, strict=True):
        unfolding = convolution_unfolding(2, scheme)
        *sizes, filters = unfolding.shape(layer.kernel.shape)
        low = rng.normal(size=(math.prod(sizes), 4)) @ rng.normal(size=(4, filters))
        layer.kernel.assign(unfolding.write(low.reshape(*sizes, filters), layer.kernel.shape))
    table = measure_latency(model, verbose=0)
    for method in ("energy", "alds"):
        options = {"objective": "latency", "method": method, "schemes": "all"}
        plan = keras_alds.select(model, 0.22, latency_table=table, **options)
        assert [(c.scheme, c.rank) for c in plan.factorized] == [(1, 4), (2, 4), (3, 4)]
        assert max(c.error for c in plan.factorized) < 1e-3
        for choice in plan.factorized:
            (call,) = table.layers
            assert choice.costs["latency"].after == made_up(call, 1, 4, choice.scheme)


def test_layers_that_make_one_call_have_the_choices_of_both(runtime: list[Any]):
    inputs = keras.Input((1, 20, 32))
    flat = keras.layers.Reshape((20, 32))(inputs)
    one = keras.layers.Conv1D(32, 5, name="one")(flat)
    two = keras.layers.Conv2D(32, (1, 5), name="two")(inputs)
    model = keras.Model(inputs, [one, two])
    (costs,) = measure_latency(model, verbose=0).layers.values()
    assert {scheme for *_, scheme in costs.points} == {0, 2, 3}


def test_shared_layers_and_exclusion(runtime: list[Any]):
    model = wide(keras)
    table = measure_latency(model, verbose=0, exclude="down")
    names = {layer.name: layer for layer in model.layers}
    calls = calls_of(model)
    assert all(call not in table.layers for call in calls[names["down"]])
    first, second = calls[names["shared"]]
    plan = keras_alds.select(
        model, 0.05, objective="latency", latency_table=table, exclude="down", method="energy"
    )
    choice = next(choice for choice in plan.choices if choice.layer == "shared")
    assert choice.costs["latency"].before == table.layers[first].dense + table.layers[second].dense
    twins = keras.Sequential(
        [keras.Input((8, 8, 64))] + [keras.layers.Conv2D(64, 3, padding="same") for _ in range(3)]
    )
    assert list(measure_latency(twins, verbose=0).calls.values()) == [3]


@pytest.mark.parametrize("method", ["alds", "energy", "activation"])
def test_the_budget_is_kept(method: str, runtime: list[Any]):
    model = wide(keras)
    data = zoo.examples(model, 32) if method == "activation" else None
    table = measure_latency(model, verbose=0)
    calls = calls_of(model)
    layers = {layer.name: layer for layer in model.layers}
    dense = sum(made_up(call, 0, 0) for found in calls.values() for call in found)
    for part in (0.2, 0.5, 0.7):
        cr = part * dense / TOTAL
        plan = keras_alds.select(
            model,
            cr,
            method=method,
            objective="latency",
            latency_table=table,
            calibration_data=data,
        )
        assert plan.cr >= cr
        assert plan.costs["latency"].after <= (1 - cr) * plan.costs["latency"].before
        assert plan.target == "litert"
        saved = 0
        for choice in plan.factorized:
            cost = choice.costs["latency"]
            assert cost.after < cost.before
            found = calls[layers[choice.layer]]
            form = choice.slices, choice.rank, choice.scheme
            truth = sum(made_up(call, *form) for call in found)
            assert abs(cost.after - truth) <= 0.05 * cost.before
            saved += cost.saved
        assert plan.costs["latency"].after == TOTAL - saved
        assert plan.runtime == "float32, 1 thread"
        assert CompressionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    small = keras_alds.compress(model, plan=plan, calibration_data=data)
    assert small.count_params() == plan.params_after
    printed: list[str] = []
    plan.summary(print_fn=printed.append)
    assert "Latency, µs" in printed[0]
    assert f"Predicted latency, µs (float32, 1 thread): {TOTAL / 1000:,.1f} → " in printed[0]
    assert plan.reduction("latency") == plan.cr
    keras_alds.report(model, small).summary(print_fn=printed.append)


def test_what_is_slower_is_never_taken(runtime: list[Any]):
    model = wide(keras)
    table = measure_latency(model, verbose=0)
    slow = {
        call: {
            point: time if point == DENSE or call.kind == "dense" else Timing(10**9)
            for point, time in timings.items()
        }
        for call, timings in table.timings.items()
    }
    table = dataclasses.replace(table, timings=slow)
    plan = keras_alds.select(model, 0.0005, objective="latency", latency_table=table)
    assert {choice.kind for choice in plan.factorized} == {"Dense"}
    reasons = [choice.reason for choice in plan.choices if choice.kind == "Conv2D"]
    assert all("no allowed choice is smaller and faster" in str(reason) for reason in reasons)
    with pytest.raises(ValueError, match=r"is not reachable .*'latency': expected 0 < cr <= 0\.00"):
        keras_alds.select(model, 0.5, objective="latency", latency_table=table)


def test_in_training_and_by_path(
    runtime: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    shown: list[int] = []

    def recording(verbose: int) -> Any:
        shown.append(verbose)
        return progress_bar(verbose)

    model = wide(keras)
    model.compile("sgd", "mse")
    x = zoo.examples(model, 8)
    y = np.zeros((8, 10), np.float32)
    measure_latency(model, verbose=0).save(tmp_path / "latency.csv")
    alds = keras_alds.ALDSCompress(
        0.05, at_epoch=1, objective="latency", latency_table=tmp_path / "latency.csv", verbose=0
    )
    before = len(runtime)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[alds])
    assert len(runtime) == before
    assert alds.plan.reduction("latency") >= 0.05
    # Nothing given: measured here, and as silently as was asked for.
    monkeypatch.setattr(latency, "progress_bar", recording)
    options = {"objective": "latency", "quantize": "int8", "max_slices": 2}
    silent = keras_alds.ALDSCompress(0.05, verbose=0, at_epoch=0, **options)
    fresh = wide(keras)
    fresh.compile("sgd", "mse")
    fresh.fit(x, y, verbose=0, callbacks=[silent])
    assert shown
    assert not any(shown)
    assert silent.plan.runtime == "int8, 1 thread"
    layers = [file for file in runtime[before:] if isinstance(file, functools.partial)]
    assert {file.keywords["quantize"] for file in layers} == {"int8"}
    plan = keras_alds.select(wide(keras), 0.05, objective="latency", max_slices=1)
    assert plan.cr >= 0.05
    assert all(choice.slices == 1 for choice in plan.factorized)


def test_bad_arguments(runtime: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = wide(keras)
    table = measure_latency(model, verbose=0)
    cases = [
        ({"latency_table": table}, "`latency_table` only with objective='latency'"),
        ({"quantize": "int8"}, "`quantize` only with objective='latency'"),
        ({"objective": "latency", "quantize": "float16"}, "`quantize` to be None or 'int8'"),
        ({"objective": "latency", "latency_table": 3}, "to be a `keras_alds.litert.LatencyTable`"),
        (
            {"objective": "latency", "latency_table": table, "target": "gpu-delegate"},
            "measured for",
        ),
        ({"objective": "latency", "target": "gpu-delegate"}, "For the latency of a device"),
        (
            {"plan": keras_alds.select(model, 0.2), "latency_table": table},
            "no options beside `plan`",
        ),
    ]
    for options, text in cases:
        with pytest.raises(ValueError, match=text):
            keras_alds.compress(model, None if "plan" in options else 0.1, **options)
    other = keras.Sequential([keras.Input((8, 8, 16)), keras.layers.Conv2D(64, 3, name="other")])
    with pytest.raises(ValueError, match=r"without its layer 'other'.*latency-files"):
        keras_alds.select(other, 0.1, objective="latency", latency_table=table)
    for options, text in (
        ({"quantize": "float16"}, "None or 'int8', to measure"),
        ({"threads": 0}, "`threads` to be a positive integer"),
        ({"max_slices": 0}, "`max_slices` to be a positive integer"),
        ({"target": "gpu-delegate"}, "which can run on this machine"),
        ({"exclude": ".*"}, "to measure its latency"),
    ):
        with pytest.raises(ValueError, match=text):
            measure_latency(model, **options)
    with pytest.raises(ValueError, match="to be built"):
        measure_latency(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(ValueError, match="not compressed yet"):
        measure_latency(keras_alds.compress(model, 0.5))
    with pytest.warns(UserWarning, match="'nowhere' matches no layer"):
        measure_latency(model, exclude="nowhere", verbose=0)
    assert len(repr(table)) < 120
    unknown = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(16, 3)])
    with pytest.raises(ValueError, match="Expected a known input size, to measure latency"):
        measure_latency(unknown)
    path = tmp_path / "table.csv"
    table.save(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for text, message in (
        ("", "no rows"),
        ("a,b\n1,2\n", "none named kind"),
        (lines[0] + lines[1].replace(str(TOTAL), "fast"), "does not fit"),
        (lines[0] + lines[1].replace(str(TOTAL), "inf"), "does not fit"),
        (lines[0] + lines[1].replace(str(TOTAL), "0"), "0 ns for the whole model"),
        ("a\0\n1\n", "Expected a latency table"),
        ("".join(lines[:1] + lines[2:]), "0 models"),
        ("".join(lines) + lines[1], "2 models"),
        ("".join(lines[:2] + lines[3:]), "does not fit"),
        (lines[0] + lines[1].replace(",2,0.0", ",2,-1"), "spread=-1"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            LatencyTable.load(path)
    path.write_bytes(b"\x80\xff")
    with pytest.raises(ValueError, match="no rows"):
        LatencyTable.load(path)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ImportError, match=r'pip install "keras_alds\[litert\]"'):
        keras_alds.select(model, 0.1, objective="latency")


def test_tables_of_other_models_with_the_same_layers(runtime: list[Any]):
    def net(depth: int) -> Any:
        convolutions = [keras.layers.Conv2D(64, 3, padding="same") for _ in range(depth)]
        return keras.Sequential([keras.Input((8, 8, 64)), *convolutions])

    table = measure_latency(net(2), verbose=0)
    options = {"objective": "latency", "latency_table": table}
    for depth in (1, 3):
        with pytest.raises(ValueError, match=rf"one of another model.* has {depth}\. Measure"):
            keras_alds.select(net(depth), 0.01, **options)
    model = net(2)
    # What is excluded is not known to be of another model.
    plan = keras_alds.select(model, 0.01, exclude=model.layers[0].name, **options)
    assert plan.costs["latency"].before == TOTAL
    assert len(plan.factorized) == 1


@pytest.mark.filterwarnings("ignore")
def test_pruned_models_are_measured_without_their_wrappers(runtime: list[Any]):
    sparsity = pytest.importorskip("tensorflow_model_optimization").sparsity.keras
    keras = pytest.importorskip("tf_keras")
    plain = keras.Sequential(
        [
            keras.Input((8, 8, 64)),
            keras.layers.Conv2D(64, 3, name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, name="head"),
        ]
    )
    model = sparsity.prune_low_magnitude(plain)
    weights, wrapped = len(model.weights), list(model.layers)
    bare = without_pruning(model)
    assert [type(layer) for layer in bare.layers] == [type(layer) for layer in plain.layers]
    assert [w.shape for w in bare.weights] == [w.shape for w in plain.weights]
    assert without_pruning(plain) is plain
    operators = [op.name for op in keras_alds.litert.read_file(CONVERTED(model, None)).operators]
    expected = keras_alds.litert.read_file(CONVERTED(plain, None)).operators
    assert operators == [op.name for op in expected]
    assert model.layers == wrapped
    assert len(model.weights) == weights
    # In the fit that prunes, with nothing measured before.
    model.compile("sgd", "mse")
    alds = keras_alds.ALDSCompress(0.05, at_epoch=1, objective="latency", verbose=0)
    x, y = zoo.examples(plain, 8), np.zeros((8, 10), np.float32)
    callbacks = [sparsity.UpdatePruningStep(), alds]
    model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks)
    assert alds.plan.reduction("latency") >= 0.05


# -- On a device ---------------------------------------------------------------------------------

# What the tool prints for one file, with and without the statistics of newer versions.
NEW = """\
INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Num threads: [1]
INFO: Graph: [/data/local/tmp/latency/{name}]
INFO: Use xnnpack: [1]
INFO: Loaded model /data/local/tmp/latency/{name}
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
INFO: The input model file size (MB): 0.152412
INFO: Initialized session in 1.25ms.
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but \
terminate if exceeding 150 seconds.
INFO: count=512 first=3111 curr=960 min=950 max=3111 avg=977.5 std=40 p5=951 median=960 p95=1000

INFO: Running benchmark for at least 50 iterations and at least 1 seconds but \
terminate if exceeding 150 seconds.
INFO: count=1033 first={time} curr=1 min=1 max=99999 avg=5.5e+03 std=40 p5=2 median={time} p95=2000

INFO: Inference timings in us: Init: 1250, First inference: 3111, \
Warmup (avg): 977.5, Inference (avg): 5.5e+03
INFO: Memory footprint delta from the start of the tool (MB): init=2.5 overall=3.1
"""
OLD = """\
STARTING!
Graph: [{name}]
Loaded model {name}
count=50 first=42 curr=12 min=10 max=42 avg={time} std=2

Inference timings in us: Init: 99, First inference: 42, Warmup (avg): 44, Inference (avg): {time}
"""


def test_log_of_the_benchmark_tool():
    text = NEW.format(name="00001.tflite", time="1234.5")
    text += NEW.format(name="00002.tflite", time="7").split("INFO: Running")[0]  # it broke off
    text += OLD.format(name="a/b/00003.tflite", time="1.5e+03")
    text += OLD.format(name="00003.tflite", time="1600") + "ERROR: Failed to load\n"
    assert device.parse_log(text) == {"00001.tflite": [1234.5], "00003.tflite": [1500, 1600]}
    assert device.parse_log("nothing") == {}
    garbled = OLD.format(name="00004.tflite", time="1.2.3")
    assert device.parse_log(garbled) == {}
    assert device.parse_log(garbled.replace("(avg): 1.2.3", "(avg): 7")) == {"00004.tflite": [7]}


def test_device_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    model = wide(keras)
    model.save(tmp_path / "model.keras")
    monkeypatch.chdir(tmp_path)
    assert main(["latency-files", "model.keras", "files", "--max-slices", "1"]) == 0
    with open("files/candidates.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = sorted(path.name for path in Path("files").glob("*.tflite"))
    assert names == sorted(row["file"] for row in rows)
    assert f"{len(names)} files" in capsys.readouterr().out
    log = ""
    for row in rows:
        Runner(Path("files") / row["file"]).invoke()
        time = {"model": "800", "empty": "0.5"}.get(row["kind"])
        if time is None:
            call = LayerCall.from_row(row)
            choice = int(row["slices"]), int(row["rank"]), int(row["scheme"])
            time = str(made_up(call, *choice) / 1000 + 0.5)
        log += NEW.format(name=row["file"], time=time)
    Path("log.txt").write_text(log.split("INFO: STARTING!\n", 3)[1], encoding="utf-8")
    with pytest.raises(ValueError, match="Expected timings of all"):
        keras_alds.litert.read_latency_log("files", "log.txt")
    with pytest.raises(ValueError, match=r"Expected candidates\.csv in the folder"):
        keras_alds.litert.read_latency_log(tmp_path, "log.txt")
    Path("log.txt").write_text(log, encoding="utf-8")
    assert main(["latency-read", "files", "log.txt", "--output", "phone.csv"]) == 0
    table = LatencyTable.load("phone.csv")
    assert table.total == TOTAL
    assert table.noise == 0
    slower = re.sub(r"median=([\d.]+)", lambda m: f"median={1.2 * float(m[1])}", log)
    Path("log.txt").write_text(log + slower, encoding="utf-8")
    again = keras_alds.litert.read_latency_log("files", "log.txt")
    assert again.model == Timing(TOTAL, 2, 0.2)
    assert 0.1 < again.noise < 0.25
    assert again.layers == table.layers
    for call, costs in table.layers.items():
        for point, time in costs.points.items():
            assert abs(time - made_up(call, *point)) <= 1
    arguments = ["plan", "model.keras", "--objective", "latency", "--latency-table", "phone.csv"]
    with pytest.raises(SystemExit):
        main([*arguments, "--quantize", "int8"])
    assert "measured with quantize='int8'" in capsys.readouterr().err
    assert main([*arguments, "--cr", "0.05", "--output", "plan.json"]) == 0
    assert CompressionPlan.load("plan.json").reduction("latency") >= 0.05
    assert "Latency, µs" in capsys.readouterr().out
    for options, text in (
        ({"quantize": "dynamic"}, "Expected `quantize` to be None or 'int8'"),
        ({"quantize": "INT8"}, r"Did you mean 'int8'\?"),
        ({"threads": 0}, "Expected `threads` to be a positive integer"),
        ({"target": "abacus"}, "Expected `target` to be one of 'cpu', 'litert', "),
    ):
        with pytest.raises(ValueError, match=text):
            keras_alds.litert.write_latency_files(model, "other", **options)
    assert not Path("other").exists()
    for text in ("", "a,b\n1,2\n", "kind\nmodel\nempty\n"):
        Path("files/candidates.csv").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit):
            main(["latency-read", "files", "log.txt", "--output", "phone.csv", "--force"])
        assert "as `latency-files` wrote it" in capsys.readouterr().err


def test_measure_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One small model, with the runtime's own clock: complete, positive, and used by `select`."""
    model = keras.Sequential(
        [
            keras.Input((6, 6, 64)),
            keras.layers.Conv2D(64, 3, name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(32, name="dense"),
        ]
    )
    model.save(tmp_path / "model.keras")
    output = tmp_path / "latency.csv"
    arguments = ["latency", str(tmp_path / "model.keras"), "--output", str(output)]
    assert main([*arguments, "--quantize", "int8", "--max-slices", "1"]) == 0
    assert "µs; 2 layers" in capsys.readouterr().out
    table = LatencyTable.load(output)
    assert table.quantize == "int8"
    assert table.total > 0
    records = {record.layer.name: record for record in Inventory.of(model).records}
    for call, costs in table.layers.items():
        assert costs.dense > 0
        record = records["dense" if call.kind == "dense" else "conv"]
        for (k, scheme), row in Settings(max_slices=1).ranks(record, call).items():
            assert (costs.of(k, row, scheme) < NEVER).all()
