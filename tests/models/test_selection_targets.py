"""`target=`: plans that hold to a runtime's constraints, and that say what these cost."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings

import keras
import numpy as np
import pytest
import zoo

from keras_alds import ALDSCompress, CalibrationStats, CompressionPlan, compress, select
from keras_alds.targets import TARGETS


@pytest.fixture
def keras_module():
    """Keras 3: nothing here depends on which Keras a model is of."""
    return keras


def network(K):
    """Kernels of every sort that targets tell apart."""
    L = K.layers
    inputs = K.Input((12, 12, 3))
    x = L.Conv2D(16, 3, padding="same", activation="relu", name="stem")(inputs)
    x = L.Conv2D(64, 3, padding="same", activation="relu", name="wide")(x)
    x = L.Conv2D(128, 3, strides=(2, 1), padding="same", name="uneven")(x)
    x = L.Conv2D(64, 1, activation="relu", name="point")(x)
    x = L.Reshape((6 * 12, 64), name="rows")(x)
    x = L.Conv1D(64, 3, dilation_rate=2, activation="relu", name="temporal")(x)
    x = L.GlobalAveragePooling1D(name="pool")(x)
    x = L.Dense(96, activation="relu", name="hidden")(x)
    return K.Model(inputs, L.Dense(5, name="head")(x))


@pytest.fixture(scope="module")
def model():
    import keras

    keras.utils.set_random_seed(1)
    return network(keras)


@pytest.fixture(scope="module")
def stats(model):
    images = np.random.default_rng(0).standard_normal((64, 12, 12, 3)).astype("float32")
    return CalibrationStats.collect(model, images, verbose=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["alds", "energy"])
def test_every_choice_of_a_plan_is_allowed(keras_module, target, method):
    model = network(keras_module)
    plan = select(model, 0.6, method=method, target=target)
    assert plan.target == target
    assert plan.cr >= 0.6
    assert plan.factorized
    for choice in plan.factorized:
        assert choice.scheme == 0
        assert choice.rank in TARGETS[target].ranks(
            choice.kernel_shape, choice.slices, depthwise=choice.layer != "uneven"
        )
    small = compress(model, 0.6, method=method, target=target)
    assert small.count_params() == plan.params_after


def test_by_default_forms_run_fast_on_every_cpu(model, stats):
    plan = select(model, 0.5, calibration_data=stats)
    assert plan.target == "cpu"
    named = select(model, 0.5, calibration_data=stats, target="cpu")
    assert named.choices == plan.choices
    for choice in plan.factorized:
        assert choice.slices == 1 or choice.slices == choice.kernel_shape[-2]
    for options in ({"max_slices": 99}, {"method": "alds"}, {"target": "size"}):
        free = select(model, 0.5, **{"method": "energy", **options})
        assert free.target is None
        assert max(choice.slices for choice in free.factorized) > 1


def test_statistics_that_served_another_target_give_the_same_plan(model, stats, monkeypatch):
    monkeypatch.setattr("keras_alds.core.calibration.held_out._MOST_WORK", 0.0)
    before = select(model, 0.5, calibration_data=stats, max_slices=2)
    select(model, 0.5, calibration_data=stats, target="size")
    assert select(model, 0.5, calibration_data=stats, max_slices=2) == before


def test_layers_that_no_example_reaches_leave_the_default_target_too_strict(keras_module):
    """What is out of reach only with data is taken from other forms, too."""
    L = keras_module.layers
    wide, narrow = L.Conv2D(64, 3, name="wide"), L.Conv2D(12, 3, name="narrow")

    class Net(keras_module.Model):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow, self.pool = wide, narrow, L.GlobalAveragePooling2D()
            self.deep = True

        def call(self, x):
            if self.deep:
                x = self.wide(x)[..., :32]
            return self.pool(self.narrow(x))

    net = Net()
    net(np.zeros((1, 8, 8, 32), "float32"))
    net.deep = False
    x = np.random.default_rng(0).standard_normal((32, 8, 8, 32)).astype("float32")
    with pytest.warns(UserWarning, match="are not enough to remove 5% of the parameters"):
        plan = select(net, 0.05, calibration_data=x, method="activation")
    assert [choice.layer for choice in plan.factorized] == ["narrow"]


def test_narrow_layers_are_factorized_with_a_warning():
    model = zoo.functional(keras)
    with pytest.warns(UserWarning, match=r"not enough to remove 80% of the parameters"):
        plan = select(model, 0.8)
    assert plan.cr >= 0.8
    assert plan.target is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(model, 0.8, max_slices=1) == plan


def test_limits_of_the_user_hold_too(model):
    free = select(model, 0.5, method="energy", target="litert")
    assert max(choice.slices for choice in free.factorized) > 1
    plan = select(
        model,
        0.5,
        method="energy",
        target="litert",
        max_slices=1,
        rank_multiple=3,
        exclude="hidden",
    )
    assert {choice.slices for choice in plan.factorized} == {1}
    for choice in plan.factorized:
        step = 12 if min(choice.kernel_shape[-2:]) < 64 else 24
        assert choice.rank % step == 0


@pytest.mark.parametrize("objective", ["params", "macs"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_reachable_ratio_knows_the_target(model, target, objective):
    with pytest.raises(ValueError, match=f"target='{target}'") as caught:
        select(model, 0.995, target=target, objective=objective)
    reachable = float(re.search(r"0 < cr <= (0\.\d+)", str(caught.value))[1])
    assert select(model, reachable, target=target, objective=objective).cr >= reachable
    with pytest.raises(ValueError, match="not reachable"):
        select(model, reachable + 2e-4, target=target, objective=objective)


def test_a_layer_without_an_allowed_choice_says_so(model):
    plan = select(model, 0.3, target="litert", rank_multiple=5)
    reasons = {choice.layer: choice.reason for choice in plan.choices}
    assert reasons["head"] == (
        "no allowed choice is smaller (max_slices=None, rank_multiple=5, target='litert')"
    )


def test_the_plan_says_what_the_target_costs_with_data(model, stats):
    plan = select(model, 0.6, target="litert", calibration_data=stats)
    free = select(model, 0.6, calibration_data=stats, target="size")
    total = sum(choice.error for choice in plan.choices)
    assert plan.output_error == pytest.approx(total)
    assert plan.output_error_without_target == pytest.approx(sum(c.error for c in free.choices))
    assert 0 < plan.output_error_without_target < plan.output_error
    lines: list[str] = []
    plan.summary(print_fn=lines.append)
    text = "\n".join(lines)
    assert f"outputs: {plan.output_error:.4f}, and {plan.output_error_without_target:.4f}" in text
    assert "This is no accuracy; call `model.evaluate`" in text


def test_without_data_there_is_no_such_figure(model, stats):
    plan = select(model, 0.6, target="litert")
    assert plan.output_error is plan.output_error_without_target is None
    lines: list[str] = []
    plan.summary(print_fn=lines.append)
    assert "Target: 'litert'\n" in lines[0] + "\n"
    free = select(model, 0.6, calibration_data=stats, target="size")
    assert (free.target, free.output_error, free.output_error_without_target) == (None, None, None)
    free.summary(print_fn=lines.append)
    assert "Target" not in lines[1]


def test_a_plan_keeps_its_target_in_json(model, stats, tmp_path):
    plan = select(model, 0.6, target="litert-reference", calibration_data=stats)
    plan.save(tmp_path / "plan.json")
    assert CompressionPlan.load(tmp_path / "plan.json") == plan
    # A plan of before there were targets.
    data = {
        key: value
        for key, value in json.loads((tmp_path / "plan.json").read_text()).items()
        if key not in ("target", "output_error", "output_error_without_target")
    }
    old = CompressionPlan.from_dict(data)
    assert old == dataclasses.replace(
        plan, target=None, output_error=None, output_error_without_target=None
    )


def test_bad_targets_are_refused_before_anything_else(model):
    names = "'cpu', 'litert', 'litert-reference', 'gpu-delegate', 'size'"
    for call in (
        lambda: select(model, 0.5, target="phone"),
        lambda: compress(model, 0.5, target="phone"),
        lambda: ALDSCompress(0.5, target="phone", at_epoch=0),
    ):
        with pytest.raises(ValueError, match=f"Expected `target` to be None or one of {names}"):
            call()
    plan = select(model, 0.5)
    for call in (
        lambda: compress(model, plan=plan, target="litert"),
        lambda: ALDSCompress(plan=plan, target="litert", at_epoch=0),
    ):
        with pytest.raises(ValueError, match=r"no options beside `plan`.*target='litert'"):
            call()


def test_in_training(keras_module):
    model = zoo.functional(keras_module)
    images, labels = zoo.images(32)
    loss = keras_module.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    callback = ALDSCompress(0.3, at_epoch=1, target="litert", verbose=0)
    model.fit(images, labels, epochs=2, verbose=0, callbacks=[callback])
    assert callback.plan.target == "litert"
    assert callback.plan.cr >= 0.3
    assert callback.plan.factorized
    for choice in callback.plan.factorized:
        assert choice.rank in TARGETS["litert"].ranks(choice.kernel_shape, choice.slices)
