"""Models as lists of steps."""

from __future__ import annotations

import collections

import numpy as np
import pytest

import keras_alds
from keras_alds.models.program import Program, Slot, _with_slots

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


def augmenting(K):
    """Layers whose `training` is True by default."""
    return [K.layers.RandomFlip(), K.layers.RandomBrightness(0.5, value_range=(0.0, 1.0))]


def own_layer(K):
    """A layer without an argument `training`, which calls such layers."""

    class Augmentation(K.layers.Layer):
        def __init__(self):
            super().__init__()
            self.parts = augmenting(K)

        def call(self, inputs):
            for part in self.parts:
                inputs = part(inputs)
            return inputs

    return Augmentation()


AUGMENTATIONS = {
    "stock": augmenting,
    "own": lambda K: [own_layer(K)],
    "nested": lambda K: [K.Sequential([K.Input((12, 12, 3)), own_layer(K)])],
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
                self.parts = [own_layer(K), *layers]

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


@pytest.fixture
def positional():
    """Models of tf_keras that are called with their mode as a positional argument."""
    tf_keras = pytest.importorskip("tf_keras")
    L = tf_keras.layers

    def make(mode):
        inner = tf_keras.Sequential([tf_keras.Input((16,)), L.Dropout(0.5), L.Dense(16)])
        inputs = tf_keras.Input((16,))
        x = L.BatchNormalization()(L.Dense(32)(inner(inputs, mode)), mode)
        return tf_keras.Model(inputs, L.Dense(4)(x))

    return make


def test_the_mode_as_a_positional_argument_of_tf_keras(positional):
    model = positional(False)
    data = np.random.default_rng(0).random((24, 16), np.float32)
    plans = [keras_alds.select(model, 0.3, calibration_data=data) for _ in range(2)]
    assert plans[0] == plans[1]
    assert [step.layer for step in Program.of(model, [], data).steps].count(model.layers[1]) == 0
    always = positional(True)  # in training mode it is no list of its layers
    assert [step.layer for step in Program.of(always, [], data).steps].count(always.layers[1]) == 1


def test_a_normalization_that_is_always_in_training_mode_is_not_folded(positional):
    model = positional(True)
    with pytest.warns(UserWarning, match="it is called with `training=True`"):
        keras_alds.expand(model, fold_batch_norm=True)
