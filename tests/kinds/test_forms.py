"""Every form of every layer against NumPy and against the stock layer, values and gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from layer_contract import (
    FORMS,
    KERASES,
    as_array,
    convolve,
    dense_kernel,
    randomize,
    tf_variable,
)

from keras_alds._backend import tensors
from keras_alds.core.slicing import recompose
from keras_alds.kinds import forms as _forms
from keras_alds.layers import choose_form

OPTIONS_2D = [
    {},
    {"padding": "same"},
    {"strides": 2, "padding": "same"},
    {"strides": (2, 1)},
    {"strides": (1, 3), "padding": "same"},
    {"dilation_rate": 2},
    {"dilation_rate": (1, 2), "padding": "same"},
    {"kernel_size": 1},
    {"kernel_size": 1, "strides": 2},
    {"kernel_size": (2, 3), "padding": "same", "use_bias": False, "activation": "softmax"},
]
OPTIONS_1D = [
    {},
    {"padding": "causal"},
    {"padding": "causal", "dilation_rate": 2},
    {"padding": "causal", "strides": 2},
    {"padding": "same", "strides": 3, "activation": "relu"},
    {"dilation_rate": 2, "padding": "same"},
    {"kernel_size": 1},
]


@pytest.fixture(params=list(KERASES))
def side(request):
    return KERASES[request.param]


def values_and_gradients(layer, x, training=True):
    """The output of a layer and the gradients of its squared sum: input first, then weights."""
    with tf.GradientTape() as tape:
        watched = tf.constant(x)
        tape.watch(watched)
        y = layer(watched, training=training)
        loss = tf.reduce_sum(y**2)
    gradients = tape.gradient(loss, [watched, *map(tf_variable, layer.trainable_weights)])
    return as_array(y), [as_array(gradient) for gradient in gradients]


def assert_close(actual, expected, message=""):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * scale, err_msg=message)


def check_forms(layer, x, expected, factors_gradient):
    """Compare every form with the expected output and the gradients of the dense kernel."""
    for form in [*FORMS, "auto"]:
        layer.encoder_form = form
        for training in (True, False):
            y, gradients = values_and_gradients(layer, x, training)
            assert_close(y, expected, form)
            assert y.shape == tuple(layer.compute_output_shape(x.shape))
            for actual, wanted in zip(gradients, factors_gradient, strict=True):
                assert_close(actual, wanted, form)


def chain(stock, x, encoder, decoder, slices):
    """The stock layer's gradients, taken on to the factors by the product rule, in NumPy."""
    _, (of_x, of_kernel, *of_bias) = values_and_gradients(stock, x)
    per_slice, width = encoder.shape[-2:]
    rank = width // slices
    flat = decoder.reshape(width, -1)
    of_encoder, of_decoder = np.zeros_like(encoder), np.zeros_like(flat)
    for i in range(slices):
        columns = slice(i * rank, (i + 1) * rank)
        block = of_kernel[..., i * per_slice : (i + 1) * per_slice, :]
        of_encoder[..., columns] = block @ flat[columns].T
        unfolded = encoder[..., columns].reshape(-1, rank)
        of_decoder[columns] = unfolded.T @ block.reshape(-1, flat.shape[1])
    return [of_x, of_encoder, of_decoder.reshape(decoder.shape), *of_bias]


@pytest.fixture(params=[True, False], ids=["own", "no_gradients_of_groups"])
def kernels(request, monkeypatch):
    """This machine's kernels, and those of one that cannot differentiate grouped convolutions."""
    if not request.param:
        monkeypatch.setattr(tensors, "grouped_convolution_trains", lambda dtype: False)


