"""Nets with wide layers and large images: bounded memory changes no result."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_alds
from keras_alds.core.calibration.moments import FewInputs
from keras_alds.models import choices
from keras_alds.models.calibration import CalibrationStats
from keras_alds.models.data import Examples


@pytest.fixture
def model():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(24, activation="relu"), keras.layers.Dense(8)]
    return keras.Sequential([keras.Input((1024,)), *layers])


@pytest.fixture
def x():
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((40, 1024)) @ rng.standard_normal((1024, 1024)) / 32
    return mixed.astype("float32")


def test_few_inputs_are_kept_and_saved(model, x, tmp_path):
    stats = CalibrationStats.collect(model, x, verbose=0)
    few, usual = stats.moments.values()
    assert isinstance(few, FewInputs)
    assert not isinstance(usual, FewInputs)
    np.testing.assert_array_equal(few.rows, x)
    stats.save(tmp_path / "stats.npz")
    assert (tmp_path / "stats.npz").stat().st_size < 2 * x.nbytes
    loaded = CalibrationStats.load(tmp_path / "stats.npz")
    plans = [keras_alds.select(model, 0.5, calibration_data=s) for s in (stats, loaded)]
    assert plans[0] == plans[1]


def test_a_layer_that_few_inputs_were_seen_of_keeps_its_outputs(model, x):
    """What 40 inputs show still counts most."""
    small = keras_alds.compress(model, 0.3, calibration_data=x)
    expected = model.predict(x, verbose=0)
    lost = np.square(small.predict(x, verbose=0) - expected).sum() / np.square(expected).sum()
    assert lost < 0.05


def test_kernels_that_are_decomposed_in_turn_give_the_same_plan(model, x, monkeypatch):
    plan = keras_alds.select(model, 0.5, calibration_data=x)
    monkeypatch.setattr(choices, "KERNELS_AT_ONCE", 0)
    assert keras_alds.select(model, 0.5, calibration_data=x) == plan


def test_large_images_go_in_small_batches():
    net = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(2, 1)])
    sizes = {32: 32, 256: 8, 512: 2}
    for side, count in sizes.items():
        images = np.zeros((max(count + 1, 9), side, side, 3), "float32")
        found = [n for _, n in Examples(net, images, None)]
        assert found == [count] * (len(images) // count) + [1]
