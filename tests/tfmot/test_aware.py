"""Quantization beside ALDS: aware training with TF-MOT, and Keras 3's own `quantize`."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest
import zoo

import keras_alds
from keras_alds import litert
from keras_alds._backend.layers import called_function
from keras_alds.cli import demo
from keras_alds.litert.runs import Runner

pytest.importorskip("ai_edge_litert")
tf_keras = pytest.importorskip("tf_keras")
pytest.importorskip("tensorflow_model_optimization")

from keras_alds.tfmot.operations import arithmetic_as_layers  # noqa: E402 - needs tf_keras

aware = keras_alds.tfmot.quantize_aware_training


def compiled(model: Any, K: ModuleType) -> Any:
    loss = K.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=K.optimizers.Adam(2e-3), loss=loss, metrics=["accuracy"])
    return model


def types(content: bytes) -> set[tuple[str, str, str]]:
    """Types of input, weights and output of every convolution and dense layer of a file."""
    return {
        (step.data.dtype, step.weights.dtype, step.outputs[0].dtype)
        for step in litert.read_file(content).weighted
    }


def test_one_call(keras_module: ModuleType, tmp_path: Path):
    model = compiled(zoo.functional(keras_module), keras_module)
    before = model.get_weights()
    x, y = zoo.images(64)
    path = tmp_path / "int8.tflite"
    with pytest.warns(UserWarning, match="groups of fewer than 32 channels") as record:
        quantized, content = aware(
            model, x, y, compress={"cr": 0.4, "max_slices": 4}, path=path, epochs=2, verbose=0
        )
    assert __file__ in {warning.filename for warning in record}
    assert path.read_bytes() == content
    assert types(content) == {("int8", "int8", "int8")}
    names = [step.name for step in litert.read_file(content).operators]
    # TF-MOT saw the BatchNormalization: it is folded, and there is no operator of it.
    assert set(names) <= {
        *("QUANTIZE", "CONV_2D", "DEPTHWISE_CONV_2D", "MEAN", "FULLY_CONNECTED", "DEQUANTIZE"),
        "RESHAPE",
    }
    assert isinstance(quantized, tf_keras.Model)
    assert len(quantized.history.history["loss"]) == 2
    assert isinstance(quantized.optimizer, tf_keras.optimizers.Adam)
    # One step of the coarsest output scale apart at most.
    scale = litert.read_file(content).operators[-1].inputs[0].scales[0]
    ours, theirs = Runner(content).predict(x), quantized.predict(x, verbose=0)
    assert np.abs(ours - theirs).max() <= 3.01 * scale
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_single_steps_give_the_same_file():
    import tensorflow_model_optimization as tfmot

    model = compiled(zoo.functional(keras), keras)
    x, y = zoo.images(32)
    seen = []

    def fit(quantized: Any) -> None:
        tf_keras.utils.set_random_seed(0)
        seen.append(quantized)
        quantized.fit(x, y, epochs=1, shuffle=False, verbose=0)

    options = {"cr": 0.4, "max_slices": 1}
    quantized, content = aware(
        model, fit_fn=fit, compress=options, convert_options={"inference_input_type": "int8"}
    )
    assert seen == [quantized]
    small = keras_alds.to_tf_keras(keras_alds.expand(keras_alds.compress(model, **options)))
    by_hand = tfmot.quantization.keras.quantize_model(small)
    compiled(by_hand, tf_keras).optimizer.learning_rate = 2e-4
    fit(by_hand)
    other = litert.convert(by_hand, quantize="int8", inference_input_type="int8", verbose=0)
    assert litert.read_file(content).inputs[0].dtype == "int8"
    np.testing.assert_allclose(
        Runner(content).predict(x), Runner(other).predict(x), atol=0.05, rtol=0
    )
    with pytest.raises(ValueError, match="Expected quantize='int8'"):
        litert.convert(by_hand, quantize="dynamic")


def test_grouped_convolutions_train_without_xla():
    layers = tf_keras.layers
    inputs = tf_keras.Input((6, 6, 8))
    conv = layers.Conv2D(8, 3, groups=4)
    model = tf_keras.Model(inputs, layers.Flatten()(conv(inputs)))
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 8)).astype("float32")
    before = np.asarray(model(x))
    model.compile("sgd", "mse")
    quantized, content = aware(model, x, before, batch_size=2, verbose=0)
    (wrapped,) = (
        w.layer for w in quantized.layers if isinstance(getattr(w, "layer", 0), type(conv))
    )
    # TensorFlow has their gradient on CPUs from oneDNN alone.
    plain = os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"
    assert (wrapped._jit_compiled_convolution_op == wrapped.convolution_op) is plain
    assert conv._jit_compiled_convolution_op != conv.convolution_op  # that of the user's model
    (step,) = litert.read_file(content).weighted
    assert step.groups == 4
    limit = 0.1 * np.abs(before).max()
    np.testing.assert_allclose(quantized.predict(x, verbose=0), before, atol=limit)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    x, y = zoo.images(8)
    model = zoo.functional(keras)
    with pytest.raises(ValueError, match="Expected a compiled model, or `optimizer` and `loss`"):
        aware(model, x, y, loss="mse")
    model = compiled(model, keras)
    with pytest.raises(ValueError, match="Expected training data `x`"):
        aware(model)
    with pytest.raises(ValueError, match=r"Expected either training data or .*\(epochs\)"):
        aware(model, fit_fn=lambda model: None, epochs=2)
    for options, text in (
        ({"compress": 0.5}, r"Expected `compress` to be a dict of options.*compress=0\.5"),
        ({"convert_options": {"quantize": None}}, r"always int8.*Received: quantize$"),
        ({"optimizer": keras.optimizers.Adam()}, r"a tf_keras optimizer.*Adam of Keras 3"),
    ):
        with pytest.raises(ValueError, match=text):
            aware(model, x, y, **options)
    trained: list[Any] = []

    def train(model: Any) -> None:
        trained.append(model)

    stop = keras.callbacks.EarlyStopping("loss")
    for callbacks in (stop, [tf_keras.callbacks.History(), stop]):
        with pytest.raises(ValueError, match=r"tf_keras callbacks.*EarlyStopping of Keras 3"):
            aware(model, x, y, callbacks=callbacks)
    for wrong, text in (
        ({"compress": {"ratio": 0.5}}, r"Expected `compress` to hold options.*Received: 'ratio'"),
        ({"convert_options": {"bits": 8}}, r"`convert_options` to hold.*Received: 'bits'"),
    ):
        with pytest.raises(TypeError, match=text):
            aware(model, fit_fn=train, **wrong)
    with pytest.raises(TypeError, match=r"`fit_options` to hold options of `fit`.*'epoch', 'lr'"):
        aware(model, x, y, epoch=3, lr=0.1)
    with pytest.raises(ValueError, match="Expected `batch_size` to be a positive integer"):
        aware(model, fit_fn=train, convert_options={"batch_size": 0})
    with pytest.raises(FileNotFoundError, match="Expected `path` to lie in a folder"):
        aware(model, fit_fn=train, path=tmp_path / "none" / "file.tflite")
    assert not trained
    with pytest.raises(ValueError, match=r"Expected a model without nested models.*'middle'"):
        aware(compiled(zoo.nested(keras), keras), x, y)
    with pytest.raises(ValueError, match="Expected a Functional or Sequential model"):
        aware(compiled(zoo.subclassed(keras), keras), x, y)

    class Own(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            return inputs

    inputs = keras.Input((12, 12, 3))
    own = keras.Model(inputs, zoo.functional(keras)(Own(name="own")(inputs)))
    with pytest.raises(ValueError, match=r"whose layers tf_keras has too.*'own' \(Own\)"):
        aware(compiled(own, keras), x, y)
    inputs = tf_keras.Input((5, 3))
    lstm = tf_keras.Model(inputs, tf_keras.layers.ConvLSTM1D(2, 2)(inputs[:, None]))
    lstm.compile("sgd", "mse")
    with pytest.raises(ValueError, match="Expected a model that TF-MOT can quantize"):
        aware(lstm, np.zeros((8, 5, 3)), np.zeros((8, 4, 2)))
    monkeypatch.setitem(sys.modules, "tensorflow_model_optimization", None)
    with pytest.raises(ImportError, match=r'pip install "keras_alds\[tfmot\]"'):
        aware(model, x, y)


# -- Learning rate, and comparison with quantization after training -------------------------------


def task() -> tuple[Any, Any, Any]:
    """A small network, and examples whose targets it does not know."""
    L = tf_keras.layers
    inputs = tf_keras.Input((6, 6, 4))
    outputs = L.Dense(3)(L.Flatten()(L.Conv2D(8, 3, activation="relu")(inputs)))
    model = tf_keras.Model(inputs, outputs)
    model.compile(tf_keras.optimizers.SGD(0.1), "mse")
    x = np.random.default_rng(0).standard_normal((320, 6, 6, 4)).astype("float32")
    return model, x, x[:, :3, 0, 0] + x[:, 1:4, 1, 1]


def loss(content: bytes, x: Any, y: Any) -> float:
    return float(np.mean((Runner(content).predict(x) - y) ** 2))


def warned(*arguments: Any, **options: Any) -> tuple[bytes, list[str]]:
    """The file of quantization-aware training, and its warnings of a worse file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, content = aware(*arguments, convert_options={"verbose": 0}, **options)
    texts = [str(warning.message) for warning in caught if warning.filename == __file__]
    assert repr(content) == f"<{len(content):,} bytes of a .tflite file>"
    return content, [text for text in texts if "made a worse file" in text]


