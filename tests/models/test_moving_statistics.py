"""Moving statistics that follow a change of the network."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from keras_alds import apply_plan, compress, select
from keras_alds._backend.calls import replaced_calls
from keras_alds.models.moving_statistics import Drift

RNG = np.random.default_rng(0)
X = RNG.standard_normal((96, 10)).astype("float32")


@pytest.fixture
def net(keras_module):
    """Two normalized layers; the moving statistics are those of other examples."""
    K = keras_module
    K.utils.set_random_seed(0)
    model = K.Sequential(
        [
            K.Input((10,)),
            K.layers.Dense(16, name="first"),
            K.layers.BatchNormalization(name="norm0"),
            K.layers.ReLU(),
            K.layers.Dense(12, name="second"),
            K.layers.BatchNormalization(name="norm1", scale=False),
            K.layers.Dense(10, name="head"),
        ]
    )
    for name, mean, variance in (("norm0", 0.3, 0.8), ("norm1", -0.2, 1.5)):
        norm = model.get_layer(name)
        norm.moving_mean.assign(np.full(norm.moving_mean.shape, mean))
        norm.moving_variance.assign(np.full(norm.moving_variance.shape, variance))
    return model


def drifted(model, change):
    """The drift that a change of the model makes, seen on `X` in two batches."""
    drift = Drift(model)
    for replacements in (drift.original, drift.changed):
        with replaced_calls(replacements()):
            for part in np.split(X, 2):
                model(part, training=False)
        if replacements == drift.original:
            change()
    return drift


def set_statistics(drift):
    for layer, (mean, variance) in drift.statistics().items():
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(variance)


def test_a_network_that_does_not_change_keeps_its_statistics(net):
    for layer, (mean, variance) in drifted(net, lambda: None).statistics().items():
        np.testing.assert_allclose(mean, layer.moving_mean, atol=1e-5)
        np.testing.assert_allclose(variance, layer.moving_variance, rtol=1e-5)


def test_scaled_and_moved_channels_are_corrected_exactly(net):
    """What is in front of a normalization is undone, whatever the moving statistics were."""
    for layer in net.layers:
        if hasattr(layer, "epsilon"):
            layer.epsilon = 1e-9
    wanted = net(X).numpy()
    first, second = net.get_layer("first"), net.get_layer("second")

    def change():
        for layer, factor in ((first, 1.7), (second, 0.6)):
            layer.kernel.assign(factor * layer.kernel)
            layer.bias.assign(factor * layer.bias + 0.4)

    drift = drifted(net, change)
    assert np.abs(net(X).numpy() - wanted).max() > 0.1
    with replaced_calls(drift.corrected()):
        np.testing.assert_allclose(net(X).numpy(), wanted, atol=1e-4)
    set_statistics(drift)
    np.testing.assert_allclose(net(X).numpy(), wanted, atol=1e-4)


def test_a_normalized_plan_corrects_the_copy_and_a_failure_undoes_it(net, monkeypatch):
    plan = select(net, 0.4, calibration_data=X)
    names = [name for name in plan.trials if name.endswith(", normalized")]
    assert len(names) == 1
    assert plan.normalized == (plan.trials[names[0]] == plan.distance)
    norms = [net.get_layer(name) for name in ("norm0", "norm1")]
    before = [np.array(norm.moving_variance) for norm in norms]
    results = []
    for normalized in (False, True):
        some = dataclasses.replace(plan, normalized=normalized)
        small = compress(net, plan=some, calibration_data=X)
        results.append([np.array(small.get_layer(n.name).moving_variance) for n in norms])
    for kept, corrected, old in zip(*results, before, strict=True):
        np.testing.assert_array_equal(kept, old)
        assert np.abs(corrected / old - 1).max() > 0.01

    class Failing:
        def items(self):
            yield norms[0], (np.full(16, 3.0), np.full(16, 3.0))
            raise RuntimeError("too late")

    monkeypatch.setattr(Drift, "statistics", lambda self: Failing())
    outputs = net(X).numpy()
    with pytest.raises(RuntimeError, match="too late"):
        apply_plan(net, dataclasses.replace(plan, normalized=True), calibration_data=X)
    np.testing.assert_array_equal(net(X).numpy(), outputs)
    np.testing.assert_array_equal(norms[0].moving_variance, before[0])
