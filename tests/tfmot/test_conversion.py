"""`to_tf_keras`: equal outputs, everything kept, and all that cannot be carried over is named."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import zoo

import keras_alds

tf_keras = pytest.importorskip("tf_keras")
L = keras.layers
ROOT = Path(__file__).resolve().parents[2]
SYMBOLIC = [name for name in zoo.MODELS if name != "subclassed"]


def randomize(model: Any) -> None:
    """Values for every weight that make a forgotten or swapped one show."""
    rng = np.random.default_rng(3)

    def values(old: np.ndarray) -> np.ndarray:
        if not np.issubdtype(old.dtype, np.floating):
            return old
        if old.ndim > 1:
            return rng.standard_normal(old.shape, "float32") / np.sqrt(max(1, old[..., 0].size))
        return rng.uniform(0.5, 1.5, old.shape)  # variances have to be positive

    model.set_weights([values(old) for old in model.get_weights()])


def converted(model: Any, inputs: Any = None, *, tolerance: float = 1e-5) -> Any:
    """Converts a model with random weights, and compares the outputs."""
    randomize(model)
    inputs = zoo.examples(model) if inputs is None else inputs
    before = zoo.outputs(model, inputs)
    new = keras_alds.to_tf_keras(model)
    assert isinstance(new, tf_keras.Model)
    assert all(isinstance(layer, tf_keras.layers.Layer) for layer in new._flatten_layers())
    scale = max(1.0, float(np.abs(before).max()))
    np.testing.assert_allclose(zoo.outputs(new, inputs), before, rtol=0, atol=tolerance * scale)
    assert new.count_params() == model.count_params()
    return new


def one(shape: tuple[int | None, ...], *layers: Any) -> Any:
    inputs = x = keras.Input(shape)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


# -- Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "factorized", "stock"])
@pytest.mark.parametrize("name", SYMBOLIC)
def test_every_kind_of_model(name: str, form: str):
    model = zoo.MODELS[name](keras)
    if form != "dense":
        model = keras_alds.compress(model, 0.4)
    if form == "stock":
        model = keras_alds.expand(model)
    new = converted(model)
    assert new.name == model.name
    assert isinstance(new, tf_keras.Sequential) == isinstance(model, keras.Sequential)
    names = [layer.name for layer in model._flatten_layers() if not isinstance(layer, L.InputLayer)]
    for layer in new._flatten_layers():
        if not isinstance(layer, tf_keras.layers.InputLayer):
            assert layer.name in names


def test_structures_of_inputs_and_outputs():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    model = keras.Model({"a": a, "b": b}, {"sum": L.Add(name="sum")([a, b]), "a2": L.Dense(2)(a)})
    x = {key: np.random.default_rng(0).random((3, 4), "float32") for key in "ab"}
    new = converted(model, x)
    assert set(new(x)) == {"sum", "a2"}


def test_saves_and_trains(tmp_path: Any):
    model = zoo.functional(keras)
    new = converted(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of .h5 being old
        new.save(tmp_path / "model.h5")
    loaded = tf_keras.models.load_model(tmp_path / "model.h5", compile=False)
    x, y = zoo.images(32)
    np.testing.assert_array_equal(zoo.outputs(loaded, x), zoo.outputs(new, x))
    new.compile("adam", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = new.fit(x, y, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_dropout_is_active_in_training():
    # Keras 3 records `training` in the graph for some layers; tf_keras must not take it over.
    model = one((6, 8), L.LSTM(16, dropout=0.5), L.Dropout(0.5))
    new = converted(model)
    x = zoo.examples(model)
    assert np.abs(np.asarray(new(x, training=True)) - np.asarray(new(x))).max() > 1e-3


# -- Layers --------------------------------------------------------------------------------------

IMAGE = (8, 8, 4)
LAYERS: dict[str, tuple[tuple[int | None, ...], Callable[[], list[Any]]]] = {
    "batch_norm": (IMAGE, lambda: [L.BatchNormalization(epsilon=0.01, scale=False)]),
    "layer_norm": (IMAGE, lambda: [L.LayerNormalization(axis=-1, epsilon=0.1)]),
    "group_norm": (IMAGE, lambda: [L.GroupNormalization(2)]),
    "unit_norm": (IMAGE, lambda: [L.UnitNormalization()]),
    "relu": (IMAGE, lambda: [L.ReLU(max_value=1.0, negative_slope=0.1, threshold=0.2)]),
    "leaky_relu": (IMAGE, lambda: [L.LeakyReLU(negative_slope=0.05)]),
    "prelu": (IMAGE, lambda: [L.PReLU(shared_axes=[1, 2])]),
    "elu": (IMAGE, lambda: [L.ELU(alpha=0.5)]),
    "softmax": (IMAGE, lambda: [L.Softmax(axis=1)]),
    "rescaling": (IMAGE, lambda: [L.Rescaling(1 / 127.5, offset=-1)]),
    "pooling": (
        IMAGE,
        lambda: [L.MaxPooling2D(2, 1, "same"), L.AveragePooling2D(3, 2, padding="same")],
    ),
    "global_pooling": (IMAGE, lambda: [L.GlobalAveragePooling2D(keepdims=True)]),
    "global_max": (IMAGE, lambda: [L.GlobalMaxPooling2D()]),
    "padding": (
        IMAGE,
        lambda: [L.ZeroPadding2D(((0, 1), (2, 3))), L.Cropping2D(((1, 0), (0, 1)))],
    ),
    "padding_1d": ((6, 4), lambda: [L.ZeroPadding1D(2), L.Cropping1D(1)]),
    "up_sampling": (IMAGE, lambda: [L.UpSampling2D(2, interpolation="bilinear")]),
    "resizing": (IMAGE, lambda: [L.Resizing(5, 11)]),
    "center_crop": (IMAGE, lambda: [L.CenterCrop(4, 6)]),
    "depthwise": (IMAGE, lambda: [L.DepthwiseConv2D(3, depth_multiplier=2, activation="silu")]),
    "separable": (IMAGE, lambda: [L.SeparableConv2D(6, 3, strides=2, padding="same")]),
    "transposed": (IMAGE, lambda: [L.Conv2DTranspose(6, 3, strides=2, padding="same")]),
    "grouped": (IMAGE, lambda: [L.Conv2D(6, 3, groups=2, activation="gelu")]),
    "conv_3d": ((5, 6, 7, 2), lambda: [L.Conv3D(3, 2), L.MaxPooling3D(2)]),
    "conv_1d": ((9, 4), lambda: [L.Conv1D(6, 3, padding="causal"), L.GlobalMaxPooling1D()]),
    "reshape": (IMAGE, lambda: [L.Reshape((16, -1)), L.Permute((2, 1)), L.Flatten()]),
    "repeat": ((4,), lambda: [L.RepeatVector(3)]),
    "einsum_dense": ((6, 4), lambda: [L.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d")]),
    "lstm": ((6, 4), lambda: [L.LSTM(5, return_sequences=True), L.GRU(3), L.Dropout(0.2)]),
    "rnn": ((6, 4), lambda: [L.RNN([L.LSTMCell(5), L.GRUCell(3)])]),
    "simple_rnn": ((6, 4), lambda: [L.SimpleRNN(5)]),
    "bidirectional": ((6, 4), lambda: [L.Bidirectional(L.LSTM(3), merge_mode="ave")]),
    "time_distributed": (
        (3, *IMAGE),
        lambda: [
            L.TimeDistributed(keras.Sequential([keras.Input(IMAGE), L.Conv2D(3, 3), L.Flatten()]))
        ],
    ),
    "masking": ((6, 4), lambda: [L.Masking(), L.LSTM(3)]),
    "hard_sigmoid": (IMAGE, lambda: [L.Conv2D(3, 3, activation="hard_sigmoid")]),
    "hard_silu": (IMAGE, lambda: [L.Activation("hard_silu"), L.Dense(3, activation="hard_swish")]),
    "activation_layer": (IMAGE, lambda: [L.Dense(3, activation=L.LeakyReLU(negative_slope=0.3))]),
    "noise": (IMAGE, lambda: [L.GaussianNoise(0.1), L.SpatialDropout2D(0.2)]),
    "augmentation": (
        IMAGE,
        lambda: [L.RandomFlip(seed=1), L.RandomRotation(0.1), L.RandomZoom(0.1)],
    ),
    "identity": (IMAGE, lambda: [L.Identity(), L.ActivityRegularization(l2=0.1)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str):
    shape, make = LAYERS[name]
    model = one(shape, *make())
    x = np.random.default_rng(0).standard_normal((3, *shape)).astype("float32") * 3
    if name == "masking":
        x[0, 4:] = 0
    new = converted(model, x)
    config = new.get_config()
    assert type(new).from_config(config).count_params() == new.count_params()


def test_embedding_with_a_mask():
    x = np.random.default_rng(0).integers(0, 3, (4, 6))
    model = one((6,), L.Embedding(3, 5, mask_zero=True), L.GRU(3))
    converted(model, x)


def test_normalization_keeps_its_statistics():
    x = np.random.default_rng(0).normal(3.0, 2.0, (32, 8)).astype("float32")
    normalization = L.Normalization()
    normalization.adapt(x)
    model = one((8,), normalization)
    new = keras_alds.to_tf_keras(model)
    np.testing.assert_allclose(zoo.outputs(new, x), zoo.outputs(model, x), atol=1e-5)
    assert abs(float(np.mean(np.asarray(new(x))))) < 1e-3


def test_attention():
    a, b = keras.Input((6, 8)), keras.Input((5, 8))
    x = L.MultiHeadAttention(2, 4)(a, b, b)
    y = L.Attention(use_scale=True)([a, b])
    converted(keras.Model([a, b], [x, L.AdditiveAttention()([x, y])]))


def test_merging_layers():
    a, b = keras.Input((6, 8)), keras.Input((6, 8))
    outputs = [
        getattr(L, name)()([a, b])
        for name in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum")
    ]
    outputs += [L.Concatenate(axis=1)([a, b]), L.Dot(axes=2, normalize=True)([a, b])]
    converted(keras.Model([a, b], outputs))


def test_operations_become_stock_layers_where_there_are():
    a, b = keras.Input((6, 8)), keras.Input((6, 8))
    x = keras.ops.relu((a / 2.0 - 1) * 3 + b)
    x = 1.0 - keras.ops.concatenate([x, a * b], axis=-1)
    new = converted(keras.Model([a, b], x))
    kinds = {type(layer).__name__ for layer in new.layers}
    assert kinds == {
        "InputLayer", "Rescaling", "Add", "Activation", "Multiply", "Concatenate"
    }  # fmt: skip


def test_other_operations():
    ops = keras.ops
    a, b = keras.Input((6, 8)), keras.Input((6, 8))
    x = ops.matmul(ops.transpose(a, (0, 2, 1)), b)
    outputs = [
        ops.mean(x, axis=1, keepdims=True),
        ops.sum(a, axis=-1),
        ops.sqrt(ops.square(a) + 1.0),
        ops.softmax(b, axis=1),
        ops.reshape(a, (-1, 48)),
        ops.squeeze(ops.expand_dims(b, 1), 1)[:, 1:, ::2],
        ops.clip(a, -0.5, 0.5) ** 2,
        1.0 / (ops.exp(a) + 1.0),
        ops.maximum(a, 0.1),
        ops.cast(a, "float16"),
        -ops.abs(b),
        ops.stack([a, b], axis=1),
    ]
    converted(keras.Model([a, b], outputs))


def test_settings_are_kept():
    conv = L.Conv2D(
        6,
        3,
        kernel_regularizer=keras.regularizers.L1L2(0.1, 0.2),
        bias_regularizer="l2",
        kernel_constraint=keras.constraints.MaxNorm(2.0, axis=[0, 1, 2]),
        kernel_initializer=keras.initializers.VarianceScaling(2.0, seed=3),
        name="conv",
    )
    frozen = L.Conv2D(4, 1, trainable=False, name="frozen")
    half = L.Conv2D(3, 1, dtype="mixed_bfloat16", name="half")
    model = one(IMAGE, conv, frozen, half, L.Activation("relu", activity_regularizer="l2"))
    new = converted(model, tolerance=1e-2)
    layer = new.get_layer("conv")
    assert layer.kernel_constraint.max_value == 2.0
    assert layer.kernel_initializer.scale == 2.0
    assert new.get_layer("half").compute_dtype == "bfloat16"
    assert not new.get_layer("frozen").trainable
    assert len(new.trainable_weights) == 4
    assert new.layers[-1].activity_regularizer is not None
    expected = float(sum(regularizer() for regularizer in layer._callable_losses))
    kernel, bias = (np.asarray(v) for v in layer.weights)
    assert abs(expected - penalty(kernel, bias)) < 1e-3


def penalty(kernel: np.ndarray, bias: np.ndarray) -> float:
    return float(0.1 * np.abs(kernel).sum() + 0.2 * (kernel**2).sum() + 0.01 * (bias**2).sum())


# -- Compile state -------------------------------------------------------------------------------


def test_compile_state():
    model = zoo.functional(keras)
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    model.compile(
        keras.optimizers.AdamW(schedule, beta_1=0.8, weight_decay=0.01, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(3, name="top3")],
    )
    new = keras_alds.to_tf_keras(model)
    optimizer = new.optimizer
    assert type(optimizer) is tf_keras.optimizers.AdamW
    assert optimizer.beta_1 == 0.8
    assert optimizer.clipnorm == 1.0
    assert type(optimizer._learning_rate).__name__ == "CosineDecay"
    x, y = zoo.images()
    before = model.evaluate(x, y, verbose=0, return_dict=True)
    after = new.evaluate(x, y, verbose=0, return_dict=True)
    assert set(after) == set(before) == {"loss", "accuracy", "top3"}
    np.testing.assert_allclose([after[k] for k in before], list(before.values()), atol=1e-5)


def test_compile_state_that_tf_keras_lacks_gives_a_warning():
    model = zoo.functional(keras)
    model.compile(keras.optimizers.Lamb(), "mse")
    with pytest.warns(UserWarning, match="is not compiled, because .*tf_keras has no Lamb"):
        new = keras_alds.to_tf_keras(model)
    assert not new._is_compiled


# -- What is refused -----------------------------------------------------------------------------


def test_all_that_cannot_be_carried_over_is_named():
    @keras.saving.register_keras_serializable(package="test_to_tf_keras")
    class Mine(L.Layer):
        def call(self, x: Any) -> Any:
            return x

    inputs = keras.Input((8, 8))
    x = Mine(name="mine")(inputs)
    x = L.RMSNormalization(name="rms")(x)

    class Own(keras.regularizers.L2):
        pass

    x = L.Dense(8, kernel_regularizer=Own(0.1), name="own")(x)
    inner = keras.Sequential([keras.Input((8, 8)), L.Dense(8, "celu", name="celu")])
    x = keras.ops.erf(L.Lambda(lambda x: x * 2, name="function")(inner(x)))
    model = keras.Model(inputs, L.Dense(3, name="fine")(x))
    with pytest.raises(ValueError, match="6 that cannot be converted") as error:
        keras_alds.to_tf_keras(model)
    for part in ("'mine' (Mine)", "'rms' (RMSN", "'celu' (Dense)", "'function' (Lam", "(Erf)"):
        assert part in str(error.value)
    assert "its kernel_regularizer Own is not in tf_keras" in str(error.value)
    assert "'fine'" not in str(error.value)


def test_subclassed_models_are_refused():
    with pytest.raises(ValueError, match="a Functional or Sequential model for `to_tf_keras`"):
        keras_alds.to_tf_keras(zoo.subclassed(keras))


def test_tf_keras_models_are_refused():
    with pytest.raises(ValueError, match="which is a tf_keras model already"):
        keras_alds.to_tf_keras(zoo.functional(tf_keras))


def test_without_tf_keras_the_error_names_the_remedy():
    code = """
