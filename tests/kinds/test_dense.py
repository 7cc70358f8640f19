"""Dense layers; also in test_contract.py and test_forms.py."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from kind_contract import EveryKind, name
from layer_contract import FORMS, KERASES, as_array, randomize, tf_variable

from keras_alds import ALDSCompress, expand
from keras_alds._backend import backend_of
from keras_alds._backend.graphs import is_sparse
from keras_alds.kinds.base import is_factorized

CASES = [
    ("Dense", {"units": 6}, (4,)),
    ("Dense", {"units": 6, "activation": "tanh", "use_bias": False}, (5, 4)),
]


@pytest.mark.parametrize("case", CASES, ids=name)
class TestDense(EveryKind):
    pass


def value_and_gradients(layer, inputs):
    with tf.GradientTape() as tape:
        outputs = layer(inputs, training=True)
        loss = tf.reduce_sum(outputs**2)
    gradients = tape.gradient(loss, list(map(tf_variable, layer.trainable_weights)))
    return [as_array(outputs), *map(as_array, gradients)]


@pytest.mark.parametrize("form", ["auto", *FORMS])
@pytest.mark.parametrize("slices", [1, 3, 12])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)], ids=str)
@pytest.mark.parametrize("side", KERASES.values(), ids=KERASES)
def test_sparse_inputs_give_what_dense_ones_give(side, shape, slices, form):
    layer = side.layers.FactorizedDense(7, slices=slices, rank=1, encoder_form=form)
    layer.build((None, 12))
    randomize(layer)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    x[np.random.default_rng(1).random(shape) < 0.6] = 0
    x[1] = 0
    found = value_and_gradients(layer, tf.sparse.from_dense(x))
    for ours, theirs in zip(found, value_and_gradients(layer, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_sparse_inputs_are_never_made_dense(monkeypatch):
    """Inputs of many features would not fit."""
    monkeypatch.setattr(tf.sparse, "to_dense", None)
    channels, slices = 2**22, 2**10
    layer = keras_layer = KERASES["keras"].layers.FactorizedDense(4, slices=slices, rank=2)
    x = tf.SparseTensor([[0, 5], [2, channels - 1]], [1.0, 2.0], [3, channels])
    assert layer(x).shape == (3, 4)
    first, last = keras_layer.encoder.numpy()[[5, -1]]
    decoder = keras_layer.decoder.numpy()
    expected = [first[:2] @ decoder[:2], np.zeros(4), 2 * last[-2:] @ decoder[-2:]]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("side", KERASES.values(), ids=KERASES)
def test_ragged_inputs_give_rows_of_their_own_length(side):
    layer = side.layers.FactorizedDense(7, slices=3, rank=2, activation="tanh")
    rows = np.random.default_rng(0).normal(size=(6, 12)).astype("float32")
    ragged = tf.RaggedTensor.from_row_lengths(rows, [2, 0, 3, 1])
    outputs = layer(ragged)
    np.testing.assert_array_equal(outputs.row_lengths(), [2, 0, 3, 1])
    np.testing.assert_allclose(outputs.flat_values, layer(rows), rtol=1e-6)


def test_models_of_sparse_inputs_train_and_stay_sparse(keras_module, tmp_path):
    K = keras_module
    x = (np.random.default_rng(0).random((32, 60)) < 0.1).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(x), x[:, :4])).batch(16)
    dense = K.layers.Dense
    model = K.Sequential([K.Input((60,), sparse=True), dense(40, activation="relu"), dense(4)])
    model.compile("adam", "mse")
    compressing = ALDSCompress(0.5, at_epoch=1, calibration_data=data, verbose=0)
    model.fit(data, epochs=2, callbacks=[compressing], verbose=0)
    small = backend_of(model).copy_model(model)
    assert any(map(is_factorized, small.layers))
    assert all(map(is_sparse, small.inputs))
    small.save(tmp_path / "small.keras")
    for other in (K.models.load_model(tmp_path / "small.keras"), expand(small)):
        np.testing.assert_allclose(
            other.predict(data, verbose=0), small.predict(data, verbose=0), atol=1e-5
        )


def test_no_lora_adapter():
    layer = KERASES["keras"].layers.FactorizedDense(7, slices=3, rank=2)
    assert hasattr(keras.layers.Dense, "enable_lora")
    with pytest.raises(NotImplementedError, match=r"takes no LoRA adapter\. Received: rank=4\."):
        layer.enable_lora(4)