def check_convolution(side, dimensions, options, data_format, slices):
    options = {"kernel_size": 3, "data_format": data_format, **options}
    # No output has as many pixels along its last axis as filters: stock Keras 3 then takes a
    # channels-first bias for one of columns, and the NumPy reference does not.
    shape = (2, *(11, 8)[:dimensions], 6)
    x = np.random.default_rng(2).normal(size=shape).astype("float32")
    given = np.moveaxis(x, -1, 1) if data_format == "channels_first" else x
    rank = 1 if options["kernel_size"] == 1 else 2
    cls = getattr(side.layers, f"FactorizedConv{dimensions}D")
    layer = cls(5, slices=slices, rank=rank, **options)
    layer.build(given.shape)
    randomize(layer)
    encoder, decoder, *bias = layer.get_weights()
    kernel = dense_kernel(encoder, decoder, slices)
    np.testing.assert_allclose(as_array(layer.kernel), kernel, rtol=1e-4, atol=1e-5)
    flat = decoder.reshape(-1, decoder.shape[-1])
    np.testing.assert_allclose(recompose(encoder, flat, slices), kernel, rtol=1e-4, atol=1e-5)

    stock = getattr(side.keras.layers, f"Conv{dimensions}D")(5, **options)
    stock.build(given.shape)
    stock.set_weights([kernel, *bias])
    expected = as_array(stock(given))
    if "activation" not in options:
        reference = convolve(
            x,
            kernel,
            strides=layer.strides,
            dilation=layer.dilation_rate,
            padding=layer.padding,
        ) + (bias[0] if bias else 0)
        if data_format == "channels_first":
            reference = np.moveaxis(reference, -1, 1)
        assert_close(expected, reference)
    check_forms(layer, given, expected, chain(stock, given, encoder, decoder, slices))


@pytest.mark.parametrize("options", OPTIONS_2D, ids=str)
@pytest.mark.parametrize("slices", [1, 2, 6])
def test_conv2d(side, kernels, options, slices):
    check_convolution(side, 2, options, "channels_last", slices)


@pytest.mark.parametrize("options", OPTIONS_1D, ids=str)
@pytest.mark.parametrize("slices", [1, 3, 6])
def test_conv1d(side, kernels, options, slices):
    check_convolution(side, 1, options, "channels_last", slices)


@pytest.mark.parametrize("options", OPTIONS_2D, ids=str)
def test_conv2d_channels_first(side, options):
    check_convolution(side, 2, options, "channels_first", 2)


@pytest.mark.parametrize("options", OPTIONS_1D, ids=str)
def test_conv1d_channels_first(side, options):
    check_convolution(side, 1, options, "channels_first", 2)


def test_channels_first_bias_is_added_as_the_stock_layer_does(side):
    x = np.random.default_rng(2).normal(size=(2, 4, 5, 5)).astype("float32")
    options = {"padding": "same", "data_format": "channels_first"}
    layer = side.layers.FactorizedConv2D(5, 3, slices=2, rank=2, **options)
    stock = side.keras.layers.Conv2D(5, 3, **options)
    layer.build(x.shape)
    stock.build(x.shape)
    randomize(layer)
    stock.set_weights([as_array(layer.kernel), layer.get_weights()[2]])
    assert_close(as_array(layer(x)), as_array(stock(x)))


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 3, 2, 6)], ids=str)
@pytest.mark.parametrize("slices", [1, 2, 6])
@pytest.mark.parametrize("options", [{}, {"activation": "softmax", "use_bias": False}], ids=str)
def test_dense(side, shape, slices, options):
    x = np.random.default_rng(2).normal(size=shape).astype("float32")
    layer = side.layers.FactorizedDense(5, slices=slices, rank=1, **options)
    layer.build(shape)
    randomize(layer)
    encoder, decoder, *bias = layer.get_weights()
    kernel = dense_kernel(encoder, decoder, slices)
    stock = side.keras.layers.Dense(5, **options)
    stock.build(shape)
    stock.set_weights([kernel, *bias])
    expected = as_array(stock(x))
    if not options:
        assert_close(expected, x.astype("float64") @ kernel + bias[0])
    check_forms(layer, x, expected, chain(stock, x, encoder, decoder, slices))


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_full_rank_holds_any_kernel(side, dimensions, slices):
    """Factors from the SVD of every slice, at full rank, give the stock layer's output."""
    generator = np.random.default_rng(5)
    shape = (2, *(8, 7)[:dimensions], 6)
    stock = getattr(side.keras.layers, f"Conv{dimensions}D")(10, 3, strides=2, padding="same")
    stock.build(shape)
    randomize(stock)
    kernel, bias = stock.get_weights()
    per_slice = 6 // slices
    rank = min(10, per_slice * 3**dimensions)
    encoders, decoders = [], []
    for i in range(slices):
        block = kernel[..., i * per_slice : (i + 1) * per_slice, :]
        left, values, right = np.linalg.svd(block.reshape(-1, 10), full_matrices=False)
        encoders.append((left * values).reshape(*block.shape[:-1], rank))
        decoders.append(right)
    decoder = np.concatenate(decoders).reshape(*[1] * dimensions, slices * rank, 10)
    cls = getattr(side.layers, f"FactorizedConv{dimensions}D")
    layer = cls(10, 3, slices=slices, rank=rank, strides=2, padding="same")
    layer.build(shape)
    layer.set_weights([np.concatenate(encoders, axis=-1), decoder, bias])
    x = generator.normal(size=shape).astype("float32")
    assert_close(as_array(layer(x)), as_array(stock(x)))