def test_a_worse_file_than_after_training_is_told_of():
    model, x, y = task()
    held = np.arange(0, 320, 10)  # every tenth example is left out of the training
    after = litert.convert(model, quantize="int8", representative_data=x[held], verbose=0)
    before = loss(after, x[held], y[held])
    content, texts = warned(model, x, y, epochs=4, verbose=0)
    assert loss(content, x[held], y[held]) < before  # ten seeds: 0.68 to 0.87 of it
    assert not texts
    unlearns = tf_keras.optimizers.SGD(10.0, clipnorm=1.0)
    content, (text,) = warned(model, x, y, optimizer=unlearns, verbose=0)
    worse = loss(content, x[held], y[held])
    assert worse > 2 * before
    assert f"on 32 held-out examples, its loss is {worse:.4g} instead of" in text
    told = text.split("instead of ")[1].split()[0].rstrip(".")
    assert float(told) == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize("kind", ["validation_data", "validation_split", "dataset", "own fit"])
def test_what_files_are_compared_on(kind: str):
    model, x, y = task()
    model.compile(tf_keras.optimizers.SGD(100.0, clipnorm=1.0), "mse")  # unlearns
    options: dict[str, Any] = {}
    batches = importlib.import_module("tensorflow").data.Dataset.from_tensor_slices((x, y))
    if kind != "own fit":
        options["verbose"] = 0
    if kind == "validation_split":
        data, held = (x, y), 80
        options["validation_split"] = 0.25
    elif kind == "own fit":
        data, held = (), 48
        options["fit_fn"] = lambda quantized: quantized.fit(x[48:], y[48:], verbose=0)
        options["validation_data"] = (x[:48], y[:48], np.ones(48))
    else:
        data, held = ((batches.batch(32),) if kind == "dataset" else (x, y)), 48
        options["validation_data"] = batches.take(48).batch(20)
    _, texts = warned(model, *data, **options)
    assert any(f"on {held} held-out examples" in text for text in texts)
    if kind == "dataset":  # nothing was set apart
        del options["validation_data"]
        assert warned(model, *data, **options)[1] == []


