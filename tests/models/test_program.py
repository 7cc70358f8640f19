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


def augmentation(K):
    """A layer without an argument `training`, whose layers have `training=True` by default."""

    class Augmentation(K.layers.Layer):
        def __init__(self):
            super().__init__()
            self.flip = K.layers.RandomFlip()
            self.brightness = K.layers.RandomBrightness(0.5, value_range=(0.0, 1.0))

        def call(self, inputs):
            return self.brightness(self.flip(inputs))

    return [Augmentation()]


AUGMENTATIONS = {
    "stock": lambda K: augmentation(K)[0]._flatten_layers(include_self=False),
    "own": augmentation,
    "nested": lambda K: [K.Sequential([K.Input((12, 12, 3)), *augmentation(K)])],
}


@pytest.mark.parametrize("kind", [*AUGMENTATIONS, "subclassed"])
def test_random_augmentation_inside_a_model_is_off(keras_module, kind):
    K, L = keras_module, keras_module.layers
    layers = [
        L.Conv2D(24, 3, activation="relu"),
        *(L.GlobalAveragePooling2D(), L.Dense(32, "relu"), L.Dense(5)),
    ]
    bare = K.Sequential([K.Input((12, 12, 3)), *layers])
    if kind == "subclassed":

        class Net(K.Model):
            def __init__(self):
                super().__init__()
                self.parts = [*augmentation(K), *layers]

            def call(self, inputs):
                for part in self.parts:
                    inputs = part(inputs)
                return inputs

        model = Net()
        model(np.zeros((1, 12, 12, 3), "float32"))
    else:
        model = K.Sequential([K.Input((12, 12, 3)), *AUGMENTATIONS[kind](K), *layers])
    data = np.random.default_rng(0).random((24, 12, 12, 3), np.float32)
    plans = [keras_alds.select(m, 0.3, calibration_data=data) for m in (model, model, bare)]
    assert plans[0] == plans[1]
    assert plans[0].distance == pytest.approx(plans[2].distance, rel=1e-4)


def test_the_mode_as_a_positional_argument_of_tf_keras():
    tf_keras = pytest.importorskip("tf_keras")
    L = tf_keras.layers
    inner = tf_keras.Sequential([tf_keras.Input((16,)), L.Dropout(0.5), L.Dense(16)])
    inputs = tf_keras.Input((16,))
    x = L.Dense(32, "relu")(L.Dropout(0.5)(inner(inputs, False), False))
    model = tf_keras.Model(inputs, L.Dense(4)(x))
    data = np.random.default_rng(0).random((24, 16), np.float32)
    plans = [keras_alds.select(model, 0.3, calibration_data=data) for _ in range(2)]
    assert plans[0] == plans[1]