@pytest.fixture
def chosen(monkeypatch):
    """The forms that were chosen, and whether for XLA, in order."""
    seen = []

    def spy(**arguments):
        form = choose_form(**arguments)
        seen.append((form, arguments["training"], arguments["xla"]))
        return form

    monkeypatch.setattr(_forms, "choose_form", spy)
    return seen


@pytest.mark.parametrize("jit", [False, True])
def test_fit_tells_the_layers_about_training_and_xla(side, jit, chosen):
    layer = side.layers.FactorizedConv2D(8, 3, slices=4, rank=2)
    depthwise = side.layers.FactorizedConv2D(4, 3, slices=8, rank=1)
    dense = side.layers.FactorizedDense(2, slices=2, rank=2)
    model = side.keras.Sequential(
        [side.keras.Input((8, 8, 8)), layer, depthwise, side.keras.layers.Flatten(), dense]
    )
    x = np.random.default_rng(0).normal(size=(8, 8, 8, 8)).astype("float32")
    y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")
    model.compile(side.keras.optimizers.SGD(0.01), "mse", jit_compile=jit)
    before = [w.copy() for w in model.get_weights()]
    eager = as_array(model(x))
    chosen.clear()
    model.fit(x, y, batch_size=8, verbose=0)
    assert chosen
    assert all(xla == jit for _, _, xla in chosen)
    assert any(training for _, training, _ in chosen)
    if jit:
        assert all(form in ("merged", "recomposed") for form, _, _ in chosen[:2])
    after = model.get_weights()
    assert all(np.abs(new - old).max() > 0 for old, new in zip(before, after, strict=True))
    chosen.clear()
    predicted = model.predict(x, verbose=0)
    assert chosen
    assert not any(training for _, training, _ in chosen)
    assert_close(predicted, as_array(model(x)))
    assert np.abs(predicted - eager).max() > 0


def test_jit_compiled_training_equals_plain_training(side):
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 4)).astype("float32")
    y = np.random.default_rng(1).normal(size=(8, 6, 6, 5)).astype("float32")
    results = []
    for jit in (False, True):
        layer = side.layers.FactorizedConv2D(5, 3, slices=2, rank=3, padding="same")
        model = side.keras.Sequential([side.keras.Input((6, 6, 4)), layer])
        randomize(layer)
        model.compile(side.keras.optimizers.SGD(0.05), "mse", jit_compile=jit)
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        results.append(layer.get_weights())
    for plain, compiled in zip(*results, strict=True):
        assert_close(compiled, plain)


def choose(**change):
    arguments = {
        "slices": 4,
        "rank": 8,
        "channels": 64,
        "filters": 64,
        "kernel_size": (3, 3),
        "positions": 64 * 32 * 32,
        "training": True,
        "dtype": "float32",
        "cpu": True,
        "xla": False,
    }
    return choose_form(**{**arguments, **change})