import sys
sys.modules["tf_keras"] = None
import keras, keras_alds
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
assert "keras_alds.tfmot.conversion" not in sys.modules  # imported when it is used
try:
    keras_alds.to_tf_keras(model)
except ImportError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert 'pip install "keras_alds[tf_keras]"' in run.stdout


# -- keras.applications --------------------------------------------------------------------------

APPLICATIONS = [
    name
    for name, value in vars(keras.applications).items()
    if inspect.isfunction(value) and name[0].isupper()
]
#: One of every family, in its smallest form.
FEW = (
    "ConvNeXtTiny", "DenseNet121", "EfficientNetB0", "EfficientNetV2B0", "InceptionResNetV2",
    "InceptionV3", "MobileNet", "MobileNetV2", "MobileNetV3Small", "NASNetMobile", "ResNet50",
    "ResNet50V2", "VGG16", "Xception",
)  # fmt: skip
#: Those with the most different layers, among the quick ones.
DIFFERENT = ("ConvNeXtTiny", "DenseNet121", "EfficientNetB0", "MobileNetV2", "MobileNetV3Small")


def application(name: str) -> Any:
    make = getattr(keras.applications, name)
    least = 75 if name.startswith(("Inception", "Xception")) else 32
    shape = (least, least, 3)
    return make(weights=None, include_top=False, input_shape=shape, pooling="avg")


