"""Small models of every kind, made with the Keras that a test is given."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_alds
from keras_alds.core.slicing import convolution_unfolding, distinct_schemes, divisors, weights
from keras_alds.models.factorize import replacement
from keras_alds.models.inventory import LayerRecord, walk
from keras_alds.models.ranges import find_pairs
from keras_alds.plan import CompressionPlan, Skip
from keras_alds.resources import Cost
from keras_alds.targets import TARGETS

IMAGE = (12, 12, 3)
#: Keras 3 and tf_keras, as far as they are installed.
KERASES = [
    importlib.import_module(name)
    for name in ("keras", "tf_keras")
    if importlib.util.find_spec(name)
]


def functional(K: ModuleType) -> Any:
    L = K.layers
    inputs = K.Input(IMAGE)
    x = L.Conv2D(16, 3, padding="same", use_bias=False, name="stem")(inputs)
    x = L.BatchNormalization(name="bn")(x)
    x = L.ReLU(name="relu")(x)
    x = L.Conv2D(24, 3, strides=2, activation="relu", padding="same", name="down")(x)
    x = L.GlobalAveragePooling2D(name="pool")(x)
    x = L.Dense(32, activation="relu", name="hidden")(x)
    return K.Model(inputs, L.Dense(10, name="head")(x))


def sequential(K: ModuleType) -> Any:
    L = K.layers
    return K.Sequential(
        [
            K.Input(IMAGE),
            L.Conv2D(16, 3, name="conv"),
            L.Flatten(name="flat"),
            L.Dense(20, activation="relu", name="hidden"),
            L.Dense(10, name="head"),
        ]
    )


def sequential_built_by_a_call(K: ModuleType) -> Any:
    L = K.layers
    model = K.Sequential([L.Conv2D(16, 3), L.Flatten(), L.Dense(20, "relu"), L.Dense(10)])
    model(np.zeros((1, *IMAGE), "float32"))
    return model


def nested(K: ModuleType) -> Any:
    """Two levels, the inner model called twice, and equal names at two levels."""
    L = K.layers
    inner = K.Sequential(
        [
            K.Input((6, 6, 16)),
            L.Conv2D(16, 3, padding="same", name="conv"),
            L.Conv2D(16, 3, padding="same", name="conv_b"),
        ],
        name="inner",
    )
    inputs = K.Input(IMAGE)
    x = L.Conv2D(16, 3, strides=2, padding="same", name="conv")(inputs)
    middle = K.Model(inputs, inner(inner(x)), name="middle")
    inputs = K.Input(IMAGE)
    x = L.Flatten(name="flat")(middle(inputs))
    return K.Model(inputs, L.Dense(10, name="head")(x))


def shared(K: ModuleType) -> Any:
    """Two inputs, two outputs, and layers that are called several times."""
    L = K.layers
    a, b = K.Input((12, 12, 8), name="a"), K.Input((12, 12, 8), name="b")
    conv, dense = L.Conv2D(16, 3, name="conv"), L.Dense(16, name="dense")
    x = L.Concatenate(name="both")([conv(a), conv(b)])
    first = L.Dense(10, name="first")(L.GlobalAveragePooling2D(name="pool")(x))
    second = dense(dense(L.GlobalAveragePooling2D(name="pool_a")(conv(a))))
    return K.Model([a, b], [first, second])


def wrapped(K: ModuleType) -> Any:
    L = K.layers
    inputs = K.Input((5, *IMAGE))
    x = L.TimeDistributed(L.Conv2D(12, 3, name="conv"), name="frames")(inputs)
    x = L.TimeDistributed(L.Flatten(name="flat"), name="vectors")(x)
    x = L.TimeDistributed(L.Dense(16, name="dense"), name="features")(x)
    return K.Model(inputs, L.Dense(10, name="head")(L.LSTM(4, name="lstm")(x)))


def temporal(K: ModuleType) -> Any:
    L = K.layers
    inputs = K.Input((30, 8))
    x = L.Conv1D(16, 5, padding="causal", dilation_rate=2, name="causal")(inputs)
    x = L.Conv1D(16, 5, strides=2, name="strided")(x)
    return K.Model(inputs, L.Dense(10, name="head")(x))


def subclassed(K: ModuleType) -> Any:
    """Layers in a list, and a nested Sequential, with `get_config`."""
    model = subclass(K)(width=16)
    model(np.zeros((1, *IMAGE), "float32"))
    return model


_SUBCLASSES: dict[str, type] = {}


def subclass(K: ModuleType) -> type:
    if K.__name__ in _SUBCLASSES:
        return _SUBCLASSES[K.__name__]
    L = K.layers

    class Net(K.Model):  # type: ignore[name-defined,misc]
        def __init__(self, width: int = 16, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.width = width
            self.convs = [L.Conv2D(width, 3, padding="same") for _ in range(3)]
            self.head = K.Sequential([L.Flatten(), L.Dense(20), L.Dense(10)])
            self.drop = L.Dropout(0.1)

        def call(self, x: Any, training: bool = False) -> Any:
            for conv in self.convs:
                x = tf.nn.relu(conv(x))
            return self.head(self.drop(x, training=training))

        def get_config(self) -> dict[str, Any]:
            base = super().get_config() if K is keras else {}
            return {**base, "width": self.width}

    _SUBCLASSES[K.__name__] = Net
    return Net


MODELS: dict[str, Callable[[ModuleType], Any]] = {
    function.__name__: function
    for function in (
        functional,
        sequential,
        sequential_built_by_a_call,
        nested,
        shared,
        wrapped,
        temporal,
        subclassed,
    )
}


def examples(model: Any, count: int = 4) -> Any:
    """Seeded inputs for a model of this module."""
    shapes = [tuple(i.shape)[1:] for i in (getattr(model, "inputs", None) or [])] or [IMAGE]
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((count, *shape)).astype("float32") for shape in shapes]
    return inputs if len(inputs) > 1 else inputs[0]


def outputs(model: Any, inputs: Any) -> np.ndarray:
    """All outputs of a model on `inputs`, flattened to one array."""
    return np.concatenate(
        [np.ravel(np.asarray(o)) for o in tf.nest.flatten(model(inputs, training=False))]
    )


def images(count: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Seeded images with labels that can be learnt."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 10, count)
    patterns = np.random.default_rng(2).standard_normal((10, *IMAGE))
    noise = 0.3 * rng.standard_normal((count, *IMAGE))
    return (patterns[labels] + noise).astype("float32"), labels


def factorized_layer(layer: Any, choice: Any, **options: Any) -> Any:
    """The factorized layer of a choice, for a layer that is in no model."""
    record = LayerRecord(layer.name, layer, 0, None, None)
    return replacement(record, choice, **options).factorized


def recorded_rows(model, inputs):
    """Every layer's unfolded inputs in rows, from TensorFlow's own patches; `{path: rows}`."""
    found = {}

    def patches(layer, x):
        x = tf.cast(x, tf.float32).numpy()
        if not hasattr(layer, "kernel_size"):
            return x.reshape(-1, x.shape[-1])
        if len(layer.kernel_size) == 1:
            pad = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
            if layer.padding == "causal":
                x = np.pad(x, ((0, 0), (pad, 0), (0, 0)))
            x, size, stride, rate = (
                x[:, None],
                (1, *layer.kernel_size),
                (1, *layer.strides),
                (1, *layer.dilation_rate),
            )
        else:
            size, stride, rate = layer.kernel_size, layer.strides, layer.dilation_rate
        rows = tf.image.extract_patches(
            x,
            [1, *size, 1],
            [1, *stride, 1],
            [1, *rate, 1],
            "SAME" if layer.padding == "same" else "VALID",
        ).numpy()
        channels = x.shape[-1]
        return (
            rows.reshape(-1, rows.shape[-1] // channels, channels)
            .transpose(0, 2, 1)
            .reshape(-1, rows.shape[-1])
        )

    paths = {id(layer): path for path, layer in walk(model)}
    layers = [layer for _, layer in walk(model) if hasattr(layer, "kernel")]
    before = {}
    for layer in layers:
        if not hasattr(layer, "use_bias"):
            continue
        before[id(layer)] = layer.call

        def spy(x, *args, layer=layer, **kwargs):
            found.setdefault(paths[id(layer)], []).append(patches(layer, x))
            return before[id(layer)](x, *args, **kwargs)

        layer.__dict__["call"] = spy
    try:
        model(inputs, training=False)
    finally:
        for layer in layers:
            layer.__dict__.pop("call", None)
    return {path: np.concatenate(rows) for path, rows in found.items()}


def spread(model: Any, decades: float, seed: int = 0) -> None:
    """Makes encoders and decoders differ widely between ranks; the products stay."""
    random = np.random.default_rng(seed)
    for pair in find_pairs(model):
        ranks = int(pair.decoder.shape[-2])
        scale = 10 ** random.permutation(np.linspace(-decades, decades, ranks))
        encoder, decoder = np.asarray(pair.encoder), np.asarray(pair.decoder)
        pair.encoder.assign((encoder.reshape(-1, ranks) * scale).reshape(encoder.shape))
        pair.decoder.assign(decoder / scale[:, np.newaxis])


def random_plan(model: Any, random: np.random.Generator, target: str | None) -> CompressionPlan:
    """Any allowed slices and ranks, whatever they cost."""
    plan = keras_alds.select(model, 0.01, target="size")
    choices = []
    for choice in plan.choices:
        shape = choice.kernel_shape
        if shape is not None and (choice.factorized or choice.reason_code == Skip.BUDGET.value):
            options = [
                (k, j)
                for k in divisors(shape[-2])
                for j in ([1, 2, 3] if target is None else TARGETS[target].ranks(shape, k))
                if target is not None or j <= min(np.prod(shape[:-1]) // k, shape[-1])
            ]
            by_slices = sorted({k for k, _ in options})
            if by_slices:  # every k is as likely
                k = random.choice(by_slices)
                j = int(random.choice([rank for slices, rank in options if slices == k]))
                size = choice.params_before - int(np.prod(shape)) + weights(shape, int(k), j)
                choice = dataclasses.replace(
                    choice,
                    slices=int(k),
                    rank=j,
                    scheme=0,
                    costs={"params": Cost(choice.params_before, size)},
                    reason=None,
                )
                window = shape[:-2]
                known = sorted(set(distinct_schemes(window).values()))
                if target is not None and choice.kind in ("Conv1D", "Conv2D") and len(known) > 1:
                    scheme = int(random.choice([*known, 0, 0]))
                    read = convolution_unfolding(len(window), scheme).shape(shape)
                    ranks = TARGETS[target].ranks(read, 1)
                    if scheme and ranks:
                        j = int(random.choice(ranks))
                        size = choice.params_before - int(np.prod(shape)) + weights(read, 1, j)
                        choice = dataclasses.replace(
                            choice,
                            slices=1,
                            rank=j,
                            scheme=scheme,
                            costs={"params": Cost(choice.params_before, size)},
                        )
        choices.append(choice)
    return dataclasses.replace(plan, choices=tuple(choices), target=target)