def test_choice_of_the_form(monkeypatch):
    monkeypatch.setattr(tensors, "grouped_convolution_trains", lambda dtype: dtype == "float32")
    assert choose(cpu=False) == "grouped"
    assert choose(cpu=False, training=False, dtype="float16") == "grouped"
    assert choose(training=False) == "grouped"
    assert choose(training=False, slices=64, rank=1) == "grouped"
    # A sliced dense layer is exported as a convolution, which quantizers take.
    assert choose(training=False, kernel_size=()) == "convolution"
    assert choose(training=False, kernel_size=(), slices=1) == "grouped"
    assert choose(cpu=False, training=False, kernel_size=()) == "grouped"
    # Files are for other machines, whatever this one can differentiate.
    assert choose(training=False, dtype="float64") == "grouped"
    assert choose(training=False, kernel_size=(), dtype="float64") == "convolution"
    assert choose(training=False, kernel_size=(3, 3, 3)) == "split"
    assert choose(dtype="float64") == "recomposed"
    # Few slices and many channels: two small convolutions; many slices: one dense one.
    assert choose(slices=1, rank=28) == "grouped"
    assert choose(slices=16, rank=11) == "recomposed"
    assert choose(slices=16, rank=46, channels=256, filters=256) == "grouped"
    assert choose(channels=16, filters=16, slices=2, rank=6) == "recomposed"
    # Pointwise kernels: a block-diagonal product, or the dense kernel where that would be larger.
    assert choose(kernel_size=(1, 1), slices=2, rank=42, channels=256, filters=256) == "merged"
    assert choose(kernel_size=(1, 1), slices=64, rank=1) == "recomposed"
    # Dense layers see few rows: multiplying the factors out costs more than it saves.
    for slices, rank in ((1, 512), (8, 113), (64, 15)):
        form = choose(
            kernel_size=(), slices=slices, rank=rank, channels=2048, filters=2048, positions=64
        )
        assert form != "recomposed"
    # XLA on CPU never sees a grouped convolution.
    for slices in (2, 4, 8, 16, 32, 64):
        for training in (True, False):
            for size in ((3, 3), (1, 1), (5,)):
                form = choose(xla=True, slices=slices, rank=1, kernel_size=size, training=training)
                assert form in ("merged", "recomposed")


def test_xla_traces_are_recognized():
    seen = {}

    @tf.function
    def inner(x):
        seen["inner"] = tensors.in_xla_trace()
        return x

    @tf.function(jit_compile=True)
    def compiled(x):
        seen["compiled"] = tensors.in_xla_trace()
        return inner(x)

    @tf.function
    def plain(x):
        seen["plain"] = tensors.in_xla_trace()
        return x

    compiled(tf.ones([2]))
    plain(tf.ones([2]))
    assert seen == {"compiled": True, "inner": True, "plain": False}
    assert not tensors.in_xla_trace()


def test_the_probe_of_grouped_gradients_tells_the_truth():
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        x = tf.Variable(tf.ones([2, 5, 5, 6], dtype))
        with tf.GradientTape() as tape:
            y = tf.nn.conv2d(x, tf.ones([3, 3, 2, 3], dtype), strides=1, padding="SAME")
        try:
            tape.gradient(y, x)
            trains = True
        except tf.errors.InvalidArgumentError:
            trains = False
        tensors._differentiates_groups.cache_clear()
        with tf.Graph().as_default():  # of TensorFlow 1: nothing can be tried, or kept
            assert not tensors.grouped_convolution_trains(dtype)
        assert tf.function(lambda d=dtype: tensors.grouped_convolution_trains(d))() == trains


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("strides", "padding", "dilation"), [(1, "same", 2), ((2, 1), "valid", 1)])
def test_grouped_convolutions_train_on_every_machine(
    monkeypatch, strides, padding, dilation, compiled
):
    generator = np.random.default_rng(0)
    x = tf.constant(generator.normal(size=(2, 9, 9, 6)))
    encoder = tf.constant(generator.normal(size=(3, 3, 3, 8)))
    settings = {
        "strides": strides if isinstance(strides, tuple) else (strides, strides),
        "dilation_rate": (dilation, dilation),
        "padding": padding,
        "data_format": "channels_last",
    }

    def gradients(form):
        def first_and_second(x, encoder):
            with tf.GradientTape() as outer:
                outer.watch((x, encoder))
                with tf.GradientTape() as inner:
                    inner.watch(encoder)
                    y = _forms.convolve_encoder(x, encoder, slices=2, form=form, **settings)
                    loss = tf.reduce_sum(y**2)
                first = inner.gradient(loss, encoder)
                loss = tf.reduce_sum(first**2)
            return first, *outer.gradient(loss, (x, encoder))

        return (tf.function(first_and_second) if compiled else first_and_second)(x, encoder)

    expected = gradients("split")
    monkeypatch.setattr(tensors, "grouped_convolution_trains", lambda dtype: False)
    for found, reference in zip(gradients("grouped"), expected, strict=True):
        np.testing.assert_allclose(found, reference, rtol=1e-9)


