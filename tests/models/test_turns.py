"""Threads that compress or use models at the same time, and passes that are interrupted."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from keras_alds import CalibrationStats, apply_plan, compress, select
from keras_alds.core.calibration.accumulators import MomentAccumulator
from keras_alds.models.inventory import walk
from keras_alds.models.observe import Observer
from keras_alds.models.turns import alone

X = np.random.default_rng(0).standard_normal((64, 8, 8, 3)).astype("float32")


def image_model(K, name="image"):
    L = K.layers
    return K.Sequential(
        [K.Input((8, 8, 3)), L.Conv2D(12, 3, name="a"), L.Conv2D(12, 3), L.Flatten(), L.Dense(8)],
        name=name,
    )


def text_model(K):
    L = K.layers
    return K.Sequential([K.Input((6, 8)), L.LSTM(12), L.Dense(8)])


def in_threads(*functions):
    """Runs functions at once; raises what one of them raises."""
    results, errors = {}, []

    def run(n, function):
        try:
            results[n] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[n] for n in range(len(functions))]


def assert_same(models, others):
    for model, other in zip(models, others, strict=True):
        for ours, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def state_of(model):
    return {path: dict(vars(layer)) for path, layer in walk(model)}


class TestThreads:
    @pytest.mark.parametrize("sequential", [True, False])
    def test_compress_the_same_model(self, keras_module, sequential):
        model = image_model(keras_module)
        crs = (0.3, 0.4, 0.5)
        right = [compress(model, cr, calibration_data=X, sequential=sequential) for cr in crs]
        found = in_threads(
            *(
                lambda cr=cr: compress(model, cr, calibration_data=X, sequential=sequential)
                for cr in crs
            )
        )
        assert_same(found, right)
        assert all("call" not in vars(layer) for _, layer in walk(model))

    def test_compress_models_that_share_layers(self, keras_module):
        model = image_model(keras_module)
        head = keras_module.layers.Dense(6)(model.layers[-2].output)
        other = keras_module.Model(model.inputs, head)
        data = X[::-1].copy()
        right = [
            compress(model, 0.4, calibration_data=X),
            compress(other, 0.4, calibration_data=data),
        ]
        found = in_threads(
            lambda: compress(model, 0.4, calibration_data=X),
            lambda: compress(other, 0.4, calibration_data=data),
        )
        assert_same(found, right)

    def test_change_one_model_in_turns(self, keras_module):
        model = image_model(keras_module)
        plan = select(model, 0.4)
        params = compress(model, plan=plan).count_params()

        def change():
            apply_plan(model, plan, calibration_data=X)

        with pytest.warns(UserWarning, match="already compressed"):  # as the second thread finds
            in_threads(change, change)
        assert model.count_params() == params

    @pytest.mark.parametrize("make", [image_model, text_model])
    def test_use_a_model_that_is_calibrated(self, keras_module, make, monkeypatch):
        model = make(keras_module)
        data = np.random.default_rng(1).standard_normal((64, *model.input_shape[1:]))
        data = data.astype("float32")
        other = 100 * data[:16]
        expected = [np.asarray(model(other)), model.predict(other, verbose=0)]
        right = compress(model, 0.3, calibration_data=data)
        found, busy, add = [], [], Observer._add

        def use():
            model.predict_function = None  # traced again
            found.append([np.asarray(model(other)), model.predict(other, verbose=0)])

        def adding(self, layer, inputs):
            if not busy:
                busy.append(True)
                in_threads(use)
                busy.clear()
            add(self, layer, inputs)

        monkeypatch.setattr(Observer, "_add", adding)
        small = compress(model, 0.3, calibration_data=data)
        assert_same([small], [right])
        assert found
        for pair in found:
            np.testing.assert_array_equal(pair[0], expected[0])
            np.testing.assert_allclose(pair[1], expected[1], rtol=1e-5, atol=1e-5)


def test_several_models_are_taken_at_once(keras_module):
    """Who waits for one of them holds none of the others."""
    first, second = image_model(keras_module), image_model(keras_module)
    waiting, free, done = (threading.Event() for _ in range(3))

    def both():
        waiting.set()
        with alone(second, first):
            done.set()

    def one():
        with alone(second):
            free.set()

    with alone(first):
        threads = [threading.Thread(target=both), threading.Thread(target=one)]
        threads[0].start()
        waiting.wait(20)
        time.sleep(0.1)
        threads[1].start()
        assert free.wait(20)
    assert done.wait(20)


def test_data_that_run_the_model_are_not_observed(keras_module):
    model = image_model(keras_module)

    def batches():
        for start in range(0, len(X), 16):
            model(100 * X[:16])
            model.predict(100 * X[:16], verbose=0)
            yield X[start : start + 16]

    found = CalibrationStats.collect(model, batches(), verbose=0)
    right = CalibrationStats.collect(model, X, verbose=0)
    for path, moment in right.moments.items():
        assert found.moments[path].count == moment.count, path


class Stopped:
    """An array-like source of batches that raises an error at the n-th one."""

    def __init__(self, error, batch):
        self.error, self.batch = error, batch

    def __iter__(self):
        for n in range(4):
            if n == self.batch:
                raise self.error
            yield X[16 * n : 16 * n + 16]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError("the user's")])
@pytest.mark.parametrize("where", ["data", "sums"])
@pytest.mark.parametrize("sequential", [True, False])
def test_an_interrupted_pass_leaves_everything_as_it_was(
    keras_module, error, where, sequential, monkeypatch
):
    model = image_model(keras_module)
    right = compress(model, 0.4, calibration_data=X, sequential=sequential)
    before, outputs = state_of(model), model.predict(X, verbose=0)
    kind = type(error) if isinstance(error, Exception) else error
    with monkeypatch.context() as patch:
        if where == "sums":

            def fail(*_):
                raise error

            patch.setattr(MomentAccumulator, "_part_sum", fail)
            patch.setattr(MomentAccumulator, "_add_chunk", fail)
        with pytest.raises(kind):
            compress(
                model,
                0.4,
                calibration_data=Stopped(error, 2) if where == "data" else X,
                sequential=sequential,
            )
    after = state_of(model)
    for path, attributes in before.items():
        changed = {k for k, v in after[path].items() if attributes.get(k, v) is not v}
        assert after[path].keys() == attributes.keys()
        assert not changed & {"call", "kernel", "return_sequences"}
    np.testing.assert_array_equal(model.predict(X, verbose=0), outputs)
    assert_same([compress(model, 0.4, calibration_data=X, sequential=sequential)], [right])
