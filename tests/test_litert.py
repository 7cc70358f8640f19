"""Conversion to LiteRT: outputs, quantized tensors, every kind of model, and what is refused."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

import keras_alds

pytest.importorskip("ai_edge_litert")

from keras_alds.litert.runs import Runner

KINDS = ("functional", "sequential", "nested", "shared", "temporal", "subclassed")


def flat(value: Any) -> list[np.ndarray]:
    return [np.asarray(item) for item in tf.nest.flatten(value)]


@pytest.mark.parametrize("kind", KINDS)
def test_factorized_models_of_every_kind_convert(kind: str, keras_module: ModuleType):
    model = zoo.MODELS[kind](keras_module)
    small = keras_alds.compress(model, 0.4)
    x = zoo.examples(small)
    before = small.get_weights()
    content = keras_alds.litert.convert(small, runtimes=("xnnpack", "reference"), verbose=0)
    for delegate in (True, False):
        runner = Runner(content, delegate=delegate)
        for ours, theirs in zip(
            flat(runner.predict(x)), flat(small(x, training=False)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for old, new in zip(before, small.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    file = keras_alds.litert.read_file(content)
    # BatchNormalization is folded, zero biases are dropped: never more values than the model has.
    assert file.parameters <= small.count_params() < model.count_params()
    assert file.size == len(content)


def test_int8_tensors(keras_module: ModuleType):
    small = keras_alds.compress(zoo.functional(keras_module), 0.4)
    x = zoo.examples(small, 32)
    content = keras_alds.litert.convert(small, quantize="int8", representative_data=x, verbose=0)
    file = keras_alds.litert.read_file(content)
    assert file.operators[0].name == "QUANTIZE"
    assert len(file.weighted) >= 5
    for operator in file.weighted:
        types = [operator.data.dtype, operator.weights.dtype, operator.outputs[0].dtype]
        assert types == ["int8"] * 3
    ours, theirs = Runner(content).predict(x), np.asarray(small(x, training=False))
    assert np.abs(ours - theirs).max() < 0.06 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quantize": "int4"}, "Expected `quantize` to be one of"),
        ({"quantize": "int8"}, "Expected `representative_data` for quantize='int8'"),
        ({"representative_data": np.zeros((8, 12, 12, 3))}, "only with quantize='int8'"),
        ({"inference_input_type": "int8"}, "to be 'float32' unless quantize='int8'"),
        ({"inference_output_type": "int16"}, "Expected `inference_output_type` to be one of"),
        ({"batch_size": 0}, "Expected `batch_size` to be an integer >= 1"),
        ({"runtimes": "xnnpack"}, "Expected `runtimes` to hold some of"),
    ],
)
def test_wrong_options(options: dict[str, Any], text: str, tmp_path: Any):
    model = zoo.functional(keras)
    with pytest.raises(ValueError, match=text):
        keras_alds.litert.convert(model, tmp_path / "file.tflite", **options)
    assert not list(tmp_path.iterdir())
