"""Every format, loaded by a fresh process that knows of the layers by import only."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import kind_contract
import numpy as np
import pytest
import tensorflow as tf
import test_attention
import test_convolution
import test_einsum
import test_embedding
import test_recurrent
import test_separable
import test_transposed
from layer_contract import KERASES, randomize

from keras_alds import compress
from keras_alds.kinds.base import factorizable_names

ROOT = pathlib.Path(__file__).parents[2]
# One process for each Keras: TensorFlow takes long to load.
LOAD = """
import importlib, json, sys
import numpy as np

K, layers, exported, every_kind, own = json.loads(sys.argv[1])

def check(y, path):
    np.testing.assert_allclose(y, np.load(path), rtol=1e-4, atol=1e-5)

for path, x, y in exported:
    import tensorflow as tf
    artifact = tf.saved_model.load(path)
    check(artifact.serve(np.load(x)), y)
    assert not any(module.startswith("keras_alds") for module in sys.modules)
    print("served", path)

import keras_alds
K = importlib.import_module(K)
for path, x, y in every_kind:
    expected = np.load(y)
    found = K.models.load_model(path).predict(np.load(x), verbose=0)
    difference = np.abs(np.asarray(found) - expected).max()
    assert difference <= 1e-5 * max(np.abs(expected).max(), 1.0), (path, difference)
    print("loaded", path)

layers = importlib.import_module(layers)
for path, x, y in own:
    x = np.load(x)
    model = K.models.load_model(path)
    assert isinstance(model.layers[1], layers.FactorizedConv2D), type(model.layers[1])
    assert model.layers[1].kernel.shape == (3, 3, 4, 6)
    assert model.get_layer("second").encoder_form == "merged"
    found = model.predict(x, verbose=0)
    if path.endswith(".h5"):  # Keras 3 reads an optimizer from `.h5` that knows no variables
        model.compile("sgd", "mse")
    model.fit(x, found, verbose=0)
    check(found, y)
    print("trained", path)
"""


def make_model(side):
    layers, keras = side.layers, side.keras
    inputs = keras.Input((9, 8, 4))
    x = layers.FactorizedConv2D(6, 3, slices=2, rank=3, padding="same", activation="relu")(inputs)
    x = layers.FactorizedConv2D(
        4,
        3,
        slices=6,
        rank=2,
        strides=2,
        encoder_form="merged",
        encoder_regularizer=keras.regularizers.L2(1e-3),
        name="second",
    )(x)
    x = keras.layers.Reshape((-1, 4))(x)
    x = layers.FactorizedConv1D(6, 3, slices=2, rank=1, padding="causal", use_bias=False, scheme=3)(
        x
    )
    x = layers.FactorizedDense(5, slices=3, rank=2, activation="tanh")(x)
    x = keras.layers.Flatten()(x)
    model = keras.Model(inputs, layers.FactorizedDense(3, slices=1, rank=2)(x))
    # Not "mse": Keras 3 cannot read that string back from its own `.h5` files.
    model.compile("sgd", keras.losses.MeanSquaredError())
    for seed, layer in enumerate(model.layers):
        if layer.weights:
            randomize(layer, seed)
    return model


@pytest.mark.parametrize("name", list(KERASES))
def test_weights_files_and_clones(name, tmp_path):
    side = KERASES[name]
    model = make_model(side)
    x = np.random.default_rng(0).normal(size=(3, 9, 8, 4)).astype("float32")
    expected = model.predict(x, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    clone = side.keras.models.clone_model(model)
    assert np.abs(clone.predict(x, verbose=0) - expected).max() > 0
    clone.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(clone.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KERASES))
@pytest.mark.parametrize("slices", [4, 32])
def test_a_converted_file_keeps_the_factors(name, slices):
    """A file that held the recomposed kernel would have lost the compression."""
    side = KERASES[name]
    layer = side.layers.FactorizedConv2D(32, 3, slices=slices, rank=1, padding="same")
    dense = side.layers.FactorizedDense(32, slices=4, rank=2)
    model = side.keras.Sequential([side.keras.Input((6, 6, 32)), layer, dense])
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 32)).astype("float32")
    expected = model.predict(x, verbose=0)
    file = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    recomposed = 4 * (3 * 3 * 32 * 32 + 32 * 32)
    assert 4 * model.count_params() < len(file) < recomposed / 2
    interpreter = tf.lite.Interpreter(model_content=file)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def models_of_every_kind(K):
    L = K.layers
    for module in (test_convolution, test_transposed, test_separable, test_einsum, test_embedding):
        for case in module.MODELS:
            yield case[0], kind_contract.model_of(K, case)
    for kind in ("MultiHeadAttention", "GroupQueryAttention"):
        if hasattr(L, kind):
            yield kind, test_attention.attention_model(K, kind)
    for kind, where in test_recurrent.PLACES:
        yield kind, test_recurrent.model_of(K, kind, where)


def save_data(folder, name, x, y):
    paths = [str(folder / f"{name}_x.npy"), str(folder / f"{name}_y.npy")]
    np.save(paths[0], x)
    np.save(paths[1], y)
    return paths


def save_every_kind(K, folder):
    files, rng = [], np.random.default_rng(0)
    models = list(models_of_every_kind(K))
    # Cells are part of their layers, and `own` below has the other kinds.
    elsewhere = {"Conv1D", "Conv2D", "Dense", "SimpleRNN", "LSTMCell", "GRUCell", "SimpleRNNCell"}
    there = {kind for kind in factorizable_names() if hasattr(K.layers, kind)}
    assert {kind for kind, _ in models} == there - elsewhere
    for n, (kind, model) in enumerate(models):
        small = compress(model, 0.2, exclude=["head", "dense"])
        shape = (4, *tuple(model.inputs[0].shape)[1:])
        x = rng.integers(0, 50, shape) if kind == "Embedding" else rng.standard_normal(shape)
        x = x.astype("int32" if kind == "Embedding" else "float32")
        path = str(folder / f"{n}.keras")
        small.save(path)
        files.append([path, *save_data(folder, n, x, test_recurrent.predict(small, x))])
    return files


@pytest.mark.slow
def test_every_kind_and_format_loads_in_a_fresh_process(keras_module, tmp_path):
    K, exported = keras_module, []
    model = make_model(KERASES[K.__name__])
    x = np.random.default_rng(0).normal(size=(3, 9, 8, 4)).astype("float32")
    data = save_data(tmp_path, "own", x, model.predict(x, verbose=0))
    own = [[str(tmp_path / name), *data] for name in ("model.keras", "model.h5")]
    for path, *_ in own:
        model.save(path)
    if K.__name__ == "keras":
        layers = "keras_alds.layers"
        exported.append([str(tmp_path / "exported"), *data])
        model.export(exported[0][0], verbose=False)  # served without keras_alds
    else:
        layers = "keras_alds.tf_keras"
        own.append([str(tmp_path / "saved_model"), *data])
        model.save(own[-1][0], save_format="tf")
    every_kind = save_every_kind(K, tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps([K.__name__, layers, exported, every_kind, own])],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)},
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    wanted = {"served": exported, "loaded": every_kind, "trained": own}
    assert run.stdout.splitlines() == [
        f"{word} {path}" for word, files in wanted.items() for path, *_ in files
    ]
