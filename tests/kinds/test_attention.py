"""Attention layers whose projections are factorized."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import zoo
from kind_contract import assert_close, choice_for

import keras_alds
from keras_alds import _backend, apply_plan, compress, count_macs, select
from keras_alds.kinds import attention


def attention_model(K, name="MultiHeadAttention"):
    L = K.layers
    inputs = K.Input((6, 24))
    arguments = (4, 6) if name == "MultiHeadAttention" else (6, 4, 2)
    layer = getattr(L, name)(*arguments, dropout=0.1, name="attention")
    x = layer(inputs, inputs, use_causal_mask=True)
    x = L.GlobalAveragePooling1D(name="pool")(x)
    return K.Model(inputs, L.Dense(3, name="head")(x))


def attention_data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((16, 6, 24)).astype("f"), rng.standard_normal((16, 3)).astype("f")


@pytest.mark.parametrize("name", ["MultiHeadAttention", "GroupQueryAttention"])
def test_projections_are_factorized_trained_and_saved(keras_module, name, tmp_path):
    K = keras_module
    if not hasattr(K.layers, name):
        pytest.skip(f"{K.__name__} has no {name}")
    model = attention_model(K, name)
    x, y = attention_data()
    model.compile(K.optimizers.Adam(1e-3), "mse")
    model.fit(x, y, verbose=0)
    layer = model.get_layer("attention")
    plan = select(model, 0.3, exclude="head")
    names = {choice.layer for choice in plan.factorized}
    assert names
    assert names <= {f"attention/{n}" for n in ("query", "key", "value", "attention_output")}
    small = compress(model, plan=plan)
    assert type(layer) is getattr(K.layers, name)
    assert small.count_params() == plan.params_after
    apply_plan(model, plan)
    assert model.get_layer("attention") is layer
    assert type(layer).__name__ == f"Factorized{name}"
    assert len(layer.projections) == len(names)
    assert_close(np.asarray(model.predict(x, verbose=0)), np.asarray(small.predict(x, verbose=0)))
    before = [np.array(w) for w in layer.get_weights()]
    model.fit(x, y, verbose=0)
    moved = [not np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True)]
    assert sum(moved) >= len(moved) - 1  # a key's bias has no effect
    expected = np.asarray(model.predict(x, verbose=0))
    files = ["model.keras", "model.weights.h5"] if K is keras else ["model.keras", "saved"]
    for file in files:
        if file.endswith(".weights.h5"):
            model.save_weights(tmp_path / file)
            loaded = K.models.clone_model(model)
            loaded.load_weights(tmp_path / file)
        else:
            model.save(tmp_path / file)
            loaded = K.models.load_model(tmp_path / file)
        assert type(loaded.get_layer("attention")).__name__ == f"Factorized{name}"
        assert loaded.get_layer("attention").projections == layer.projections
        assert_close(np.asarray(loaded.predict(x, verbose=0)), expected)


def test_equals_the_stock_layer_at_full_rank(keras_module):
    model = attention_model(keras_module)
    x, _ = attention_data()
    layer = model.get_layer("attention")
    expected = zoo.outputs(model, x)
    scores = layer(x, x, return_attention_scores=True)[1]
    for dense in attention.projections(layer).values():
        factorized = zoo.factorized_layer(dense, choice_for(dense, 2))
        _backend.backend_of(layer).transplant(dense, factorized, {"bias": "bias"})
    assert_close(zoo.outputs(model, x), expected)
    again = layer(x, x, return_attention_scores=True)[1]
    assert_close(np.asarray(again), np.asarray(scores))


def test_counted_and_calibrated(keras_module):
    model = attention_model(keras_module)
    x, _ = attention_data()
    plan = select(model, 0.2, objective="macs", exclude="head")
    assert count_macs(compress(model, plan=plan)) == plan.costs["macs"].after
    small = compress(model, 0.3, calibration_data=x, exclude="head")
    assert type(small.get_layer("attention")).__name__ == "FactorizedMultiHeadAttention"


def test_a_failure_puts_the_class_back(keras_module, monkeypatch):
    model = attention_model(keras_module)
    model.compile("adam", "mse")
    x, y = attention_data()
    model.fit(x, y, verbose=0)
    layer, config = model.get_layer("attention"), model.get_layer("attention").get_config()
    plan = select(model, 0.3, exclude="head")
    expected = zoo.outputs(model, x)
    with monkeypatch.context() as patch:
        patch.setattr(
            "keras_alds.models.in_place.carry_optimizers",
            lambda *_: (_ for _ in ()).throw(RuntimeError("stop")),
        )
        with pytest.raises(RuntimeError, match="stop"):
            apply_plan(model, plan)
    assert type(layer) is keras_module.layers.MultiHeadAttention
    assert layer.get_config() == config
    np.testing.assert_array_equal(zoo.outputs(model, x), expected)


def test_rebuilt_in_tf_keras():
    model = attention_model(keras)
    x, _ = attention_data()
    small = compress(model, 0.3, exclude="head")
    other = keras_alds.to_tf_keras(small)
    assert type(other.get_layer("attention")).__name__ == "FactorizedMultiHeadAttention"
    assert_close(zoo.outputs(other, x), zoo.outputs(small, x))


def test_expand_multiplies_the_factors(keras_module):
    model = attention_model(keras_module)
    x, _ = attention_data()
    small = compress(model, 0.3, exclude="head")
    names = ", ".join(small.get_layer("attention").projections)
    with pytest.warns(
        UserWarning, match=rf"'attention' gets dense kernels .*\({names}: [0-9,]+ we"
    ):
        stock = keras_alds.expand(small)
    layer = stock.get_layer("attention")
    assert type(layer) is keras_module.layers.MultiHeadAttention
    assert stock.count_params() == model.count_params()
    assert_close(zoo.outputs(stock, x), zoo.outputs(small, x))


def test_a_layer_with_code_of_its_own_is_left_alone(keras_module):
    K = keras_module

    class Attention(K.layers.MultiHeadAttention):
        def call(self, query, value, key=None, training=None):
            return super().call(query, value, key, training=training)

    inputs = K.Input((6, 24))
    x = Attention(4, 6, name="attention")(inputs, inputs)
    model = K.Model(inputs, K.layers.Dense(24)(x))
    plan = select(model, 0.05)
    reasons = {c.layer: c.reason for c in plan.choices}
    assert "Attention creates it in its own code" in reasons["attention/query"]


@pytest.mark.both
def test_bad_projections(keras_module):
    side = keras_alds.layers if keras_module is keras else keras_alds.tf_keras
    cls = side.FactorizedMultiHeadAttention
    for bad in ("query", {"queries": {"slices": 1, "rank": 1}}, {"query": {"rank": 1}}):
        with pytest.raises(ValueError, match="`projections` to be a dict"):
            cls(2, 4, projections=bad)
    layer = cls(2, 4, projections={"gate": {"slices": 1, "rank": 1}})
    with pytest.raises(ValueError, match="it has no 'gate'"):
        layer(np.ones((1, 3, 8), "f"), np.ones((1, 3, 8), "f"))