def test_classes_are_compared_by_accuracy():
    model, x, _ = task()
    classes = model.predict(x, verbose=0).argmax(-1)
    _, (text,) = warned(
        model,
        x,
        classes,
        optimizer=tf_keras.optimizers.SGD(10.0, clipnorm=1.0),  # unlearns
        loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        verbose=0,
    )
    assert "on 32 held-out examples, its accuracy is 0." in text


@pytest.mark.both
def test_learning_rate_is_a_tenth_of_the_models(keras_module: ModuleType):
    K = keras_module
    x, y = np.ones((8, 8), "float32"), np.zeros((8, 4))
    decay = K.optimizers.schedules.ExponentialDecay(1e-2, 1, 0.5)
    for rate, steps, expected in ((4e-3, 0, 4e-4), (decay, 3, 1e-2 / 8 / 10)):
        model = K.Sequential([K.Input((8,)), K.layers.Dense(4)])
        model.compile(K.optimizers.Adam(rate), K.losses.MeanSquaredError())
        for _ in range(steps):
            model.train_on_batch(x, y)
        quantized, _ = aware(model, x, y, verbose=0)
        assert float(quantized.optimizer.learning_rate) == pytest.approx(expected, rel=1e-5)
    model.compile(K.optimizers.Adam(K.optimizers.schedules.CosineDecay(1e-2, 2)), model.loss)
    for _ in range(2):
        model.train_on_batch(x, y)
    with pytest.raises(ValueError, match="Expected the model's learning rate to be above 0"):
        aware(model, x, y)
    if K is tf_keras:
        model.compile(K.optimizers.legacy.Adam(4e-3), model.loss)
        quantized, _ = aware(model, x, y, verbose=0)
        assert float(quantized.optimizer.learning_rate) == pytest.approx(4e-4)


