"""`expand`: stock layers only, equal outputs, everything else kept; folded BatchNormalization."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import zoo

import keras_alds
from keras_alds._backend import backend_of

SYMBOLIC = [name for name in zoo.MODELS if name != "subclassed"]


def factorized(K: ModuleType) -> ModuleType:
    """The module of factorized layers for a Keras."""
    name = "keras_alds.layers" if K.__name__ == "keras" else "keras_alds.tf_keras"
    return importlib.import_module(name)


def is_factorized(layer: Any) -> bool:
    return type(layer).__name__.startswith("Factorized")


def randomize(model: Any) -> None:
    """Values for every weight that make a forgotten or swapped one show."""
    rng = np.random.default_rng(3)

    def values(weight: Any, old: np.ndarray) -> np.ndarray:
        if not np.issubdtype(old.dtype, np.floating):
            return old
        if old.ndim > 1:
            return rng.standard_normal(old.shape) / np.sqrt(max(1, old[..., 0].size))
        return rng.uniform(0.5, 1.5, old.shape)  # variances have to be positive

    model.set_weights(
        [values(w, old) for w, old in zip(model.weights, model.get_weights(), strict=True)]
    )


def single(K: ModuleType, shape: tuple[int | None, ...], layer: Any) -> Any:
    inputs = K.Input(shape)
    model = K.Model(inputs, layer(inputs))
    randomize(model)
    return model


def assert_expanded(model: Any, inputs: Any, *, tolerance: float = 1e-5) -> Any:
    """Expands, compares the outputs, and returns the stock model."""
    before = zoo.outputs(model, inputs)
    stock = keras_alds.expand(model)
    assert not any(is_factorized(layer) for layer in stock._flatten_layers())
    np.testing.assert_allclose(zoo.outputs(stock, inputs), before, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(zoo.outputs(model, inputs), before)
    return stock


@pytest.mark.parametrize("max_slices", [1, None])
@pytest.mark.parametrize("name", SYMBOLIC)
def test_every_kind_of_model(keras_module: ModuleType, name: str, max_slices: int | None):
    model = zoo.MODELS[name](keras_module)
    small = keras_alds.compress(model, 0.4, max_slices=max_slices)
    randomize(small)
    stock = assert_expanded(small, zoo.examples(small))
    assert stock.count_params() == small.count_params()
    assert stock.name == small.name
    assert type(stock) is type(small)
    if not isinstance(small, keras_module.Sequential):
        assert list(stock.output_names) == list(small.output_names)


def test_a_model_without_factorized_layers_comes_back_as_a_copy(keras_module: ModuleType):
    model = zoo.nested(keras_module)
    randomize(model)
    copy = assert_expanded(model, zoo.examples(model))
    assert copy is not model
    assert [layer.name for layer in copy._flatten_layers()] == [
        layer.name for layer in model._flatten_layers()
    ]
    assert not {id(v) for v in copy.weights} & {id(v) for v in model.weights}


CONV2D = [
    {"slices": 1, "rank": 5},
    {"slices": 2, "rank": 3, "strides": 2, "padding": "same"},
    {"slices": 4, "rank": 2, "dilation_rate": (1, 2), "activation": "relu"},
    {"slices": 4, "rank": 1, "strides": (1, 2), "use_bias": False},
    {"slices": 8, "rank": 2, "padding": "same", "strides": 2},
    {"slices": 8, "rank": 1, "strides": (2, 1)},
    {"slices": 8, "rank": 2, "dilation_rate": 2, "padding": "same"},
]


@pytest.mark.parametrize("options", CONV2D, ids=str)
def test_conv2d(keras_module: ModuleType, options: dict[str, Any]):
    layer = factorized(keras_module).FactorizedConv2D(6, (3, 2), name="conv", **options)
    model = single(keras_module, (9, 10, 8), layer)
    stock = assert_expanded(model, zoo.examples(model))
    encoder, decoder = stock.get_layer("conv_encoder"), stock.get_layer("conv")
    depthwise = options["slices"] == 8 and options.get("strides") != (2, 1)
    assert type(encoder).__name__ == ("DepthwiseConv2D" if depthwise else "Conv2D")
    assert not encoder.use_bias
    assert tuple(decoder.kernel_size) == (1, 1)
    if depthwise:
        assert encoder.depth_multiplier == options["rank"]
    else:
        assert encoder.groups == options["slices"]


@pytest.mark.parametrize(
    "options",
    [
        {"slices": 1, "rank": 4, "strides": 2},
        {"slices": 2, "rank": 3, "padding": "causal", "dilation_rate": 2},
        {"slices": 8, "rank": 1, "padding": "same", "activation": "tanh"},
    ],
    ids=str,
)
def test_conv1d(keras_module: ModuleType, options: dict[str, Any]):
    layer = factorized(keras_module).FactorizedConv1D(6, 3, name="conv", **options)
    model = single(keras_module, (13, 8), layer)
    stock = assert_expanded(model, zoo.examples(model))
    assert stock.get_layer("conv_encoder").groups == options["slices"]


@pytest.mark.parametrize("slices", [1, 2, 8])
@pytest.mark.parametrize(
    "shape", [(8,), (5, 8), (None, 8), (None, None, 8), (2, 3, 4, 8), (2, None, 3, 8)], ids=str
)
def test_dense(keras_module: ModuleType, slices: int, shape: tuple[int | None, ...]):
    layer = factorized(keras_module).FactorizedDense(
        6, slices=slices, rank=1, activation="tanh", name="dense"
    )
    model = single(keras_module, shape, layer)
    x = np.random.default_rng(0).standard_normal((3, *(n or 4 for n in shape))).astype("float32")
    stock = assert_expanded(model, x)
    assert stock.count_params() == model.count_params()
    kinds = [type(layer).__name__ for layer in stock.layers[1:]]
    if slices == 1:
        assert kinds == ["Dense", "Dense"]
    else:
        encoder = "DepthwiseConv2D" if slices == 8 else "Conv2D"
        middle = [encoder] if len(shape) == 3 else ["Reshape", encoder, "Reshape"]
        assert kinds == [*middle, "Dense"]
    assert tuple(stock.output_shape) == tuple(model.output_shape)


def test_dense_where_no_reshape_can_go(keras_module: ModuleType):
    layer = factorized(keras_module).FactorizedDense(6, slices=2, rank=2, name="dense")
    model = single(keras_module, (None, None, None, 8), layer)
    x = np.random.default_rng(0).standard_normal((3, 2, 3, 4, 8)).astype("float32")
    with pytest.warns(UserWarning, match="'dense' becomes one Dense layer that stores its zeros"):
        assert_expanded(model, x)


def test_masks_pass_through(keras_module: ModuleType):
    K, L = keras_module, keras_module.layers
    inputs = K.Input((None, 8))
    x = L.Masking()(inputs)
    x = factorized(K).FactorizedDense(8, slices=2, rank=3, name="dense")(x)
    model = K.Model(inputs, L.LSTM(3, name="lstm")(x))
    randomize(model)
    x = np.random.default_rng(0).standard_normal((2, 6, 8)).astype("float32")
    x[0, 4:] = 0
    with pytest.warns(UserWarning, match="a mask, .* or several unknown sizes"):
        stock = assert_expanded(model, x)
    # The padded steps are still left out.
    padded, cut = zoo.outputs(stock, x[:1]), zoo.outputs(stock, x[:1, :4])
    np.testing.assert_allclose(padded, cut, rtol=0, atol=1e-6)


def test_a_shared_layer_stays_shared_over_input_ranks(keras_module: ModuleType):
    K = keras_module
    dense = factorized(K).FactorizedDense(8, slices=2, rank=3, name="dense")
    a, b = K.Input((8,), name="a"), K.Input((5, 8), name="b")
    model = K.Model([a, b], [dense(dense(a)), dense(b)])
    randomize(model)
    stock = assert_expanded(model, zoo.examples(model))
    assert stock.count_params() == model.count_params()


def test_operations_between_layers(keras_module: ModuleType):
    K, L = keras_module, keras_module.layers
    inputs = K.Input((6, 8), name="x")
    dense = factorized(K).FactorizedDense(8, slices=2, rank=3, name="dense")
    x = dense(inputs) * 2.0 + inputs
    x = L.MultiHeadAttention(2, 4, name="attention")(x[:, 1:], x)
    model = K.Model({"x": inputs}, {"y": L.Dense(2, name="y")(x), "z": x})
    randomize(model)
    x = {"x": np.random.default_rng(0).standard_normal((2, 6, 8)).astype("float32")}
    stock = keras_alds.expand(model)
    before, after = model(x), stock(x)
    assert set(after) == {"y", "z"}
    for key in after:
        np.testing.assert_allclose(after[key], before[key], rtol=0, atol=1e-5)


def test_settings_are_kept(keras_module: ModuleType):
    K = keras_module
    F = factorized(K)
    inputs = K.Input((8, 8, 8))
    x = F.FactorizedConv2D(
        8,
        3,
        slices=8,
        rank=1,
        name="conv",
        encoder_regularizer="l2",
        encoder_constraint=K.constraints.MaxNorm(2.0, axis=[0, 1, 2]),
        bias_regularizer="l1",
        activity_regularizer="l2",
        trainable=False,
    )(inputs)
    x = K.layers.GlobalAveragePooling2D()(x)
    x = F.FactorizedDense(4, slices=2, rank=2, name="dense", decoder_constraint="non_neg")(x)
    model = K.Model(inputs, x)
    randomize(model)
    stock = assert_expanded(model, zoo.examples(model))
    encoder, decoder = stock.get_layer("conv_encoder"), stock.get_layer("conv")
    assert type(encoder).__name__ == "Conv2D"  # the constraint's axes are those of this kernel
    assert encoder.kernel_regularizer is not None
    assert encoder.kernel_constraint is not None
    assert decoder.bias_regularizer is not None
    assert decoder.activity_regularizer is not None
    assert decoder.kernel_regularizer is None
    assert not encoder.trainable
    assert not decoder.trainable
    assert stock.get_layer("dense").kernel_constraint is not None
    assert len(stock.trainable_weights) == 3
    x = zoo.examples(model)
    model(x)
    stock(x)
    np.testing.assert_allclose(
        float(sum(model.losses)), float(sum(stock.losses)), rtol=1e-5, atol=1e-6
    )


def test_frozen_models_and_their_parts_stay_frozen(keras_module: ModuleType):
    model = keras_alds.compress(zoo.nested(keras_module), 0.4)
    model.get_layer("middle").trainable = False
    stock = keras_alds.expand(model)
    assert len(stock.trainable_weights) == len(model.trainable_weights)
    assert not stock.get_layer("middle").trainable
    assert len(stock.weights) == len(model.weights)


def test_dtype_policies(keras_module: ModuleType):
    layer = factorized(keras_module).FactorizedConv2D(
        6, 3, slices=2, rank=3, name="conv", dtype="mixed_bfloat16"
    )
    model = single(keras_module, (9, 9, 8), layer)
    stock = keras_alds.expand(model)
    x = zoo.examples(model)
    for name in ("conv_encoder", "conv"):
        assert stock.get_layer(name).compute_dtype == "bfloat16"
        assert stock.get_layer(name).variable_dtype == "float32"
    before, after = model(x), stock(x)
    assert before.dtype == after.dtype == tf.bfloat16
    before, after = np.asarray(before, np.float32), np.asarray(after, np.float32)
    np.testing.assert_allclose(after, before, rtol=0, atol=0.02 * np.abs(before).max())


def test_compile_state_and_training(keras_module: ModuleType):
    K = keras_module
    model = keras_alds.compress(zoo.functional(K), 0.4, max_slices=1)
    loss = K.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(K.optimizers.SGD(0.05, momentum=0.9), loss, metrics=["accuracy"])
    x, y = zoo.images()
    stock = keras_alds.expand(model)
    assert type(stock.optimizer) is type(model.optimizer)
    assert stock.optimizer is not model.optimizer
    assert abs(float(stock.optimizer.momentum) - 0.9) < 1e-6
    before, after = (m.evaluate(x, y, verbose=0) for m in (model, stock))
    np.testing.assert_allclose(after, before, atol=1e-5)
    history = stock.fit(x, y, epochs=8, verbose=0).history["loss"]
    assert history[-1] < history[0]


def test_compiled_models_with_another_number_of_weights(keras_module: ModuleType):
    K = keras_module
    L = K.layers
    images = [L.Conv2D(16, 3, use_bias=False, name="conv"), L.BatchNormalization(name="norm")]
    vectors = [L.Bidirectional(L.GRU(16), name="both")]
    for shape, layers, options in (
        ((8, 8, 8), [*images, L.Flatten()], {"fold_batch_norm": True}),
        ((6, 16), [L.LSTM(16, return_sequences=True, name="first"), L.LSTM(16)], {}),
        ((6, 16), vectors, {}),
    ):
        model = K.Sequential([K.Input(shape), *layers, L.Dense(8, name="last"), L.Dense(3)])
        model.compile("adam", "mse", run_eagerly=True)
        small = keras_alds.compress(model, 0.5)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gets dense kernels")
            stock = keras_alds.expand(small, **options)
        assert len(stock.weights) != len(small.weights)
        x = zoo.examples(small)
        np.testing.assert_allclose(zoo.outputs(stock, x), zoo.outputs(small, x), atol=1e-4)
        stock.fit(x, small.predict(x, verbose=0), verbose=0)


@pytest.mark.parametrize("fold", [False, True])
def test_weights_that_are_not_decayed(keras_module: ModuleType, fold: bool):
    K = keras_module
    L = K.layers
    conv = L.Conv2D(16, 3, use_bias=False, name="conv")
    layers = [conv, L.BatchNormalization(name="norm"), L.Flatten(), L.Dense(8, name="last")]
    model = K.Sequential([K.Input((8, 8, 8)), *layers])
    optimizer = K.optimizers.AdamW(1e-3)
    excluded = [model.get_layer("norm").beta, model.get_layer("last").kernel]
    optimizer.exclude_from_weight_decay(var_list=excluded)
    model.compile(optimizer, "mse")
    small = keras_alds.compress(model, 0.3, exclude="conv")
    stock = keras_alds.expand(small, fold_batch_norm=fold)
    backend = backend_of(stock)
    found = {
        (layer.name, name)
        for layer in stock.layers
        for name in ("kernel", "bias", "gamma", "beta")
        if getattr(layer, name, None) is not None
        and backend.is_excluded_from_weight_decay(stock.optimizer, getattr(layer, name))
    }
    bias = ("conv", "bias") if fold else ("norm", "beta")
    assert found == {bias, ("last_encoder", "kernel"), ("last", "kernel")}


def test_custom_train_step_is_kept(keras_module: ModuleType):
    K = keras_module

    class Custom(K.Model):  # type: ignore[name-defined,misc]
        def train_step(self, data: Any) -> dict[str, Any]:
            return {**super().train_step(data), "mine": 1.0}

    base = zoo.functional(K)
    model = keras_alds.compress(Custom(base.inputs, base.outputs), 0.4, max_slices=1)
    model.compile("sgd", "mse")
    stock = keras_alds.expand(model)
    assert type(stock) is Custom
    x, _ = zoo.images(8)
    assert stock.fit(x, np.zeros((8, 10)), verbose=0).history["mine"] == [1.0]


def test_normalization_keeps_its_statistics(keras_module: ModuleType):
    K = keras_module
    x = np.random.default_rng(0).normal(3.0, 2.0, (32, 8)).astype("float32")
    normalization = K.layers.Normalization()
    normalization.adapt(x)
    dense = factorized(K).FactorizedDense(4, slices=2, rank=2)
    model = K.Sequential([K.Input((8,)), normalization, dense])
    assert_expanded(model, x)


LOADER = """
import json, os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.modules["keras_alds"] = None  # as if it were not installed
import importlib
import numpy as np
import tensorflow as tf
for name, kind in json.loads(sys.argv[1]):
    keras = importlib.import_module(kind)
    model = keras.models.load_model(name, compile=False)
    data = np.load(name + ".npz")
    inputs = [data[f"x{i}"] for i in range(len(model.inputs))]
    outputs = tf.nest.flatten(model(inputs if len(inputs) > 1 else inputs[0], training=False))
    flat = np.concatenate([np.ravel(np.asarray(y)) for y in outputs])
    np.testing.assert_allclose(flat, data["y"], rtol=0, atol=1e-5)
    print("ok", name)
