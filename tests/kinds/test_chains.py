"""Chains of convolutions, Tucker-2 and CP: equal, trained, saved, expanded, converted."""

from __future__ import annotations

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo
from kind_contract import assert_close, made, value_and_gradients
from layer_contract import convolve

import keras_alds
from keras_alds import _backend
from keras_alds._backend.training import AVERAGE, LINEAR, SQUARED
from keras_alds.core.chains import CP, TUCKER, form_weights
from keras_alds.litert import convert
from keras_alds.litert.runs import Runner
from keras_alds.models.optimizer import Factors, carried, gathered

CASES = [
    ("Conv2D", {"filters": 6, "kernel_size": (3, 2), "strides": 2, "padding": "same"}, (7, 6, 4)),
    ("Conv2D", {"filters": 6, "kernel_size": (1, 3), "dilation_rate": 2}, (4, 7, 4)),
    (
        "Conv2D",
        {"filters": 6, "kernel_size": 3, "strides": (2, 1), "data_format": "channels_first"},
        (4, 6, 7),
    ),
]


def chained(layer, scheme, rank, input_rank=None):
    shape = tuple(layer.kernel.shape)
    choice = keras_alds.LayerChoice(
        layer.name, "Conv2D", shape, 1, rank, scheme, {}, 0.0, None, input_rank=input_rank
    )
    return zoo.factorized_layer(layer, choice)


@pytest.mark.parametrize("case", CASES, ids=["strides", "dilation", "channels_first"])
def test_the_layer_is_a_convolution_with_its_kernel(keras_module, case):
    layer, x = made(keras_module, case)
    expected = tf.convert_to_tensor(layer(x)).numpy()
    full = chained(layer, TUCKER, case[1]["filters"], 4)
    assert_close(full.kernel.numpy(), _backend.backend_of(layer).value(layer.kernel))
    assert_close(tf.convert_to_tensor(full(x)).numpy(), expected)
    first = layer.data_format == "channels_first"
    for scheme, input_rank in ((TUCKER, 2), (CP, None)):
        factorized = chained(layer, scheme, 3, input_rank)
        factors = sum(int(tf.size(tf.convert_to_tensor(part))) for part in factorized.factors)
        assert factors == form_weights(factorized.kernel_shape, input_rank or 1, 3, scheme)
        wanted = convolve(
            np.moveaxis(x, 1, -1) if first else x,
            factorized.kernel.numpy(),
            strides=layer.strides,
            dilation=layer.dilation_rate,
            padding=layer.padding,
        ) + _backend.backend_of(layer).value(layer.bias)
        y = tf.convert_to_tensor(factorized(x)).numpy()
        assert_close(np.moveaxis(y, 1, -1) if first else y, wanted)


@pytest.mark.parametrize("scheme", [TUCKER, CP])
def test_gradients_follow_the_chain_rule(keras_module, scheme):
    """The factors' gradients against the dense kernel's, and so what optimizers carry over."""
    layer, x = made(keras_module, CASES[0])
    backend = _backend.backend_of(layer)
    factorized = chained(layer, scheme, 3, 2 if scheme == TUCKER else None)
    layer.kernel.assign(factorized.kernel)
    expected, (of_kernel, of_bias) = value_and_gradients(layer, x)
    y, gradients = value_and_gradients(factorized, x)
    assert_close(y, expected)
    wanted = carried(backend, LINEAR, of_kernel, factorized)
    parts = [part.reshape(g.shape) for part, g in zip(wanted, gradients, strict=False)]
    for actual, gradient in zip(gradients, [*parts, of_bias], strict=True):
        assert_close(actual, gradient)
    factors = Factors.of(backend, factorized)
    kept = carried(backend, AVERAGE, of_kernel, factorized)
    assert_close(gathered(AVERAGE, kept, factors), factorized.kernel.numpy())
    # What is known of the dense kernel's state gives the last factor's again.
    squares = [part.reshape(v.shape) for part, v in zip(wanted, factors.values, strict=True)]
    again = carried(backend, LINEAR, gathered(LINEAR, squares, factors), factorized)
    assert_close(again[-1], wanted[-1])
    squared = carried(backend, SQUARED, np.ones_like(of_kernel), factorized)
    shaped = [part.reshape(v.shape) for part, v in zip(squared, factors.values, strict=True)]
    again = carried(backend, SQUARED, gathered(SQUARED, shaped, factors), factorized)
    assert again[-1].sum() == pytest.approx(squared[-1].sum(), rel=1e-4)


def model_of(K):
    L = K.layers
    inputs = K.Input((10, 9, 4))
    x = L.Conv2D(8, 3, padding="same", activation="relu", name="first")(inputs)
    x = L.Conv2D(12, 3, strides=2, padding="same", use_bias=False, name="second")(x)
    x = L.BatchNormalization(name="norm")(x)
    x = L.Conv2D(12, 1, activation="relu", name="pointwise")(x)
    x = L.GlobalAveragePooling2D(name="pool")(x)
    return K.Model(inputs, L.Dense(10, name="head")(x))


def plan_of(model):
    """A plan of both chains: CP for `second`, Tucker-2 for `first`, the SVD for a matrix."""
    bounds = {"pointwise|first|second": (0.1, 1)}
    one, other = (
        keras_alds.select(model, 0.4, method=method, bounds=bounds) for method in ("tucker", "cp")
    )
    choices = [
        b if b.layer == "second" else a for a, b in zip(one.choices, other.choices, strict=True)
    ]
    plan = dataclasses.replace(one, choices=tuple(choices))
    found = {choice.layer: choice.scheme for choice in plan.factorized}
    assert found == {"first": TUCKER, "second": CP, "pointwise": 0}
    assert keras_alds.CompressionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    return plan


