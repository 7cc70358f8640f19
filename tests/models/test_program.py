"""Models as lists of steps."""

from __future__ import annotations

import collections

import numpy as np
import pytest

import keras_alds
from keras_alds.models.program import Slot, _with_slots

Pair = collections.namedtuple("Pair", "first second")
A, B, OTHER = object(), object(), object()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (A, Slot(1)),
        (OTHER, OTHER),
        (None, None),
        ((A, [B, OTHER]), (Slot(1), [Slot(2), OTHER])),
        ({"b": B, "a": [A, {}]}, {"b": Slot(2), "a": [Slot(1), {}]}),
        (Pair(A, (B, None)), Pair(Slot(1), (Slot(2), None))),
        (collections.OrderedDict(b=A, a=OTHER), collections.OrderedDict(b=Slot(1), a=OTHER)),
    ],
    ids=["tensor", "other", "none", "plain", "dict", "namedtuple", "ordered"],
)
def test_known_tensors_become_slots(given, expected):
    found = _with_slots(given, {id(A): 1, id(B): 2})
    assert found == expected
    assert type(found) is type(expected)


def test_random_augmentation_inside_a_model_is_off(keras_module):
    """Its layers have `training=True` by default, and Keras 3 keeps that in the graph."""
    L = keras_module.layers
    inputs = keras_module.Input((12, 12, 3))
    x = L.RandomBrightness(0.5, value_range=(0.0, 1.0))(L.RandomFlip()(inputs))
    x = L.GlobalAveragePooling2D()(L.Conv2D(24, 3, activation="relu")(x))
    model = keras_module.Model(inputs, L.Dense(5)(L.Dense(32, "relu")(x)))
    data = np.random.default_rng(0).random((24, 12, 12, 3), np.float32)
    augmented = keras_alds.CalibrationStats.collect(model, data, verbose=0)
    bare = keras_module.Sequential([keras_module.Input((12, 12, 3)), *model.layers[-4:]])
    plain = keras_alds.CalibrationStats.collect(bare, data, verbose=0)
    pairs = zip(augmented.moments.values(), plain.moments.values(), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5, atol=1e-7)
    plans = [keras_alds.select(model, 0.3, calibration_data=data) for _ in range(2)]
    assert plans[0] == plans[1]
    expected = keras_alds.select(bare, 0.3, calibration_data=data).distance
    assert plans[0].distance == pytest.approx(expected, rel=1e-4)
