"""No plan under any target yields a file that fails to run; and why such files fail."""

from __future__ import annotations

import importlib
import tempfile
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

import keras_alds
from keras_alds.models.ranges import (
    find_pairs,
)
from keras_alds.targets import TARGETS

pytest.importorskip("ai_edge_litert")

from keras_alds.litert import check_file, convert, equalize, read_file
from keras_alds.litert.runs import LOCAL, Runner, check_scales, requantization_scales

L = keras.layers


def raw_int8(model: Any, x: np.ndarray) -> bytes:
    """The file that TensorFlow's converter makes, with nothing of this package on the way."""
    module = tf.Module()
    module.serve = tf.function(lambda t: model(t, training=False), autograph=False)
    signature = module.serve.get_concrete_function(
        tf.TensorSpec((1, *model.input_shape[1:]), tf.float32)
    )
    module.weights = list(signature.variables)
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures=signature)
        return converted(tf.lite.TFLiteConverter.from_saved_model(folder), x)


def converted(converter: Any, x: np.ndarray) -> bytes:
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([row[np.newaxis]] for row in x)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return bytes(converter.convert())


def runs(content: bytes, *, target: str) -> bool:
    """Whether the runtime itself loads and runs a file."""
    try:
        runner = Runner(content, target=target)
        runner.invoke()
    except RuntimeError:
        return False
    return True


# -- The rule --------------------------------------------------------------------------------------

SINGLE = {
    "CONV_2D": lambda: L.Conv2D(8, 3, padding="same"),
    "grouped CONV_2D": lambda: L.Conv2D(8, 3, groups=4, padding="same"),
    "DEPTHWISE_CONV_2D": lambda: L.DepthwiseConv2D(3, padding="same"),
    "FULLY_CONNECTED": lambda: L.Dense(8),
    "TRANSPOSE_CONV": lambda: L.Conv2DTranspose(8, 3, strides=2, padding="same"),
}


def with_scale(content: bytes, name: str, channel: int, scale: float) -> bytes:
    """A file with one weight scale changed, so that a channel's requantization scale is `scale`."""
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    graph = model.subgraphs[0]
    (found,) = [op for op in read_file(content).operators if op.name == name]
    tensors = [graph.tensors[t.index] for t in (found.data, found.weights, found.outputs[0])]
    s_in, s_out = (np.float32(tensors[n].quantization.scale[0]) for n in (0, 2))
    scales = np.array(tensors[1].quantization.scale, np.float32)
    # The float32 for which XNNPACK's own arithmetic gives `scale` exactly, or just less.
    guess = np.float32(np.float32(scale) * s_out / s_in)
    while s_in * guess / s_out < np.float32(scale):
        guess = np.nextafter(guess, np.float32(np.inf))
    while s_in * guess / s_out > np.float32(scale):
        guess = np.nextafter(guess, np.float32(0))
    scales[channel] = guess
    tensors[1].quantization.scale = scales.tolist()
    if found.bias is not None:
        bias = graph.tensors[found.bias.index].quantization
        bias.scale = (scales * s_in).tolist()
    builder = importlib.import_module("flatbuffers").Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


@pytest.mark.parametrize("kind", SINGLE)
def test_xnnpack_refuses_requantization_scales_from_256_on(kind: str):
    inputs = keras.Input((16,) if kind == "FULLY_CONNECTED" else (6, 6, 16))
    model = keras.Model(inputs, SINGLE[kind]()(inputs))
    x = np.random.default_rng(0).standard_normal((8, *model.input_shape[1:])).astype("float32")
    content = raw_int8(model, x)
    name = kind.split()[-1]
    for channel in (0, 7):
        for scale, accepted in ((255.99, True), (256.0, False), (1e4, False), (1e-12, True)):
            file = with_scale(content, name, channel, scale)
            (operator,) = [op for op in read_file(file).operators if op.name == name]
            computed = requantization_scales(operator)[channel]
            assert runs(file, target="litert") == accepted == (computed < 256), (scale, computed)
            assert runs(file, target="litert-reference")
            if accepted:
                check_file(file)
            else:
                with pytest.raises(ValueError, match=f"below 256.*{name}.*channel {channel}: "):
                    check_scales(read_file(file))
                check_file(file, targets=("litert-reference",))


