"""Keras 3 and tf_keras, NumPy references and the layer contract, for the tests of the layers."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tf_keras

import keras_alds.tf_keras
from keras_alds import layers

KERASES = {
    "keras": SimpleNamespace(keras=keras, layers=layers, name="keras"),
    "tf_keras": SimpleNamespace(keras=tf_keras, layers=keras_alds.tf_keras, name="tf_keras"),
}
FORMS = ("grouped", "split", "merged", "recomposed")


def dense_kernel(encoder: np.ndarray, decoder: np.ndarray, slices: int) -> np.ndarray:
    """Multiply the factors slice by slice, in float64."""
    encoder, decoder = np.asarray(encoder, np.float64), np.asarray(decoder, np.float64)
    *spatial, per_slice, width = encoder.shape
    rank = width // slices
    decoder = decoder.reshape(width, -1)
    kernel = np.zeros((*spatial, per_slice * slices, decoder.shape[1]))
    for i in range(slices):
        columns = slice(i * rank, (i + 1) * rank)
        rows = slice(i * per_slice, (i + 1) * per_slice)
        kernel[..., rows, :] = encoder[..., columns] @ decoder[columns]
    return kernel


def convolve(
    x: np.ndarray,
    kernel: np.ndarray,
    *,
    strides: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: str,
) -> np.ndarray:
    """Cross-correlate a channels-last array with a kernel, tap by tap, in float64."""
    x = np.asarray(x, np.float64)
    *sizes, _, filters = kernel.shape
    pads, outs = [], []
    for length, size, stride, step in zip(x.shape[1:-1], sizes, strides, dilation, strict=True):
        reach = step * (size - 1)
        if padding == "same":
            out = -(-length // stride)
            total = max(0, (out - 1) * stride + reach + 1 - length)
            pad = (total // 2, total - total // 2)
        elif padding == "causal":
            out, pad = (length - 1) // stride + 1, (reach, 0)
        else:
            out, pad = (length - reach - 1) // stride + 1, (0, 0)
        pads.append(pad)
        outs.append(out)
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    y = np.zeros((x.shape[0], *outs, filters))
    for tap in itertools.product(*map(range, sizes)):
        window = tuple(
            slice(t * step, t * step + (out - 1) * stride + 1, stride)
            for t, step, out, stride in zip(tap, dilation, outs, strides, strict=True)
        )
        y += x[(slice(None), *window)] @ kernel[tap]
    return y


def as_array(value: Any) -> np.ndarray:
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def tf_variable(weight: Any) -> tf.Variable:
    """The TensorFlow variable behind a weight of either Keras."""
    return weight if isinstance(weight, tf.Variable) else weight.value


def randomize(layer: Any, seed: int = 0) -> None:
    """Give every weight, biases too, values of order one."""
    generator = np.random.default_rng(seed)
    layer.set_weights([generator.normal(size=w.shape) * 0.5 for w in layer.get_weights()])


def check_layer(
    side: SimpleNamespace,
    name: str,
    arguments: dict[str, Any],
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    weight_shapes: list[tuple[int, ...]],
) -> None:
    """Run the contract that every layer keeps: build, shapes, config, symbolic use, training."""
    cls = getattr(side.layers, name)
    layer = cls(**arguments)
    assert tuple(layer.compute_output_shape(input_shape)) == output_shape
    unknown = (None, *input_shape[1:])
    assert tuple(layer.compute_output_shape(unknown)) == (None, *output_shape[1:])
    layer.build(input_shape)
    assert layer.built
    assert [tuple(w.shape) for w in layer.weights] == weight_shapes

    config = layer.get_config()
    twin = cls.from_config(config)
    assert twin.get_config() == config
    for key, value in arguments.items():
        if isinstance(value, (int, bool, tuple)) or key in ("padding", "encoder_form"):
            assert getattr(twin, key) == value or getattr(twin, key) == (value,) * len(
                np.atleast_1d(getattr(twin, key))
            )
    twin.build(input_shape)
    twin.set_weights(layer.get_weights())
    x = np.random.default_rng(1).normal(size=input_shape).astype("float32")
    y = as_array(layer(x))
    assert y.shape == output_shape
    np.testing.assert_allclose(as_array(twin(x)), y, rtol=1e-5, atol=1e-6)

    inputs = side.keras.Input(input_shape[1:])
    outputs = layer(inputs)
    assert tuple(outputs.shape) == (None, *output_shape[1:])
    model = side.keras.Model(inputs, outputs)
    model.compile(side.keras.optimizers.SGD(0.01), "mse")
    before = [w.copy() for w in layer.get_weights()]
    model.fit(x, np.ones_like(y), epochs=1, verbose=0)
    for old, new in zip(before, layer.get_weights(), strict=True):
        assert np.isfinite(new).all()
        assert not np.array_equal(old, new)
    np.testing.assert_allclose(
        model.predict(x, verbose=0), as_array(layer(x)), rtol=1e-4, atol=1e-5
    )
