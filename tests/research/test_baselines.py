"""The methods of the paper's comparison on models: select, compress, callback."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

import keras_alds
from keras_alds.core.slicing import divisors
from keras_alds.kinds.base import is_factorized
from keras_alds.methods import METHODS
from keras_alds.models.inventory import walk

NAMES = [name for name, method in METHODS.items() if method.near_slices]


@pytest.fixture
def model(keras_module):
    keras_module.utils.set_random_seed(0)
    model = zoo.functional(keras_module)
    model.compile(
        keras_module.optimizers.Adam(1e-3),
        keras_module.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def data_for(name):
    return zoo.images(32)[0] if METHODS[name].needs_data else None


@pytest.mark.parametrize("name", NAMES)
def test_compress(model, name):
    data = data_for(name)
    before = [weight.copy() for weight in model.get_weights()]
    for objective in ("params", "macs"):
        plan = keras_alds.select(
            model, 0.4, method=name, objective=objective, calibration_data=data
        )
        small = keras_alds.compress(model, plan=plan, calibration_data=data)
        assert plan.cr >= 0.4
        assert plan.params_after == small.count_params()
        if objective == "macs":
            assert plan.costs["macs"].after == keras_alds.count_macs(small)
        assert plan == keras_alds.CompressionPlan.from_dict(plan.to_dict())
        near = METHODS[name].near_slices
        for choice in plan.factorized:
            expected = min(divisors(choice.kernel_shape[-2]), key=lambda k: (abs(k - near), k))
            assert choice.slices == expected
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert keras_alds.select(model, 0.4, method=name, calibration_data=data) == keras_alds.select(
        model, 0.4, method=name, calibration_data=data
    )


@pytest.mark.parametrize("name", NAMES)
def test_callback(name):
    model = zoo.functional(keras)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, run_eagerly=True)
    x, y = zoo.images(32)
    callback = keras_alds.ALDSCompress(cr=0.4, at_epoch=1, method=name, verbose=0)
    params = model.count_params()
    history = model.fit(x, y, epochs=2, callbacks=[callback], verbose=0).history
    assert callback.plan.method == name
    assert 1 - model.count_params() / params >= 0.4
    assert model.count_params() == callback.plan.params_after
    assert np.isfinite(history["loss"]).all()
    assert history["alds_cr"][0] == 0
    assert history["alds_cr"][1] >= 0.4


class TestPrincipalComponents:
    def test_the_layers_outputs_are_their_projections(self, model, keras_module):
        """With and without a bias of its own; a bias that is added is counted."""
        x, _ = zoo.images(32)
        hidden = model.get_layer("hidden")
        hidden.bias.assign(np.linspace(-1, 1, 32))
        plan = keras_alds.select(
            model, 0.18, method="pca", calibration_data=x, exclude=["down", "head"]
        )
        ranks = {choice.layer: choice.rank for choice in plan.factorized}
        assert set(ranks) == {"stem", "hidden"}  # the stem has no bias of its own
        small = keras_alds.compress(model, plan=plan, calibration_data=x)
        assert small.count_params() == plan.params_after
        assert small.get_layer("stem").use_bias
        for name in ranks:
            dense, layer = model.get_layer(name), small.get_layer(name)
            inputs = keras_module.Model(model.input, dense.input)(x)
            activation = dense.activation
            dense.activation = layer.activation = keras_module.activations.linear
            y = flat(dense(inputs))
            mean = y.mean(0)
            V = np.linalg.svd(y - mean, full_matrices=False)[2][: ranks[name]]
            found = flat(layer(inputs))
            dense.activation = activation
            np.testing.assert_allclose(
                found, mean + (y - mean) @ V.T @ V, atol=2e-4 * np.abs(y).max()
            )

    def test_a_failure_puts_the_bias_back(self, model, monkeypatch):
        x, _ = zoo.images(32)
        plan = keras_alds.select(model, 0.4, method="pca", calibration_data=x)
        before = [weight.copy() for weight in model.get_weights()]
        biases = [layer.bias for _, layer in walk(model) if getattr(layer, "use_bias", False)]

        def fail(*arguments):
            raise RuntimeError("no")

        monkeypatch.setattr("keras_alds.models.in_place.carry_optimizers", fail)
        with pytest.raises(RuntimeError):
            keras_alds.apply_plan(model, plan, calibration_data=x)
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        assert not any(is_factorized(layer) for _, layer in walk(model))
        after = [layer.bias for _, layer in walk(model) if getattr(layer, "use_bias", False)]
        assert all(a is b for a, b in zip(biases, after, strict=True))

    def test_a_plan_without_the_data_has_the_same_shapes(self, model):
        x, _ = zoo.images(32)
        plan = keras_alds.select(model, 0.4, method="pca", calibration_data=x)
        with pytest.warns(UserWarning, match="with a plan that was chosen with data"):
            small = keras_alds.compress(model, plan=plan)
        other = keras_alds.compress(model, plan=plan, calibration_data=x)
        assert [w.shape for w in small.get_weights()] == [w.shape for w in other.get_weights()]

    def test_saved_statistics_keep_the_means_and_older_ones_are_refused(self, model, tmp_path):
        x, _ = zoo.images(32)
        stats = keras_alds.CalibrationStats.collect(model, x, verbose=0)
        stats.save(tmp_path / "stats.npz")
        loaded = keras_alds.CalibrationStats.load(tmp_path / "stats.npz")
        plan = keras_alds.select(model, 0.4, method="pca", calibration_data=x)
        assert keras_alds.select(model, 0.4, method="pca", calibration_data=loaded) == plan
        with np.load(tmp_path / "stats.npz") as file:
            older = {name: file[name] for name in file.files if not name.startswith("mean")}
        np.savez(tmp_path / "older.npz", **older)
        loaded = keras_alds.CalibrationStats.load(tmp_path / "older.npz")
        by_outputs = keras_alds.select(model, 0.4, calibration_data=stats)
        assert keras_alds.select(model, 0.4, calibration_data=loaded) == by_outputs
        with pytest.raises(ValueError, match=r"statistics with means.*older ones without"):
            keras_alds.select(model, 0.4, method="pca", calibration_data=loaded)

    def test_a_layer_whose_moment_is_in_blocks_is_left_alone(self, model, monkeypatch):
        monkeypatch.setattr("keras_alds.core.calibration.moments.MAX_SIDE", 100)
        x, _ = zoo.images(32)
        plan = keras_alds.select(model, 0.1, method="pca", calibration_data=x)
        (reason,) = [choice.reason for choice in plan.choices if choice.layer == "down"]
        assert "is kept in 2 blocks, and the method 'pca' needs all of it" in reason


def flat(tensor):
    array = np.asarray(tf.convert_to_tensor(tensor))
    return array.reshape(-1, array.shape[-1])


def test_methods_with_and_without_data_are_told_apart(model):
    with pytest.raises(ValueError, match=r"Expected `calibration_data` for the method 'pca'"):
        keras_alds.select(model, 0.4, method="pca")
    with pytest.raises(ValueError, match=r"uses `calibration_data`.*Received: method='svd'"):
        keras_alds.select(model, 0.4, method="svd", calibration_data=zoo.images(16)[0])