def test_float_and_dynamic_files_have_no_such_scales():
    small = keras_alds.compress(zoo.functional(keras), 0.4, target="litert")
    zoo.spread(small, 6)
    for quantize in ("float16", "dynamic"):
        content = convert(small, quantize=quantize, verbose=0)
        check_file(content)
        assert all(requantization_scales(op) is None for op in read_file(content).operators)


# What `equalize` does in both Keras: tests/models/test_ranges.py.
@pytest.mark.parametrize("form", ["factorized", "expanded"])
def test_unbalanced_factors_do_not_run_and_balanced_ones_do(form: str):
    small = keras_alds.compress(zoo.functional(keras), 0.4, target="litert")
    x = zoo.examples(small, 32)
    expected = np.asarray(small(x, training=False))
    zoo.spread(small, 4)
    if form == "expanded":
        small = keras_alds.expand(small)
    broken = raw_int8(small, x)
    assert not runs(broken, target="litert")
    assert runs(broken, target="litert-reference")
    with pytest.raises(ValueError, match=r"below 256.*channel \d+: .* = \d") as caught:
        check_file(broken)
    assert "keras_alds.litert.equalize" in str(caught.value)
    # The same product, balanced on the way; the model is as it was, bit for bit.
    before = small.get_weights()
    content = convert(small, quantize="int8", representative_data=x, verbose=0)
    for old, new in zip(before, small.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    check_file(content)
    for target in LOCAL:
        found = Runner(content, target=target).predict(x)
        assert np.abs(found - expected).max() < 0.06 * np.abs(expected).max()
    # And in place, for other converters.
    equalize(small, x if form == "factorized" else None, verbose=0)
    assert runs(raw_int8(small, x), target="litert")


def test_a_dead_layer_is_named():
    inputs = keras.Input((6, 6, 8))
    x = L.Conv2D(
        16, 3, name="dead", activation="relu", bias_initializer=lambda *a, **k: -1e3 * tf.ones(a[0])
    )(inputs)
    model = keras.Model(inputs, L.Dense(4)(L.GlobalAveragePooling2D()(x)))
    x = np.random.default_rng(0).standard_normal((16, 6, 6, 8)).astype("float32")
    with pytest.raises(ValueError, match=r"below 256.*/dead.*dead units"):
        convert(model, quantize="int8", representative_data=x, verbose=0)


def test_pixels_are_values_and_integers_of_the_file_s_type_are_quantized_already():
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, L.Dense(8)(L.Flatten()(inputs)))
    pixels = np.random.default_rng(0).integers(0, 255, (32, 4, 4, 3), "uint8", endpoint=True)
    floats = pixels.astype("float32")
    for input_type in ("float32", "int8"):
        runner = Runner(
            convert(
                model,
                quantize="int8",
                representative_data=floats,
                inference_input_type=input_type,
                verbose=0,
            )
        )
        expected = runner.predict(floats)
        assert np.abs(expected - model.predict(floats, verbose=0)).max() < 20
        np.testing.assert_array_equal(runner.predict(pixels), expected)
    scale, zero = runner.inputs[0]["quantization"]
    raw = np.clip(np.round(floats / scale) + zero, -128, 127).astype("int8")
    np.testing.assert_array_equal(runner.predict(raw), expected)


# -- The property ----------------------------------------------------------------------------------


def random_network(random: np.random.Generator) -> Any:
    """Some seven layers that can be factorized, in an order and of sizes by chance."""

    def width() -> int:
        return int(random.choice([16, 24, 32, 48, 64, 128]))

    def after(x: Any) -> Any:
        if random.random() < 0.6:
            x = L.BatchNormalization()(x)
        return L.Activation(random.choice(["relu", "relu6", "linear", "hard_sigmoid"]))(x)

    def convolution(filters: int, strides: Any = 1) -> Any:
        size = random.choice(["1", "3", "3", "5x1"])
        kernel = (5, 1) if size == "5x1" else int(size)
        dilation = 2 if strides == 1 and size == "3" and random.random() < 0.3 else 1
        return L.Conv2D(
            filters,
            kernel,
            strides=strides,
            dilation_rate=dilation,
            padding="same",
            use_bias=bool(random.random() < 0.7),
        )

    inputs = keras.Input((12, 12, int(random.choice([3, 16, 32]))))
    filters = width()
    x = after(convolution(filters)(inputs))
    shared = L.Conv2D(filters, 3, padding="same")
    x = L.Add()([x, after(shared(x)), after(convolution(filters)(shared(x)))])
    x = after(convolution(width(), (2, 2))(x))
    x = after(convolution(width(), (2, 1) if random.random() < 0.3 else 1)(x))
    x = after(L.Conv2D(width(), 3, padding="valid")(x))
    if random.random() < 0.5:
        x = L.Reshape((-1, x.shape[-1]))(x)
        x = after(L.Conv1D(width(), 3, dilation_rate=2, padding="causal")(x))
    x = L.Flatten()(x)
    x = after(L.Dense(width())(x))
    return keras.Model(inputs, L.Dense(10)(x))


