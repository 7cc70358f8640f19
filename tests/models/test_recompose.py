"""Factorized layers that become dense again in place."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

from keras_alds import apply_plan, compress, recompose, select
from keras_alds._backend import backend_of
from keras_alds.kinds.base import is_factorized
from keras_alds.layers import FactorizedConv2DTranspose, FactorizedDense
from keras_alds.models.in_place import surgery
from keras_alds.models.inventory import Inventory, count_params, walk
from keras_alds.models.optimizer import Factors, carried, gathered
from keras_alds.models.recompose import recomposed


def value(tensor):
    return np.asarray(tf.convert_to_tensor(tensor))


def convolutions(K):
    L = K.layers
    return K.Sequential(
        [
            K.Input((8, 8, 6)),
            L.Conv2D(16, 3, padding="same", activation="relu", kernel_regularizer="l2"),
            L.SeparableConv2D(24, 3, depth_multiplier=2),
            L.Conv2DTranspose(16, 3, strides=2, use_bias=False),
            L.TimeDistributed(L.Dense(20)),
        ]
    )


def recurrent(K):
    L = K.layers
    return K.Sequential(
        [
            K.Input((3,)),
            L.Embedding(50, 16, mask_zero=True),
            L.Bidirectional(L.GRU(16, return_sequences=True)),
            L.RNN(L.SimpleRNNCell(20)),
        ]
    )


def attention(K):
    L = K.layers
    inputs = K.Input((6, 16))
    x = L.MultiHeadAttention(4, 8)(inputs, inputs)
    return K.Model(inputs, L.EinsumDense("abc,cd->abd", (None, 24), bias_axes="d")(x))


def classes(model):
    return [type(layer) for _, layer in walk(model)]


class TestRecompose:
    def test_a_typo_in_exclude_is_told(self, keras_module):
        model = compress(zoo.functional(keras_module), 0.4)
        with pytest.warns(UserWarning, match="'haed' matches no layer"):
            dense = recompose(model, exclude="haed")
        assert not any(is_factorized(layer) for _, layer in walk(dense))

    def test_a_copy_that_is_trained_and_saved(self, keras_module, tmp_path):
        K = keras_module
        for make in (zoo.functional, zoo.subclassed):
            model = make(K)
            model.compile(K.optimizers.Adam(1e-3), "mse")
            small = compress(model, 0.4)
            weights, x = small.get_weights(), zoo.examples(model)
            dense = recompose(small)
            assert type(dense) is type(model)
            assert dense.count_params() == model.count_params()
            expected = zoo.outputs(small, x)
            np.testing.assert_allclose(zoo.outputs(dense, x), expected, rtol=0, atol=1e-5)
            dense.fit(x, np.zeros((len(x), 10)), epochs=1, verbose=0)
            for a, b in zip(weights, small.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)
            assert compress(dense, 0.6).count_params() <= 0.4 * model.count_params()
        with pytest.warns(UserWarning, match="no factorized layer to recompose"):
            assert recompose(model).count_params() == model.count_params()

    def test_layers_that_are_factorized_by_design(self):
        layers = keras.layers
        model = keras.Sequential(
            [keras.Input((32,)), FactorizedDense(32, 1, 4), layers.Dense(24), layers.Dense(24)]
        )
        x = zoo.examples(model)
        small = compress(model, 0.2, exclude=[FactorizedDense])
        for exclude, kept in (((), 0), (small.layers[0].name, 1)):
            dense = recompose(small, exclude=exclude)
            assert len(Inventory.of(dense).factorized) == kept
            found, expected = zoo.outputs(dense, x), zoo.outputs(small, x)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


class TestLayers:
    @pytest.mark.parametrize("make", [convolutions, recurrent, attention])
    def test_are_dense_inside_and_as_before_afterwards(self, keras_module, make):
        model = make(keras_module)
        x = np.random.default_rng(0).integers(1, 50, (4, 3))
        x = x if make is recurrent else zoo.examples(model)
        small = compress(model, 0.6, method="alds")
        dense = recompose(small)
        assert classes(dense) == classes(model)
        assert [w.shape for w in dense.weights] == [w.shape for w in model.weights]
        np.testing.assert_allclose(zoo.outputs(dense, x), zoo.outputs(small, x), rtol=0, atol=1e-5)
        expected, before, objects = zoo.outputs(small, x), classes(small), dict(walk(small))
        inventory = Inventory.of(small)
        assert len(inventory.factorized) >= 3
        with recomposed(inventory, inventory.factorized):
            assert classes(small) == classes(model)
            assert count_params(small) == count_params(model)
            np.testing.assert_allclose(zoo.outputs(small, x), expected, rtol=0, atol=1e-5)
            model.set_weights(small.get_weights())  # in the order of a model that was never small
        np.testing.assert_allclose(zoo.outputs(model, x), expected, rtol=0, atol=1e-5)
        assert classes(small) == before
        assert dict(walk(small)) == objects
        np.testing.assert_array_equal(zoo.outputs(small, x), expected)

    def test_stay_dense_in_files(self, keras_module, tmp_path):
        K, L = keras_module, keras_module.layers
        inputs = K.Input((3, 16))
        x = L.MultiHeadAttention(2, 8)(inputs, inputs)
        small = compress(K.Model(inputs, L.LSTM(24)(x)), 0.6, method="alds")
        small.save(tmp_path / "small.keras")
        loaded = K.models.load_model(tmp_path / "small.keras")  # it never held stock layers
        inventory = Inventory.of(loaded)
        assert len(inventory.factorized) >= 3
        with recomposed(inventory, inventory.factorized, keep=True):
            pass
        loaded.save(tmp_path / "dense.keras")
        dense = K.models.load_model(tmp_path / "dense.keras")
        assert not Inventory.of(dense).factorized
        x = zoo.examples(small)
        np.testing.assert_allclose(zoo.outputs(dense, x), zoo.outputs(small, x), rtol=0, atol=1e-5)

    def test_a_failure_inside_brings_the_factors_back(self, small):
        compressed = compress(small, 0.4)
        before, weights = classes(compressed), compressed.get_weights()
        inventory = Inventory.of(compressed)

        def fail():
            with recomposed(inventory, inventory.factorized, keep=True):
                assert classes(compressed) != before
                raise MemoryError

        with pytest.raises(MemoryError):
            fail()
        assert classes(compressed) == before
        for a, b in zip(weights, compressed.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_graphs_of_the_dense_layers_do_not_stay(self, small):
        model = compress(small, 0.4)
        x = zoo.examples(model)
        inventory = Inventory.of(model)
        with recomposed(inventory, inventory.factorized):
            model.predict(x, verbose=0)  # as a generator of calibration data may do
        for _, layer in walk(model):
            if hasattr(layer, "decoder"):
                layer.decoder.assign(2 * value(layer.decoder))
        found = model.predict(x, verbose=0)
        np.testing.assert_allclose(found, value(model(x, training=False)), rtol=1e-4, atol=1e-5)

    def test_a_step_of_the_undo_that_fails_stops_no_other(self, small):
        model = compress(small, 0.4)
        before = classes(model)

        backend, layer = backend_of(model), model.get_layer("down")
        dense = backend.keras.layers.Conv2D(24, 3, strides=2, padding="same")
        dense.build((None, 12, 12, 16))

        def fail():
            raise KeyboardInterrupt

        def operate():
            with surgery(Inventory.of(model)) as operation:
                operation.undo += [backend.transplant(layer, dense), fail]
                raise ValueError

        with pytest.raises(KeyboardInterrupt):
            operate()
        assert classes(model) == before

    def test_pruned_layers_are_refused(self):
        K = pytest.importorskip("tf_keras")
        prune = pytest.importorskip("tensorflow_model_optimization").sparsity.keras
        model = prune.prune_low_magnitude(compress(zoo.sequential(K), 0.3))
        with pytest.raises(ValueError, match=r"Expected no pruning of factorized layers.*'hidden'"):
            compress(model, 0.8)


def layer_of_factors(kind):
    rng = np.random.default_rng(0)
    if kind == "dense":
        layer = FactorizedDense(6, slices=2, rank=2)
        layer.build((None, 8))
    else:
        layer = FactorizedConv2DTranspose(6, 3, slices=2, rank=2)
        layer.build((None, 5, 5, 8))
    for factor in (layer.encoder, layer.decoder):
        factor.assign(rng.standard_normal(factor.shape))
    return layer, rng


@pytest.mark.parametrize("kind", ["dense", "transposed"])
class TestState:
    def test_the_product_is_the_kernel(self, kind):
        layer, _ = layer_of_factors(kind)
        factors = Factors.of(backend_of(layer), layer)
        np.testing.assert_allclose(factors.product, value(layer.kernel), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("meaning", ["linear", "squared", "average"])
    def test_goes_there_and_back(self, kind, meaning):
        layer, rng = layer_of_factors(kind)
        backend = backend_of(layer)
        gradient = rng.standard_normal(layer.kernel_shape)
        if meaning == "squared":  # of rank one, in every slice
            factors = Factors.of(backend, layer)
            E, D = factors.matrices(factors.encoder, factors.decoder)
            rows, columns = rng.uniform(0.1, 2, (2, E.shape[1], 1)), rng.uniform(0.1, 2, (2, 1, 1))
            gradient = factors.kernel(rows * columns * rng.uniform(0.1, 2, (1, 1, D.shape[2])))
        states = carried(backend, meaning, gradient, layer)
        dense = gathered(meaning, states, Factors.of(backend, layer))
        assert dense.shape == tuple(layer.kernel_shape)
        if meaning == "squared":
            np.testing.assert_allclose(dense, gradient, rtol=1e-6)
        for there, back in zip(states, carried(backend, meaning, dense, layer), strict=True):
            np.testing.assert_allclose(there, back, rtol=1e-4, atol=1e-6)


class TestOptimizers:
    @pytest.mark.parametrize("name", ["Adam", "SGD"])
    def test_follow(self, keras_module, name):
        K = keras_module
        K.utils.set_random_seed(0)
        options = {"Adam": {}, "SGD": {"momentum": 0.9}}[name]
        model = zoo.functional(K)
        model.compile(getattr(K.optimizers, name)(1e-3, **options), "mse", run_eagerly=True)
        x = zoo.examples(model, 16)
        original = select(model, 0.6)
        apply_plan(model, select(model, 0.3))
        model.fit(x, np.ones((16, 10)), verbose=0)
        backend, optimizer = backend_of(model), model.optimizer
        layer = model.get_layer("down")

        def slots(target):
            targets = backend.optimizer_targets(optimizer, list(model.variables))
            index = [id(t) for t in targets].index(id(target))
            found = backend.slots(optimizer, targets)
            meanings = {"_velocities": "squared"}
            return {meanings.get(n, "linear"): value(slot[index]) for n, slot in found.items()}

        bias = slots(layer.bias)
        pairs = [slots(layer.encoder), slots(layer.decoder)]
        factors = Factors.of(backend, layer)
        apply_plan(model, original)
        assert int(value(optimizer.iterations)) == 1
        assert {id(v) for v in backend.optimizer_targets(optimizer, list(model.variables))} == {
            id(v) for v in model.trainable_variables
        }
        now = slots(layer.encoder)
        assert set(now) == set(bias) == ({"linear", "squared"} if name == "Adam" else {"linear"})
        for meaning, state in now.items():
            dense = gathered(meaning, [pair[meaning] for pair in pairs], factors)
            expected, _ = carried(backend, meaning, dense, layer)
            assert np.abs(expected).max() > 0
            np.testing.assert_allclose(state, expected, rtol=1e-3, atol=1e-9)
            np.testing.assert_array_equal(slots(layer.bias)[meaning], bias[meaning])
        model.fit(x, np.ones((16, 10)), verbose=0)

    def test_exclusions_from_weight_decay_follow(self):
        import keras

        model = zoo.functional(keras)
        optimizer = keras.optimizers.AdamW(1e-3)
        optimizer.exclude_from_weight_decay(var_list=[model.get_layer("down").kernel])
        model.compile(optimizer, "mse")
        apply_plan(model, select(model, 0.3))
        inventory, layer = Inventory.of(model), model.get_layer("down")
        with recomposed(inventory, inventory.factorized, keep=True):
            assert backend_of(model).is_excluded_from_weight_decay(optimizer, layer.kernel)