@pytest.fixture
def float64() -> Iterator[None]:
    """Deep networks of random weights amplify float32's rounding without bound; not float64's."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(before)
    keras.backend.clear_session()


def check_outputs(name: str) -> None:
    model = application(name)
    randomize(model)
    x = np.random.default_rng(0).uniform(0, 255, (1, *model.input_shape[1:]))
    before = zoo.outputs(model, x)
    new = keras_alds.to_tf_keras(model)
    scale = np.abs(before).max()
    assert 0 < scale < np.inf
    np.testing.assert_allclose(zoo.outputs(new, x), before, rtol=0, atol=1e-5 * scale)
    stock = {cls for cls in vars(tf_keras.layers).values() if isinstance(cls, type)}
    models = {type(new), tf_keras.Sequential}
    assert {type(layer) for layer in new._flatten_layers()} <= stock | models


@pytest.mark.parametrize(
    "name",
    [name if name in DIFFERENT else pytest.param(name, marks=pytest.mark.long) for name in FEW],
)
@pytest.mark.usefixtures("float64")
def test_one_application_of_every_family(name: str):
    check_outputs(name)


def test_every_family_is_among_the_few():
    modules = {getattr(keras.applications, name).__module__ for name in APPLICATIONS}
    few = {getattr(keras.applications, name).__module__ for name in FEW}
    # VGG19 has a module of its own, and is VGG16 with three layers more.
    assert {name for name in modules if not name.endswith("vgg19")} == few