def hostile(model: Any, random: np.random.Generator) -> None:
    """BatchNormalization in use, factors that differ 10^±4 between ranks, dead channels."""
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):
            gamma, beta, mean, variance = layer.get_weights()
            layer.set_weights(
                [
                    gamma * random.uniform(0.3, 2, gamma.shape) * random.choice([-1, 1, 1]),
                    random.normal(size=beta.shape) * 0.3,
                    random.normal(size=mean.shape) * 0.1,
                    variance * random.uniform(0.3, 3, variance.shape),
                ]
            )
    for pair in find_pairs(model):
        ranks = int(pair.decoder.shape[-2])
        encoder = np.array(np.asarray(pair.encoder)).reshape(-1, ranks)
        decoder = np.array(np.asarray(pair.decoder))
        scale = 10 ** random.uniform(-4, 4, ranks)
        encoder, decoder = encoder * scale, decoder / scale[:, np.newaxis]
        if ranks > 2 and random.random() < 0.5:
            encoder[:, random.integers(ranks)] = 0
            decoder[..., random.integers(ranks), :] = 0
            decoder[..., random.integers(decoder.shape[-1])] = 0
        pair.encoder.assign(encoder.reshape(pair.encoder.shape))
        pair.decoder.assign(decoder)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))])
def test_every_plan_under_a_target_runs(target: str, seed: int):
    random = np.random.default_rng([seed, len(target)])
    keras.utils.set_random_seed(seed)
    model = random_network(random)
    plan = zoo.random_plan(model, random, target)
    assert len(plan.factorized) >= (2 if target == "cpu" else 5)  # narrow layers stay whole
    small = keras_alds.compress(model, plan=plan)
    hostile(small, random)
    if seed % 2:
        small = keras_alds.expand(small)
    scale = 10 ** random.uniform(-2, 2)
    x = (scale * random.standard_normal((24, *model.input_shape[1:]))).astype("float32")
    expected = np.asarray(small(x, training=False))
    size = np.abs(expected).max()
    for quantize, data, tolerance in ((None, None, 1e-4), ("int8", x, 0.1)):
        content = convert(small, quantize=quantize, representative_data=data, verbose=0)
        for target in LOCAL:
            found = Runner(content, target=target).predict(x)
            assert np.abs(found - expected).max() < tolerance * size, (quantize, target)
            assert np.sqrt(np.mean((found - expected) ** 2)) < tolerance / 3 * size


@pytest.mark.filterwarnings("ignore")
def test_factors_that_drifted_apart_in_quantization_aware_training_are_caught():
    tf_keras = pytest.importorskip("tf_keras")
    tfmot = pytest.importorskip("tensorflow_model_optimization")
    inputs = tf_keras.Input((8, 8, 8))
    x = tf_keras.layers.Conv2D(16, 3, activation="relu", name="conv")(inputs)
    x = tf_keras.layers.GlobalAveragePooling2D(name="pool")(x)
    model = tf_keras.Model(inputs, tf_keras.layers.Dense(10, name="head")(x))
    small = keras_alds.expand(keras_alds.compress(model, 0.3, target="litert"))
    x = np.random.default_rng(0).standard_normal((32, 8, 8, 8)).astype("float32")

    def file(network: Any) -> bytes:
        aware = tfmot.quantization.keras.quantize_model(network)
        aware.compile(tf_keras.optimizers.SGD(0.0), "mse")  # learns the ranges only
        aware.fit(x, np.zeros((32, 10)), epochs=30, batch_size=8, verbose=0)
        return convert(aware, quantize="int8", verbose=0)

    zoo.spread(small, 4)
    with pytest.raises(ValueError, match=r"below 256.*before quantization-aware training"):
        file(small)
    equalize(small, x, verbose=0)
    check_file(file(small))