"""


def test_loads_without_this_package(tmp_path: Path):
    """One process loads the models of Keras 3 and of tf_keras."""
    saved = []
    for keras_module, name in itertools.product(zoo.KERASES, SYMBOLIC):
        small = keras_alds.compress(zoo.MODELS[name](keras_module), 0.4)
        stock = keras_alds.expand(small)
        inputs = zoo.examples(stock)
        arrays = inputs if isinstance(inputs, list) else [inputs]
        # .h5 refuses equal names at two levels, the original's as well.
        old = keras_module.__name__ == "tf_keras" and name != "nested"
        for ending in ("keras", "h5") if old else ("keras",):
            path = f"{keras_module.__name__}_{name}.{ending}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of .h5 being old
                stock.save(tmp_path / path)
            np.savez(
                tmp_path / f"{path}.npz",
                y=zoo.outputs(small, inputs),
                **{f"x{i}": array for i, array in enumerate(arrays)},
            )
            saved.append((path, keras_module.__name__))
    run = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps(saved)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == [word for name, _ in saved for word in ("ok", name)]


def test_converts_to_tflite_with_built_in_operations_only(keras_module: ModuleType, tmp_path: Path):
    small = keras_alds.compress(zoo.functional(keras_module), 0.4)
    stock = keras_alds.expand(small)
    stock.export(tmp_path)
    file = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path)).convert()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the interpreter's move to another package
        interpreter = tf.lite.Interpreter(model_content=file)
    x = zoo.examples(small, 1)
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(y, small(x, training=False), rtol=0, atol=1e-4)


def test_what_cannot_be_kept_is_said(keras_module: ModuleType):
    K, dense = keras_module, factorized(keras_module).FactorizedDense(4, slices=2, rank=2)

    class Own(K.Model):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            inputs = K.Input((8,))
            super().__init__(inputs, dense(inputs))

    model = Own()
    with pytest.warns(UserWarning, match="Own has its own constructor"):
        assert_expanded(model, zoo.examples(model))


def test_added_losses_are_said_to_be_left_out():
    K = pytest.importorskip("tf_keras")
    inputs = K.Input((8,))
    x = factorized(K).FactorizedDense(4, slices=2, rank=2)(inputs)
    model = K.Model(inputs, x)
    model.add_loss(tf.reduce_mean(x))
    with pytest.warns(UserWarning, match="`add_metric` are not copied"):
        assert_expanded(model, zoo.examples(model))


def test_channels_first(keras_module: ModuleType):
    layer = factorized(keras_module).FactorizedConv2D(
        6, 3, slices=2, rank=3, data_format="channels_first", name="conv"
    )
    model = single(keras_module, (8, 9, 10), layer)
    stock = assert_expanded(model, zoo.examples(model))
    assert stock.get_layer("conv").data_format == "channels_first"


# -- What is refused -----------------------------------------------------------------------------


def test_subclassed_models_are_refused_with_a_way_out(keras_module: ModuleType):
    small = keras_alds.compress(zoo.subclassed(keras_module), 0.4)
    with pytest.raises(ValueError, match=r"make it functional .*`model\.export`"):
        keras_alds.expand(small)


def test_a_subclassed_part_is_named(keras_module: ModuleType):
    K = keras_module
    part = zoo.subclass(K)(width=16)
    inputs = K.Input(zoo.IMAGE)
    model = K.Model(inputs, part(inputs))
    keras_alds.apply_plan(model, keras_alds.select(model, 0.4))
    with pytest.raises(ValueError, match=f"Received: '{part.name}' of type Net"):
        keras_alds.expand(model)


def test_a_model_that_was_never_called_is_refused(keras_module: ModuleType):
    with pytest.raises(ValueError, match="Expected a built Sequential model"):
        keras_alds.expand(keras_module.Sequential([keras_module.layers.Dense(3)]))
    with pytest.raises(ValueError, match="Expected `model` to be a built"):
        keras_alds.expand("model.keras")


# -- BatchNormalization --------------------------------------------------------------------------


def normalized(K: ModuleType) -> Any:
    """Every place where a BatchNormalization is folded, and none where it is not."""
    L, F = K.layers, factorized(K)
    inputs = K.Input((8, 8, 8))
    x = F.FactorizedConv2D(8, 3, slices=2, rank=3, name="factorized", use_bias=False)(inputs)
    x = L.BatchNormalization(name="bn_factorized", scale=False)(x)
    x = L.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    x = L.BatchNormalization(name="bn_depthwise", center=False)(x)
    x = L.ReLU()(x)
    x = L.SeparableConv2D(6, 1, name="separable", use_bias=False)(x)
    x = L.BatchNormalization(name="bn_separable", epsilon=0.1)(x)
    x = L.Conv2DTranspose(5, 2, strides=2, name="transposed")(x)
    x = L.BatchNormalization(name="bn_transposed")(x)
    inner = K.Sequential(
        [
            K.Input((8, 8, 5)),
            L.Conv2D(4, 3, name="stock"),
            L.BatchNormalization(name="bn_stock"),
        ],
        name="inner",
    )
    x = L.Flatten()(inner(x))
    x = F.FactorizedDense(8, slices=2, rank=2, name="dense")(x)
    x = L.BatchNormalization(name="bn_dense")(x)
    model = K.Model(inputs, L.Activation("tanh", name="out")(x))
    randomize(model)
    return model


def test_batch_norm_is_folded(keras_module: ModuleType):
    model = normalized(keras_module)
    x = zoo.examples(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*not folded")
        stock = keras_alds.expand(model, fold_batch_norm=True)
    kinds = {type(layer).__name__ for layer in stock._flatten_layers()}
    assert "BatchNormalization" not in kinds
    np.testing.assert_allclose(zoo.outputs(stock, x), zoo.outputs(model, x), rtol=0, atol=1e-4)
    assert stock.get_layer("factorized").use_bias
    unfolded = keras_alds.expand(model)
    assert sum(type(la).__name__ == "BatchNormalization" for la in unfolded._flatten_layers()) == 6


def test_batch_norm_that_stays_is_named_with_the_reason(keras_module: ModuleType):
    K, L = keras_module, keras_module.layers
    inputs = K.Input((8, 8, 4))
    x = L.BatchNormalization(name="first")(inputs)
    active = L.Conv2D(4, 3, activation="relu", name="active")(x)
    x = L.BatchNormalization(name="behind")(active)
    used_twice = L.Conv2D(4, 1, name="branching")(x)
    x = L.Add()([used_twice, L.BatchNormalization(name="branch")(used_twice)])
    shared = L.Conv2D(4, 1, name="shared")
    x = L.BatchNormalization(name="of_shared")(shared(shared(x)))
    x = L.BatchNormalization(name="of_axis", axis=1)(L.Conv2D(4, 1, name="conv")(x))
    x = L.BatchNormalization(name="of_output")(L.Dense(4, name="dense")(x))
    model = K.Model(inputs, x)
    randomize(model)
    with pytest.warns(UserWarning, match="6 of 6 BatchNormalization layers are not") as record:
        stock = keras_alds.expand(model, fold_batch_norm=True)
    text = str(next(w.message for w in record if "not folded" in str(w.message)))
    for part in (
        r"'behind': 'active' before it has an activation",
        r"'branch': the output of 'branching' before it is used elsewhere too",
        r"'of_shared': it or 'shared' before it is called several times",
        r"'of_axis': it normalizes axis 1, which does not hold the channels",
        r"'of_output': the model returns its output",
    ):
        assert part in text
    assert "'first': " in text
    x = zoo.examples(model)
    np.testing.assert_allclose(zoo.outputs(stock, x), zoo.outputs(model, x), rtol=0, atol=1e-5)


def ones(shape, dtype=None, **kwargs):
    return tf.ones(shape, dtype)


def test_functions_as_initializers(keras_module: ModuleType):
    K = keras_module
    layer = factorized(K).FactorizedConv2D(
        4, 3, slices=2, rank=2, encoder_initializer=ones, decoder_initializer="ones"
    )
    model = K.Sequential([K.Input((8, 8, 6)), layer])
    stock = keras_alds.expand(model)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 6)).astype("float32")
    np.testing.assert_allclose(
        stock.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("frozen", ["conv", "norm"])
def test_a_folded_bias_is_trained_if_its_layer_is(keras_module: ModuleType, frozen: str):
    L = keras_module.layers
    model = keras_module.Sequential(
        [
            keras_module.Input((8, 8, 6)),
            L.Conv2D(16, 3, use_bias=False, name="conv"),
            L.BatchNormalization(name="norm"),
            L.ReLU(),
        ]
    )
    model.get_layer(frozen).trainable = False
    small = keras_alds.compress(model, 0.3, method="alds", max_slices=1)
    small.get_layer("conv").trainable = frozen != "conv"
    stock = keras_alds.expand(small, fold_batch_norm=True)
    conv = stock.get_layer("conv")
    assert len(conv.weights) == 2
    assert len(conv.trainable_weights) == len(stock.trainable_weights) - len(
        stock.get_layer("conv_encoder").trainable_weights
    )
    assert len(conv.trainable_weights) == (0 if frozen == "conv" else 2)
