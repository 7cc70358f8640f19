"""Plans that are tried on held-out examples, and what is refused before."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import zoo

from keras_alds import ALDSCompress, CalibrationStats, CompressionPlan, compress, select
from keras_alds.models import trials
from keras_alds.models.best import _Trials

DIGITS = np.random.default_rng(0).standard_normal((64, 8)).astype("float32")


@pytest.fixture
def net(keras_module):
    """Two layers that matter to the outputs, and one that hardly does."""
    K = keras_module
    keras.utils.set_random_seed(0)
    inputs = K.Input((8,))
    x = K.layers.Dense(24, "relu", name="first")(inputs)
    y = K.layers.Dense(24, name="branch", kernel_initializer=K.initializers.Orthogonal(0.01))(x)
    x = K.layers.Add(name="add")([x, y])
    return K.Model(inputs, K.layers.Dense(10, name="head")(x))


def test_the_plan_says_what_was_tried(net, tmp_path):
    plan = select(net, 0.4, calibration_data=DIGITS)
    assert plan.distance in plan.trials.values()
    assert trials.WITHOUT_DATA in plan.trials
    assert {name.split(", ")[0] for name in plan.trials} <= {*trials.WEIGHINGS, "no data"}
    assert plan.sequential in (True, False)
    plan.save(tmp_path / "plan.json")
    assert CompressionPlan.load(tmp_path / "plan.json") == plan
    lines: list[str] = []
    plan.summary(print_fn=lines.append)
    assert "Output |" in lines[0]
    assert f"{plan.distance:.4f}" in lines[0]


def test_a_layer_that_hardly_matters_is_cut_more(net):
    stats = CalibrationStats.collect(net, DIGITS, verbose=0)
    curves = stats.curves
    effects = {path: float(curve(np.array(0.1))) for path, curve in curves.items()}
    assert effects["branch"] < 0.1 * min(effects["first"], effects["head"])
    plan = select(net, 0.3, calibration_data=stats)
    errors = {choice.layer: choice.error for choice in plan.choices}
    assert errors["branch"] > max(errors["first"], errors["head"])
    found = {choice.layer: choice.divergence for choice in plan.factorized}
    assert found["branch"] == pytest.approx(float(curves["branch"](np.array(errors["branch"]))))


def test_sequential_restricts_what_is_tried(net):
    small = compress(net, 0.4, calibration_data=DIGITS, sequential=True)
    assert small.count_params() < net.count_params()
    plan = select(net, 0.4, calibration_data=DIGITS)
    for name in plan.trials:
        assert name.count(", sequential") <= 1


def test_no_trial_without_data_where_the_user_names_the_method(net):
    plan = select(net, 0.4, calibration_data=DIGITS, method="activation")
    assert trials.WITHOUT_DATA not in plan.trials
    assert plan.method == "activation"


class FakeProber:
    """Has distances in place of a model's outputs."""

    def __init__(self, distances):
        self._distances = iter(distances)

    reference = property(lambda self: self)

    def outputs(self, kernels):
        return next(self._distances)

    def distance(self, outputs):
        return outputs

    discrepancy = distance


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ({"outputs": 0.3, "equal": 0.2}, "equal"),
        ({"outputs": 0.2, "equal": 0.3}, "outputs"),
        ({"outputs": 0.2, "equal": 0.21}, "equal"),
        ({"outputs": 0.2, "outputs, sequential": 0.21}, "outputs, sequential"),
        ({"outputs, sequential": 0.18, "equal, sequential": 0.2}, "equal, sequential"),
        ({"outputs": 0.2, "outputs, sequential": 0.3}, "outputs"),
        ({"outputs": 0.2, "outputs, normalized": 0.205}, "outputs, normalized"),
        ({"outputs": 0.2, "outputs, normalized": 0.22}, "outputs"),
        ({"outputs": 0.2, "no data": 0.1}, "no data"),
        ({"outputs": 0.0, "outputs^0.5": 0.0}, "outputs"),
        ({"outputs": np.inf, "equal": 0.5}, "equal"),
        ({"outputs": np.inf, "outputs^0.5": np.inf}, "outputs"),
    ],
)
def test_the_nearest_plan_is_taken(net, distances, expected):
    plan = select(net, 0.4, method="energy")
    found = _Trials(FakeProber(distances.values()))
    for name in distances:
        found.note(name, dataclasses.replace(plan, runtime=name), {})
    best = found.best()
    assert (best.runtime, best.distance) == (expected, distances[expected])
    assert best.trials == distances


@pytest.mark.parametrize("sources", ["same", "black", "few"])
def test_examples_have_to_differ(small, sources):
    x, _ = zoo.images(32)
    data = {"same": np.repeat(x[:1], 32, 0), "black": 0 * x, "few": np.repeat(x[:4], 8, 0)}[sources]
    count = {"same": 1, "black": 1, "few": 4}[sources]
    with pytest.raises(ValueError, match=rf"8 different examples .* Received: {count} among 32"):
        compress(small, 0.4, calibration_data=data)


def test_examples_that_are_alike_are_refused_before_the_first_step(small, keras_module):
    x, _ = zoo.images(32)
    small.compile("sgd", "mse")
    steps = []
    spy = keras_module.callbacks.LambdaCallback(on_train_batch_end=lambda *_: steps.append(1))
    callback = ALDSCompress(0.4, at_epoch=1, calibration_data=np.zeros_like(x))
    with pytest.raises(ValueError, match="8 different examples"):
        small.fit(x, np.zeros((32, 10)), epochs=2, verbose=0, callbacks=[spy, callback])
    assert not steps


def test_embeddings_are_probed(keras_module):
    K = keras_module
    model = K.Sequential(
        [
            K.Input((6,), dtype="int32"),
            K.layers.Embedding(50, 16, name="words"),
            K.layers.GlobalAveragePooling1D(),
            K.layers.Dense(12, name="head"),
        ]
    )
    tokens = np.random.default_rng(0).integers(0, 50, (40, 6))
    stats = CalibrationStats.collect(model, tokens, verbose=0)
    assert set(stats.curves) == {"words", "head"}
    assert stats.curves["words"].divergences[-1] > 0