def annotate_convolutions(model: Any) -> Any:
    """TF-MOT for the convolutions alone: the dense layers stay in float."""
    quantization = importlib.import_module("tensorflow_model_optimization").quantization.keras

    def clone(layer: Any) -> Any:
        is_conv = isinstance(layer, tf_keras.layers.Conv2D)
        return quantization.quantize_annotate_layer(layer) if is_conv else layer

    copy = tf_keras.models.clone_model(model, clone_function=clone)
    return quantization.quantize_apply(copy)


def test_separable_convolutions_do_not_take_the_names_of_others():
    L, counts = tf_keras.layers, tf_keras.backend.clear_session
    counts()  # as in a new process
    inputs = tf_keras.Input((6, 6, 4))
    x = L.Conv2D(4, 1, name="conv2d")(inputs)
    x = L.Concatenate()([x, L.SeparableConv2D(4, 3, padding="same", name="first")(inputs)])
    x = L.Conv2D(4, 1, name="conv2d_1")(x)
    x = L.Add()([x, L.SeparableConv2D(4, 3, padding="same", name="second")(inputs)])
    model = tf_keras.Model(inputs, x)
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).standard_normal((32, 6, 6, 4)).astype(np.float32)
    wanted = model(x).numpy()
    counts()
    quantized, _ = aware(model, x, wanted, epochs=1, verbose=0)
    assert np.abs(quantized(x).numpy() - wanted).max() < 0.1 * np.abs(wanted).max()


def test_layers_left_in_float_are_found():
    model = compiled(zoo.functional(keras), keras)
    x, y = zoo.images(16)
    with pytest.raises(ValueError, match=r"Expected every convolution.*hidden.*float32"):
        aware(model, x, y, quantize_fn=annotate_convolutions, verbose=0)
    _, content = aware(
        model,
        x,
        y,
        quantize_fn=annotate_convolutions,
        convert_options={"representative_data": x},
        verbose=0,
    )
    assert types(content) == {("int8", "int8", "int8")}


# -- Keras 3's own quantization --------------------------------------------------------------------


