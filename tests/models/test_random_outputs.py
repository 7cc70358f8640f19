"""Models that are random in inference: the same noise in what is compared, else no comparison."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_alds
from keras_alds._backend import backend_of
from keras_alds._backend.loops import passing, same_noise
from keras_alds.models.outputs import OutputKind, Reference, differing

rng = np.random.default_rng(0)
X = (0.3 * rng.standard_normal((256, 16)) @ rng.standard_normal((16, 16))).astype("float32")


def with_dropout(K):
    """Monte-Carlo dropout: the layers drop inputs in inference, too."""
    K.utils.set_random_seed(0)
    inputs = hidden = K.Input((16,))
    for name in ("first", "second"):
        hidden = K.layers.Dense(128, activation="relu", name=name)(hidden)
        hidden = K.layers.Dropout(0.3)(hidden, training=True)
    return K.Model(inputs, K.layers.Dense(3, name="last")(hidden))


def sampling(K, draw, outputs=("mean", "sample")):
    """The encoder of a variational autoencoder, which draws numbers in its own way."""

    class Sampling(K.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            if K is keras:
                self.generator = K.random.SeedGenerator(3)

        def call(self, mean):
            return mean + draw(self, tf.shape(mean))

    K.utils.set_random_seed(0)
    inputs = K.Input((16,))
    hidden = K.layers.Dense(128, activation="relu", name="first")(inputs)
    hidden = K.layers.Dense(128, activation="relu", name="second")(hidden)
    found = {"mean": K.layers.Dense(3, name="last")(hidden)}
    found["sample"] = Sampling()(found["mean"])
    return K.Model(inputs, [found[name] for name in outputs])


def by_generator(layer, shape):
    return keras.random.normal(shape, seed=layer.generator)


def by_tensorflow(layer, shape):
    return tf.random.normal(shape)


def outputs_of(model):
    with same_noise(model):
        return np.asarray(model(X, training=False))


def copy_of(K, model):
    copy = K.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


class TestSameNoise:
    def test_in_every_pass_and_in_copies(self, keras_module):
        model = with_dropout(keras_module)
        assert np.array_equal(outputs_of(model), outputs_of(model))
        assert np.array_equal(outputs_of(model), outputs_of(copy_of(keras_module, model)))

    def test_other_layers_draw_other_numbers(self, keras_module):
        K = keras_module
        inputs = K.Input((16,))
        model = K.Model(inputs, [K.layers.Dropout(0.5)(inputs, training=True) for _ in range(2)])
        with same_noise(model):
            one, other = model(np.ones((8, 16), "float32"))
        assert not np.array_equal(one, other)

    def test_every_call_draws_other_numbers(self, keras_module):
        model = with_dropout(keras_module)
        with same_noise(model):
            assert not np.array_equal(model(X), model(X))

    def test_it_is_random_again_afterwards(self, keras_module):
        model = with_dropout(keras_module)
        before = [seed.numpy() for seed in backend_of(model).seeds(model)]
        with passing(model):
            model(X)
        assert all(
            map(np.array_equal, before, [seed.numpy() for seed in backend_of(model).seeds(model)])
        )
        assert not np.array_equal(model(X), model(X))

    def test_graphs_that_are_traced_meanwhile_stay_random(self, keras_module):
        model = with_dropout(keras_module)
        call = tf.function(model)
        with passing(model):
            call(X)
        assert not np.array_equal(call(X), call(X))

    def test_attributes_of_the_same_name_are_left_alone(self, keras_module):
        class Own(keras_module.layers.Layer):
            def __init__(self):
                super().__init__()
                self._random_generator = np.random.default_rng(0)

            def call(self, x):
                return x

        model = keras_module.Sequential([keras_module.Input((16,)), Own()])
        with same_noise(model):
            assert np.array_equal(model(X), X)


class TestSelect:
    def test_plans_repeat_and_are_judged_without_noise(self, keras_module):
        model = with_dropout(keras_module)
        plans = [keras_alds.select(model, 0.1, calibration_data=X, verbose=0) for _ in range(2)]
        assert plans[0] == plans[1]
        noise = [np.asarray(model(X)) for _ in range(2)]
        assert plans[0].distance < 0.2 * np.square(noise[0] - noise[1]).mean() / noise[0].var()

    def test_samples_of_a_seed_generator(self):
        model = sampling(keras, by_generator)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan = keras_alds.select(model, 0.1, calibration_data=X, verbose=0)
        assert plan.distance < 0.1

    def test_other_random_outputs_do_not_count(self, keras_module):
        plans = [
            keras_alds.select(
                sampling(keras_module, by_tensorflow, outputs), 0.5, calibration_data=X, verbose=0
            )
            for outputs in (("mean", "sample"), ("mean",))
        ]
        assert plans[0].choices == plans[1].choices
        assert plans[0].distance == pytest.approx(plans[1].distance, rel=1e-3)

    def test_where_all_outputs_are_random(self, keras_module):
        model = sampling(keras_module, by_tensorflow, ("sample",))
        with pytest.warns(UserWarning, match="differ each time for the same examples"):
            plan = keras_alds.select(model, 0.5, calibration_data=X, verbose=0)
        assert plan.distance is None
        assert plan.cr >= 0.5
        assert all(choice.divergence is None for choice in plan.choices)

    def test_nothing_is_chosen_by_chance(self, keras_module):
        model = sampling(keras_module, by_tensorflow, ("sample",))
        plan = keras_alds.select(model, 0.5, calibration_data=X, verbose=0)
        small = [
            keras_alds.compress(model, plan=plan, calibration_data=X, verbose=0) for _ in range(3)
        ]
        for other in small[1:]:
            pairs = zip(small[0].get_weights(), other.get_weights(), strict=True)
            assert all(np.array_equal(one, two) for one, two in pairs)
        refinement = keras_alds.refine(small[0], model, X, steps=20, verbose=0)
        assert refinement.steps == 0
        assert "differ each time" in str(refinement)
        with pytest.warns(UserWarning, match="refinement was undone: the original's outputs"):
            keras_alds.compress(model, plan=plan, calibration_data=X, refine=True, verbose=0)


def test_refinement_compares_with_the_same_noise(keras_module):
    model = with_dropout(keras_module)
    small = keras_alds.compress(model, 0.8, calibration_data=X, verbose=0)
    refinement = keras_alds.refine(small, model, X, steps=40, verbose=0)
    assert refinement.after < refinement.before < 0.5


class TestReference:
    def test_random_outputs_do_not_count(self):
        outputs = [rng.standard_normal((40, 4)), rng.standard_normal((40, 4))]
        reference = Reference(None, outputs, [False, True])
        assert reference.kinds == (OutputKind.VALUES, OutputKind.RANDOM)
        other = [outputs[0], outputs[1] + 1]
        for measure in ("divergence", "distance", "error", "discrepancy"):
            assert getattr(reference, measure)(other) == 0

    def test_all_count_where_all_are_random(self):
        outputs = [rng.standard_normal((40, 4))]
        reference = Reference(None, outputs, [True])
        assert reference.is_random
        assert reference.divergence([outputs[0] + 1]) > 0.5

    def test_which_outputs_differ(self):
        values, labels = rng.standard_normal((40, 4)).astype("float32"), np.arange(40)
        rounded = values * (1 + 1e-5)
        assert differing([values, labels], [rounded, labels]) == [False, False]
        assert differing([values, labels], [values + 0.1, labels[::-1]]) == [True, True]
        assert differing([values], [values[:20]]) == [True]
        values[:, 0] = -np.inf
        assert differing([values], [values.copy()]) == [False]
