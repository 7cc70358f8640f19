"""Statistics that several processes collect, and layers that they decompose."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

import keras
import numpy as np
import pytest

import keras_alds
from keras_alds import CalibrationStats, select
from keras_alds.core.calibration.accumulators import MomentAccumulator
from keras_alds.core.calibration.moments import FewInputs
from keras_alds.core.calibration.sums import joined

OPTIONS = {"max_examples": None, "verbose": 0}


def network(K):
    """A model with a convolution, and a wide dense layer whose inputs are kept themselves."""
    K.utils.set_random_seed(0)
    L = K.layers
    layers = [L.Conv2D(16, 3, activation="relu", name="c"), L.Flatten(), L.Dense(8, name="d")]
    return K.Sequential([K.Input((12, 12, 3)), *layers, L.Dense(8, name="e")], name="m")


def images(count):
    return np.random.default_rng(0).normal(size=(count, 12, 12, 3)).astype("float32")


def assert_same_inputs(some, others):
    for path, moment in some.moments.items():
        other = others.moments[path]
        assert type(moment) is type(other)
        assert moment.count == other.count
        np.testing.assert_allclose(moment.blocks, other.blocks, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(moment.mean, other.mean, rtol=1e-5, atol=1e-6)


def check_executor(executor: Executor) -> None:
    """What any executor has to give."""
    model, x = network(keras), images(544)
    stats = CalibrationStats.collect(model, x, executor=executor, **OPTIONS)
    whole = CalibrationStats.collect(model, x, **OPTIONS)
    assert stats.examples == 544
    assert stats.curves.keys() == whole.curves.keys()
    assert_same_inputs(stats, whole)
    for options in ({"calibration_data": stats}, {"method": "alds"}):
        expected = select(network(keras), 0.3, **options)
        assert select(network(keras), 0.3, executor=executor, **options) == expected


def test_process_pool():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        check_executor(pool)


def test_thread_pool():
    with ThreadPoolExecutor(2) as pool:
        check_executor(pool)


def test_dask():
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        check_executor(client.get_executor())


def test_sum_of_shards(keras_module, tmp_path):
    model, x = network(keras_module), images(128)
    parts = [CalibrationStats.collect(model, shard, **OPTIONS) for shard in (x[:96], x[96:])]
    total = parts[0] + parts[1]
    whole = CalibrationStats.collect(model, x, **OPTIONS)
    assert_same_inputs(total, whole)
    assert total.examples == 128
    for path, moment in total.moments.items():
        held = [part.moments[path].held_out for part in parts]
        assert moment.held_out.count == sum(each.count for each in held)
        expected = sum(each.count * each.blocks for each in held) / moment.held_out.count
        np.testing.assert_allclose(moment.held_out.blocks, expected, rtol=1e-5, atol=1e-6)
        rest = moment.without_held_out()
        expected = moment.count * moment.blocks - moment.held_out.count * moment.held_out.blocks
        np.testing.assert_allclose(rest.count * rest.blocks, expected, atol=1e-6)
    total.save(tmp_path / "stats.npz")
    loaded = CalibrationStats.load(tmp_path / "stats.npz")
    plan = select(model, 0.3, calibration_data=total)
    assert select(model, 0.3, calibration_data=loaded) == plan
    ridges = {path: moment.relative_ridge for path, moment in total.moments.items()}
    assert ridges == {path: moment.relative_ridge for path, moment in loaded.moments.items()}
    keras_alds.compress(model, plan=plan, calibration_data=total)


def test_few_inputs_that_become_many():
    rows = np.random.default_rng(0).normal(size=(700, 1024))
    few = []
    for part in (rows[:350], rows[350:]):
        sums = MomentAccumulator(1024)
        sums.add(part)
        few.append(sums.moment())
    assert all(isinstance(moment, FewInputs) for moment in few)
    total = joined(*few)
    assert not isinstance(total, FewInputs)
    np.testing.assert_allclose(total.blocks[0], rows.T @ rows / 700, rtol=1e-5, atol=1e-6)
    assert joined(None, few[0]) is few[0]


def test_refusals():
    model, x = network(keras), images(16)
    stats = CalibrationStats.collect(model, x, **OPTIONS)
    model.layers[0].bias.assign(np.ones(16))
    others = CalibrationStats.collect(model, x, **OPTIONS)
    with pytest.raises(ValueError, match=r"of one model with the same weights.*Received: finger"):
        stats + others
    with pytest.raises(TypeError):
        stats + 1
    with pytest.raises(ValueError, match=r"Expected `executor` to be .*Received: executor=2"):
        select(model, 0.3, executor=2)