def quiet_quantize(model: Any) -> list[str]:
    """Keras's `quantize`, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.quantize("int8")
    return [str(warning.message) for warning in caught]


def test_keras_quantize_says_what_stays_in_float():
    small = keras_alds.compress(zoo.functional(keras), 0.4, method="alds", max_slices=1)
    x = zoo.examples(small)
    before = zoo.outputs(small, x)
    texts = quiet_quantize(small)
    for name in ("stem", "down", "hidden", "head"):
        (text,) = (text for text in texts if f"'{name}'" in text)
        assert "stays in float" in text
        assert "keras_alds.expand" in text
    np.testing.assert_array_equal(zoo.outputs(small, x), before)


def test_keras_quantize_after_expand(tmp_path: Path):
    small = keras_alds.compress(zoo.functional(keras), 0.4, method="alds", max_slices=1)
    x = zoo.examples(small)
    stock = keras_alds.expand(small)
    quiet_quantize(stock)
    modes = {layer.name: getattr(layer, "quantization_mode", None) for layer in stock.layers}
    dense = ("hidden_encoder", "hidden", "head_encoder", "head")
    assert {name for name, mode in modes.items() if mode == "int8"} == set(dense)
    for name in dense:
        assert stock.get_layer(name)._kernel.dtype == "int8"
    before, after = zoo.outputs(small, x), zoo.outputs(stock, x)
    assert 0 < np.abs(after - before).max() < 0.05 * np.abs(before).max()
    stock.save(tmp_path / "int8.keras")
    again = keras.models.load_model(tmp_path / "int8.keras")
    np.testing.assert_array_equal(zoo.outputs(again, x), after)
    with pytest.raises(ValueError, match=r"layers compute in float.*'hidden' \(int8\)"):
        litert.convert(again)


# -- The whole chain -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
def test_digits_at_half_the_parameters():
    """Train, compress in `fit`, retrain, expand, train for int8: small and as accurate."""
    pytest.importorskip("sklearn")
    x, y, x_test, y_test = demo.load_data()
    original = compiled(demo.build_model(keras), keras)
    original.fit(x, y, batch_size=64, epochs=8, verbose=0)
    model = compiled(keras.models.clone_model(original), keras)
    model.set_weights(original.get_weights())
    alds = keras_alds.ALDSCompress(0.5, at_epoch=0, max_slices=4, calibration_data=x, verbose=0)
    model.fit(x, y, batch_size=64, epochs=4, callbacks=[alds], verbose=0)
    int8 = {"quantize": "int8", "representative_data": x, "verbose": 0}
    first, after = litert.convert(original, **int8), litert.convert(model, **int8)
    _, second = aware(model, x, y, batch_size=64, epochs=2, verbose=0)
    assert types(second) == {("int8", "int8", "int8")}
    assert alds.plan.cr >= 0.5
    assert len(second) <= 0.7 * len(first)
    accuracies = [
        np.mean(Runner(file).predict(x_test).argmax(-1) == y_test)
        for file in (first, after, second)
    ]
    # Ten seeds: at worst 0.2 points below the original, and level with `after`.
    assert accuracies[2] >= accuracies[0] - 0.015
    assert accuracies[2] >= accuracies[1] - 0.01


def hard_swish_by_operators(K: ModuleType, x: Any) -> Any:
    gate = K.layers.ReLU(6.0)(x + 3.0) * (1.0 / 6.0)  # as MobileNetV3 of tf_keras has it
    return K.layers.Multiply()([x, gate])


@pytest.mark.both
def test_arithmetic_between_layers(keras_module: ModuleType):
    K = keras_module
    L = K.layers
    inputs = K.Input((8, 8, 3))
    x = L.Rescaling(1 / 2, -1.0)(inputs)
    x = hard_swish_by_operators(K, L.BatchNormalization()(L.Conv2D(16, 3, use_bias=False)(x)))
    x = L.Conv2D(16, 3)(x)
    x = L.Activation("hard_silu")(x) if K is keras else hard_swish_by_operators(K, x)
    x = L.Maximum()([x, L.Subtract()([x - 1.0, x])])
    model = compiled(K.Model(inputs, L.Dense(4)(L.Flatten()(x))), K)
    x = np.random.default_rng(0).uniform(0, 4, (32, 8, 8, 3)).astype("float32")
    expected = model.predict(x, verbose=0)
    y = expected.argmax(axis=1)
    rate = tf_keras.optimizers.SGD(1e-6)
    quantized, content = aware(model, x, y, optimizer=rate, validation_data=(x, y), verbose=0)
    names = {step.name for step in litert.read_file(content).operators}
    assert {"MUL", "ADD", "MAXIMUM"} <= names
    for step in litert.read_file(content).operators:
        if step.name not in ("QUANTIZE", "DEQUANTIZE"):
            assert {tensor.dtype for tensor in step.outputs} == {"int8"}
    spread = expected.max() - expected.min()
    assert np.abs(Runner(content).predict(x) - expected).mean() < 0.05 * spread
    assert np.abs(quantized.predict(x, verbose=0) - expected).mean() < 0.05 * spread


def test_layers_of_operators_have_a_symbol():
    """The name of the function that tf_keras calls. Without it operators stay, and TF-MOT fails."""
    inputs = tf_keras.Input((3,))
    model = tf_keras.Model(inputs, [inputs + 3.0, inputs * inputs, 1.0 - inputs, inputs / 2.0])
    found = [called_function(layer) for layer in model.layers]
    assert found[0] is None
    assert sorted(found[1:]) == [
        *("__operators__.add", "math.multiply", "math.subtract", "math.truediv")
    ]
    new = arithmetic_as_layers(model)
    kinds = sorted(type(layer).__name__ for layer in new.layers[1:])
    assert kinds == ["Multiply", "Rescaling", "Rescaling", "Rescaling"]
    x = np.random.default_rng(0).standard_normal((5, 3)).astype("float32")
    for ours, theirs in zip(new(x), model(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