@pytest.mark.both
def test_in_a_model(keras_module, tmp_path):
    pytest.importorskip("tensorly")
    K = keras_module
    model = model_of(K)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 10, 9, 4)).astype("float32")
    y = rng.standard_normal((16, 10)).astype("float32")
    model.compile(K.optimizers.Adam(1e-3), "mse")
    model.fit(x, y, verbose=0)
    plan = plan_of(model)
    small = keras_alds.compress(model, plan=plan)
    names = [type(small.get_layer(name)).__name__ for name in ("first", "second", "pointwise")]
    assert names == ["TuckerConv2D", "CPConv2D", "FactorizedConv2D"]

    # In place, in training: the same plan, and the state of what did not change.
    backend, optimizer = _backend.backend_of(model), model.optimizer

    def state():
        every = model.trainable_variables
        (place,) = (n for n, v in enumerate(every) if v is model.get_layer("head").kernel)
        slots = backend.slots(optimizer, every)
        return [backend.value(slot[place]) for slot in slots.values()]

    before = state()
    assert any(np.abs(values).max() > 0 for values in before)
    keras_alds.apply_plan(model, plan)
    for old, new in zip(before, state(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert_close(zoo.outputs(model, x), zoo.outputs(small, x))
    weights = [w.copy() for w in model.get_weights()]
    model.fit(x, y, verbose=0)
    assert all(not np.array_equal(*pair) for pair in zip(weights, model.get_weights(), strict=True))

    expected = zoo.outputs(model, x)
    for file in ("model.keras", "model.h5"):
        model.compile("sgd", K.losses.MeanSquaredError())
        model.save(tmp_path / file)
        assert_close(zoo.outputs(K.models.load_model(tmp_path / file), x), expected)
    stock = keras_alds.expand(model)
    names = [layer.name for layer in stock.layers]
    start = names.index("first_encoder")
    assert names[start : start + 7] == [
        *("first_encoder", "first_core", "first"),
        *("second_encoder", "second_rows", "second_columns", "second"),
    ]
    assert_close(zoo.outputs(stock, x), expected, 1e-5)
    if K is keras:
        assert_close(zoo.outputs(keras_alds.to_tf_keras(model), x), expected, 1e-5)
        content = convert(model, quantize="int8", representative_data=x, verbose=0)
        scores = Runner(content).predict(x).ravel()
        assert np.abs(scores - expected).max() < 0.1 * np.abs(expected).max()
        html = keras_alds.report(model_of(K), small, plan=plan).to_html()
        assert "Tucker-2" in html
        assert "CP" in html
        keras_alds.report(model_of(K), stock, plan=plan).to_html()
        lines: list[str] = []
        plan.summary(lines.append, 120)
        assert any("Tucker-2" in line and " → " in line for line in "\n".join(lines).split("\n"))
        keras_alds.plots.ranks(plan)
    # Compressed further: from the product of the factors.
    further = keras_alds.compress(model, 0.7, method="tucker")
    assert further.count_params() <= 0.3 * plan.params_before


@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_beside_a_single_layer_without_chains(keras_module, method):
    L = keras_module.layers
    model = keras_module.Sequential(
        [keras_module.Input((8, 8, 16)), L.Conv2D(64, 3), L.GlobalAveragePooling2D(), L.Dense(10)]
    )
    assert keras_alds.select(model, 0.4, method=method).cr >= 0.4


@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_costs_are_those_of_the_plan(method):
    if method == "cp":
        pytest.importorskip("tensorly")
    model = model_of(keras)
    plan = keras_alds.select(model, {"macs": 0.3, "memory": 0.0}, method=method)
    small = keras_alds.compress(model, plan=plan)
    assert plan.factorized
    assert keras_alds.count_macs(model) == plan.costs["macs"].before
    assert keras_alds.count_macs(small) == plan.costs["macs"].after
    again = keras_alds.select(small, 0.01, exclude="first|second|pointwise")
    assert again.memory.before == plan.memory.after


def test_tucker_uses_data():
    model = model_of(keras)
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.standard_normal((64, 10, 9, 4)), axis=1).astype("float32")
    dense = zoo.outputs(model, x)
    options = {"method": "tucker", "exclude": "pointwise|head"}
    with_data = keras_alds.compress(model, 0.4, calibration_data=x, **options)
    without = keras_alds.compress(model, 0.4, **options)
    errors = [np.square(zoo.outputs(small, x) - dense).sum() for small in (with_data, without)]
    assert errors[0] < 0.5 * errors[1]
    with pytest.raises(ValueError, match="method 'tucker', which has its own"):
        keras_alds.select(model, 0.4, method="tucker", error_measure="slice")
    for option in ({"target": "litert"}, {"objective": "latency"}):
        with pytest.raises(ValueError, match=r"no target and 'params' or 'macs'.*forms targets do"):
            keras_alds.select(model, 0.4, method="tucker", **option)
    with pytest.raises(ValueError, match="`schemes` to be 0 with the method 'tucker'"):
        keras_alds.select(model, 0.4, method="tucker", schemes=3)


@pytest.mark.both
def test_arguments_out_of_range(keras_module):
    layers = keras_alds.layers if keras_module is keras else keras_alds.tf_keras
    with pytest.raises(ValueError, match=r"`input_rank` to be at most 4, and `rank` at most 8"):
        layers.TuckerConv2D(8, 3, input_rank=5, rank=3).build((None, 6, 6, 4))
    with pytest.raises(ValueError, match="Received: input_rank=0"):
        layers.TuckerConv2D(8, 3, input_rank=0, rank=3)