def test_grouped_convolutions_of_exported_models_have_gradients(side, tmp_path):
    assert not tensors.grouped_convolution_trains("float64")  # with any kernels of today
    layer = side.layers.FactorizedConv2D(6, 3, slices=2, rank=2, dtype="float64")
    inputs = side.keras.layers.InputLayer((8, 8, 8), dtype="float64")
    model = side.keras.Sequential([inputs, layer])
    model.export(str(tmp_path))
    loaded = tf.saved_model.load(tmp_path)
    x = tf.random.normal((2, 8, 8, 8), dtype="float64")

    def gradient(call):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(tf.convert_to_tensor(call(x)) ** 2)
        return tape.gradient(y, x)

    np.testing.assert_allclose(gradient(loaded.serve), gradient(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("spatial", [(), (5,), (3, 2), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("slices", [1, 3, 6])
def test_recompose_either_way(monkeypatch, limit, spatial, slices):
    monkeypatch.setattr(_forms, "_SMALL_PRODUCT", limit)
    generator = np.random.default_rng(3)
    encoder = generator.normal(size=(*spatial, 6 // slices, slices * 2))
    decoder = generator.normal(size=(*[1] * len(spatial), slices * 2, 5))
    kernel = _forms.recompose(tf.constant(encoder), tf.constant(decoder), slices)
    np.testing.assert_allclose(kernel, dense_kernel(encoder, decoder, slices), atol=1e-12)
    merged = _forms.merge(tf.constant(encoder), slices).numpy()
    np.testing.assert_allclose(merged @ decoder.reshape(-1, 5), kernel, atol=1e-12)


def test_positions_are_counted_after_striding():
    assert _forms.count_positions([64, 9, 8], (2, 1)) == 64 * 5 * 8
    assert _forms.count_positions([None, 4], (1,)) == 32 * 4
    assert _forms.count_positions([2, None], (1,)) == 2
    assert _forms.count_positions([0, 3], (1,)) == 1


@pytest.mark.parametrize("slices", [1, 3, 12])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_the_convolution_of_dense_layers(rows, slices):
    generator = np.random.default_rng(0)
    x = tf.constant(generator.normal(size=(rows, 12)).astype("float32"))
    encoder = tf.constant(generator.normal(size=(12 // slices, slices * 2)).astype("float32"))
    encode = tf.function(
        lambda x: _forms.encode(x, encoder, slices=slices, form=_forms.CONVOLUTION)
    )
    expected = tf.matmul(x, _forms.merge(encoder, slices))
    np.testing.assert_allclose(encode(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_without_onednn_models_train_and_files_are_the_same():
    """As on a processor without VNNI, where TensorFlow leaves oneDNN off by default."""
    code = """
import keras, numpy as np
from keras_alds import litert
from keras_alds._backend.tensors import grouped_convolution_trains
from keras_alds.layers import FactorizedConv2D

assert not grouped_convolution_trains("float32")
layers = [FactorizedConv2D(8, 3, slices=k, rank=1, padding="same") for k in (2, 8)]
model = keras.Sequential([keras.Input((6, 6, 8)), *layers])
model.compile("sgd", "mse")
x = np.ones((4, 6, 6, 8), "float32")
before = model.predict(x, verbose=0)
model.fit(x, x, verbose=0)
after = model.predict(x, verbose=0)
assert np.isfinite(after).all() and (after != before).any()
names = [step.name for step in litert.read_file(litert.convert(model, verbose=0)).operators]
assert names == ["CONV_2D", "CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D"], names
"""
    pytest.importorskip("ai_edge_litert")
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()[-2000:]
