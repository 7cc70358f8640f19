"""Conversion to LiteRT: outputs, quantized tensors, every kind of model, and what is refused."""

from __future__ import annotations

import copy
import gzip
import logging
import pickle
import sys
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

import keras_alds
from keras_alds import litert
from keras_alds._backend import tensors
from keras_alds.layers import FactorizedConv2D, FactorizedDense
from keras_alds.litert import _package
from keras_alds.litert.quantized import check_quantized
from keras_alds.litert.runs import LOCAL, Runner, check_file

pytest.importorskip("ai_edge_litert")

# Conversion takes the graph, which Keras 3 and tf_keras give alike: all kinds of one and two of the
# other.
KINDS = [
    *(("keras", kind) for kind in ("functional", "sequential", "nested", "shared", "temporal")),
    ("keras", "subclassed"),
    ("tf_keras", "functional"),
    ("tf_keras", "subclassed"),
]


def flat(value: Any) -> list[np.ndarray]:
    return [np.asarray(item) for item in tf.nest.flatten(value)]


@pytest.mark.parametrize(("module", "kind"), KINDS)
def test_factorized_models_of_every_kind_convert(module: str, kind: str):
    model = zoo.MODELS[kind](pytest.importorskip(module))
    small = keras_alds.compress(model, 0.4)
    x = zoo.examples(small)
    before = small.get_weights()
    content = litert.convert(small, targets=("litert", "litert-reference"), verbose=0)
    for target in LOCAL:
        runner = Runner(content, target=target)
        for ours, theirs in zip(
            flat(runner.predict(x)), flat(small(x, training=False)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for old, new in zip(before, small.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    file = litert.read_file(content)
    # BatchNormalization is folded, zero biases are dropped but in a grouped convolution, which is
    # what a sliced dense layer becomes: never more values than the model and these have.
    zeros = sum(
        op.weights.shape[0] for op in file.weighted if op.name == "CONV_2D" and op.groups > 1
    )
    assert file.parameters <= small.count_params() + zeros
    assert small.count_params() < model.count_params()
    assert file.size == len(content)
    if kind != "shared":  # of two equal calls, the converter keeps one
        assert file.macs in (None, keras_alds.count_macs(small))
    assert (file.macs is None) == any(operator.subgraph for operator in file.operators)


def test_says_nothing_where_tensorflow_talks():
    """In notebooks, TensorFlow's logger prints at level INFO."""
    logger, records = tf.get_logger(), []
    handler = logging.Handler()
    handler.emit = records.append
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        litert.convert(zoo.functional(keras), verbose=0)
        logger.info("Assets written to: a folder")  # others still may
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert [record.getMessage() for record in records] == ["Assets written to: a folder"]


def test_int8_tensors():
    small = keras_alds.compress(zoo.functional(keras), 0.4)
    x = zoo.examples(small, 32)
    content = litert.convert(small, quantize="int8", representative_data=x, verbose=0)
    file = litert.read_file(content)
    assert file.operators[0].name == "QUANTIZE"
    assert len(file.weighted) >= 5
    for operator in file.weighted:
        types = [operator.data.dtype, operator.weights.dtype, operator.outputs[0].dtype]
        assert types == ["int8"] * 3
    runner = Runner(content)
    ours, theirs = runner.predict(x), np.asarray(small(x, training=False))
    np.testing.assert_array_equal(runner.predict([x]), ours)  # as the file's only input
    np.testing.assert_array_equal(runner.predict(list(x[:2])), ours[:2])
    np.testing.assert_array_equal(runner.predict([x[0]]), ours[:1])
    with pytest.raises(ValueError, match=r"at least one example .*Received: shapes \(0, "):
        runner.predict(x[:0])
    with pytest.raises(ValueError, match="Expected data of shape"):
        runner.predict([])
    assert np.abs(ours - theirs).max() < 0.06 * np.abs(theirs).max()


# -- Conversion ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense_and_conv() -> Any:
    """A float model with kernels of more than 1024 values."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((8, 8, 12))
    x = layers.Conv2D(24, 3, padding="same", activation="relu", name="conv")(inputs)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(48, activation="relu", name="hidden")(x)
    model = keras.Model(inputs, layers.Dense(5, name="head")(x))
    model.compile("adam", "mse", metrics=["accuracy"])
    return model


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((40, 8, 8, 12)).astype("float32")


@pytest.fixture(scope="module")
def contents(dense_and_conv: Any, data: np.ndarray) -> dict[str | None, bytes]:
    """The same model, quantized in every way."""
    return {
        quantize: litert.convert(
            dense_and_conv,
            quantize=quantize,
            representative_data=data if quantize == "int8" else None,
            verbose=0,
        )
        for quantize in (None, "float16", "dynamic", "int8")
    }


def test_quantized_outputs_and_sizes(
    contents: dict[str | None, bytes], dense_and_conv: Any, data: np.ndarray
):
    wanted = np.asarray(dense_and_conv(data))
    for quantize, tolerance in ((None, 1e-5), ("float16", 2e-3), ("dynamic", 0.05), ("int8", 0.06)):
        error = np.abs(Runner(contents[quantize]).predict(data) - wanted).max()
        assert error < tolerance * np.abs(wanted).max(), quantize
    sizes = [len(contents[quantize]) for quantize in (None, "float16", "dynamic")]
    assert sizes == sorted(sizes, reverse=True)


def test_weights_in_the_file_are_those_of_the_model(
    contents: dict[str | None, bytes], dense_and_conv: Any
):
    """The reader against NumPy: kernels, scales and zero points, every kind of file."""
    kernel = np.moveaxis(dense_and_conv.get_layer("conv").get_weights()[0], -1, 0)
    for quantize in (None, "float16", "int8"):
        file = litert.read_file(contents[quantize])
        conv = next(step for step in file.operators if step.name == "CONV_2D")
        stored = file.stored(conv.weights)
        values = file.values(stored).astype("float64")
        if quantize == "int8":
            scales = np.reshape(stored.scales, (-1, 1, 1, 1))
            np.testing.assert_allclose(scales.ravel(), np.abs(kernel).max((1, 2, 3)) / 127, 1e-4)
            assert set(stored.zero_points) == {0}
            assert stored.axis == 0
            assert np.abs(values * scales - kernel).max() <= 0.51 * scales.max()
        else:
            np.testing.assert_allclose(values, kernel, rtol=1e-3 if quantize else 0, atol=1e-6)
        assert (conv.groups, conv.strides, conv.depth_multiplier) == (1, (1, 1), None)
    depthwise = next(step for step in file.operators if step.name == "DEPTHWISE_CONV_2D")
    assert (depthwise.groups, depthwise.depth_multiplier) == (24, 1)
    assert file.inputs[0].shape == (1, 8, 8, 12)
    assert file.outputs[0].shape == (1, 5)
    with pytest.raises(ValueError, match="Expected a constant tensor"):
        file.values(file.inputs[0])


def test_the_check_reads_tensors_and_names_layers(contents: dict[str | None, bytes]):
    """What was not quantized as asked for does not pass, whatever the converter was told."""
    files = {quantize: litert.read_file(content) for quantize, content in contents.items()}
    for asked in ("float16", "dynamic", "int8"):
        for given, file in files.items():
            if given == asked or (asked, given) == ("dynamic", "int8"):
                assert all(
                    "head" in left or "depthwise" in left or "StatefulPartitionedCall" in left
                    for left in check_quantized(file, asked)
                )
                continue
            with pytest.raises(ValueError, match="Expected every convolution and dense") as error:
                check_quantized(file, asked)
            assert "hidden" in str(error.value)


def test_the_bytes_print_as_their_number(contents: dict[str | None, bytes], tmp_path: Path):
    content = contents[None]
    text = f"<{len(content):,} bytes of a .tflite file>"
    assert repr(content) == str(content) == f"{content}" == text
    assert isinstance(content, bytes)
    assert content[4:8] == b"TFL3"
    plain = bytes(content)
    assert (type(plain), plain, hash(plain)) == (bytes, content, hash(content))
    assert type(pickle.loads(pickle.dumps(content))) is bytes
    assert pickle.loads(pickle.dumps(content)) == copy.deepcopy(content) == content
    (tmp_path / "file.tflite").write_bytes(content)
    assert (tmp_path / "file.tflite").read_bytes() == content
    for interpreter in (tf.lite.Interpreter, _package.interpreter().Interpreter):
        interpreter(model_content=content).allocate_tensors()
    file = litert.read_file(content)
    assert len(repr(file)) < 100
    assert max(len(repr(tensor)) for tensor in file.tensors) < 200


def test_int8_inputs_and_outputs_and_batches(dense_and_conv: Any, data: np.ndarray):
    content = litert.convert(
        dense_and_conv,
        quantize="int8",
        representative_data=lambda: ([data[i : i + 1]] for i in range(40)),
        inference_input_type=tf.int8,
        inference_output_type="uint8",
        batch_size=16,
        targets=("litert", "litert-reference"),
        verbose=0,
    )
    file = litert.read_file(content)
    assert (file.inputs[0].dtype, file.outputs[0].dtype) == ("int8", "uint8")
    assert file.inputs[0].shape[0] == 16
    outputs = Runner(content).predict(data)  # 40 is no multiple of 16
    wanted = np.asarray(dense_and_conv(data))
    assert outputs.shape == wanted.shape
    assert np.abs(outputs - wanted).max() < 0.06 * np.abs(wanted).max()


def test_names_and_order_of_inputs_and_outputs(keras_module: ModuleType):
    model = zoo.shared(keras_module)
    x = zoo.examples(model, 16)
    wanted = [np.asarray(output) for output in model(x)]
    by_name = {"b": x[1], "a": x[0]}
    for given in (x, by_name):
        content = litert.convert(model, quantize="int8", representative_data=given, verbose=0)
        runner = Runner(content)
        assert runner.input_names == ["a", "b"]
        assert runner.output_names == ["first", "dense"]
        for inputs in (x, by_name):
            for ours, theirs in zip(runner.predict(inputs), wanted, strict=True):
                assert np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()
    with pytest.raises(ValueError, match="Expected data for the file's inputs"):
        runner.predict({"a": x[0]})
    with pytest.raises(ValueError, match="Expected data of shape"):
        runner.predict([x[0], x[1][:, :3]])
    with pytest.raises(ValueError, match="at least one example for the file's inputs"):
        runner.predict([x[0][:0], x[1][:0]])


def test_data_without_an_axis_for_the_channel():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3),
            keras.layers.Conv2D(32, 3),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5),
        ]
    )
    x = np.random.default_rng(0).random((16, 8, 8)).astype("float32")
    small = keras_alds.compress(model, 0.3, calibration_data=x)
    content = litert.convert(small, quantize="int8", representative_data=x, verbose=0)
    runner = Runner(content)
    for given in (x, [x], {runner.input_names[0]: x}, list(x)):
        np.testing.assert_array_equal(runner.predict(given), runner.predict(x[..., np.newaxis]))
    litert.compare(model, small, (x, np.zeros(16)), runs=0, verbose=0)


def test_loops_are_refused_where_the_converter_would_crash():
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, keras.layers.LSTM(4, name="lstm")(inputs))
    x = np.random.default_rng(0).standard_normal((8, 5, 8)).astype("float32")
    with pytest.raises(ValueError, match=r"Expected a model without loops.*lstm.*unroll=True"):
        litert.convert(model, quantize="int8", representative_data=x, verbose=0)
    content = litert.convert(model, verbose=0)
    np.testing.assert_allclose(Runner(content).predict(x), model(x), atol=1e-5)
    assert "WHILE" in {step.name for step in litert.read_file(content).operators}


def test_state_does_not_leak_from_one_example_to_the_next():
    tf_keras = pytest.importorskip("tf_keras")
    inputs = tf_keras.Input((5, 8))
    model = tf_keras.Model(inputs, tf_keras.layers.LSTM(4)(inputs))
    x = np.random.default_rng(0).standard_normal((8, 5, 8)).astype("float32")
    runner = Runner(litert.convert(model, verbose=0))
    np.testing.assert_allclose(runner.predict(x), model(x), atol=1e-5)


# -- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quantize": "int4"}, "Expected `quantize` to be one of"),
        ({"quantize": "int8"}, "Expected `representative_data` for quantize='int8'"),
        ({"representative_data": np.zeros((8, 8, 8, 12))}, "only with quantize='int8'"),
        (
            {"quantize": "int8", "representative_data": np.zeros((8, 8, 8, 3))},
            r"batches in `representative_data` of shape \(batch, 8, 8, 12\)",
        ),
        (
            {"quantize": "int8", "representative_data": np.zeros((7, 8, 8, 12))},
            "Expected at least 8 examples in `representative_data`",
        ),
        ({"quantize": "int8", "representative_data": iter(())}, "was a generator used up before"),
        (
            {"quantize": "int8", "representative_data": np.full((8, 8, 8, 12), np.nan)},
            "Expected finite `representative_data`",
        ),
        (
            {"quantize": "int8", "representative_data": "images"},
            "Expected `representative_data` to be",
        ),
        ({"inference_input_type": "int8"}, "to be 'float32' unless quantize='int8'"),
        ({"inference_output_type": "int16"}, "Expected `inference_output_type` to be one of"),
        ({"batch_size": 0}, "Expected `batch_size` to be a positive integer"),
        ({"targets": "litert"}, "Expected `targets` to hold some of"),
        ({"quantize": "INT8"}, r"Received: quantize='INT8'\. Did you mean 'int8'\?"),
        ({"targets": ["litert_reference"]}, r"Did you mean 'litert-reference'\?"),
        ({"targets": ()}, "Expected `targets` to hold some of"),
        ({"targets": None}, "Expected `targets` to hold some of"),
    ],
)
def test_wrong_options(options: dict[str, Any], text: str, dense_and_conv: Any, tmp_path: Path):
    with pytest.raises(ValueError, match=text):
        litert.convert(dense_and_conv, tmp_path / "file.tflite", verbose=0, **options)
    assert not list(tmp_path.iterdir())


def test_the_data_of_python_code_have_the_sizes_of_the_file(keras_module: Any):
    model = zoo.subclassed(keras_module)  # its code would run images of other sizes
    with pytest.raises(ValueError, match=r"batches in `representative_data` of shape \(batch, 12"):
        litert.convert(
            model, quantize="int8", representative_data=np.zeros((8, 14, 12, 3)), verbose=0
        )


def test_a_folder_that_is_missing_is_named_first(dense_and_conv: Any, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="Expected `path` to lie in a folder that exists"):
        litert.convert(dense_and_conv, tmp_path / "none" / "file.tflite", quantize="int8")


@pytest.mark.filterwarnings("ignore:When providing `inputs` as a dict")
def test_models_that_take_dicts(keras_module: ModuleType):
    L = keras_module.layers
    first, second = keras_module.Input((6,), name="first"), keras_module.Input((4,), name="second")
    total = L.Add()([L.Dense(3)(first), L.Dense(3)(second)])
    model = keras_module.Model({"z": first, "b": second}, total)  # keys are not the layers' names
    rng = np.random.default_rng(0)
    x = {"z": rng.standard_normal((16, 6)), "b": rng.standard_normal((16, 4))}
    x = {name: values.astype(np.float32) for name, values in x.items()}
    wanted = np.asarray(model(x))
    for options in ({}, {"quantize": "int8", "representative_data": x}):
        runner = Runner(litert.convert(model, verbose=0, **options))
        assert runner.input_names == ["b", "z"]
        assert np.abs(runner.predict(x) - wanted).max() < 0.1 * np.abs(wanted).max()


def test_words_are_looked_up_in_the_file(keras_module: ModuleType):
    L = keras_module.layers
    words = keras_module.Input((3,), dtype="string")
    x = L.StringLookup(vocabulary=["red", "green", "blue"])(words)
    model = keras_module.Model(words, L.Dense(8)(L.Flatten()(L.Embedding(4, 32)(x))))
    small = keras_alds.compress(model, 0.2)
    x = np.array([["red", "blue", "green"], ["grey", "red", "red"]])
    runner = Runner(litert.convert(small, verbose=0))
    np.testing.assert_allclose(runner.predict(x), small(tf.constant(x)), atol=1e-6)
    numbers = keras_module.Input((3,), dtype="int64")
    looked_up = L.IntegerLookup(vocabulary=[3, 5])(numbers)
    with pytest.raises(ValueError, match="Expected a model that the TFLite converter accepts"):
        litert.convert(keras_module.Model(numbers, L.Embedding(4, 8)(looked_up)), verbose=0)


@pytest.mark.both
def test_wrong_models(keras_module: ModuleType):
    layers = keras_module.layers
    inputs = keras_module.Input((None, None, 3))
    flexible = keras_module.Model(inputs, layers.Conv2D(4, 3)(inputs))
    with pytest.raises(ValueError, match="Expected a model whose input sizes are known"):
        litert.convert(flexible)
    inputs = keras_module.Input((4,))
    half = keras_module.Model(inputs, layers.Dense(4, dtype="mixed_bfloat16", name="half")(inputs))
    with pytest.raises(ValueError, match=r"computes in float32.*'half' \(bfloat16\)"):
        litert.convert(half)
    with pytest.raises(ValueError, match=r"Expected `model` to be a built `keras\.Model`"):
        litert.convert("model.keras")
    inputs = keras_module.Input((4, 4, 4, 16))
    x = np.random.default_rng(0).standard_normal((8, 4, 4, 4, 16)).astype("float32")
    is_keras_3 = keras_module is keras
    kind, name = ("Conv3D", "CONV_3D") if is_keras_3 else ("Conv3DTranspose", "CONV_3D_TRANSPOSE")
    odd = keras_module.Model(inputs, getattr(layers, kind)(24, 2)(inputs))
    odd = keras_alds.compress(odd, 0.1, target="litert") if is_keras_3 else odd
    with pytest.raises(ValueError, match=rf"Expected every.*no int8 form of {name}, which 'dyn"):
        litert.convert(odd, quantize="int8", representative_data=x, verbose=0)
    content = litert.convert(odd, quantize="dynamic", verbose=0)
    assert any(operator.name == name for operator in litert.read_file(content).weighted)
    np.testing.assert_allclose(Runner(content).predict(x), odd(x), atol=1e-4)


def test_files_that_do_not_run_are_not_handed_out(
    contents: dict[str | None, bytes],
    dense_and_conv: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    def broken(self: Any) -> None:
        raise RuntimeError("failed to create XNNPACK runtime")

    content = contents[None]
    monkeypatch.setattr("ai_edge_litert.interpreter.Interpreter.allocate_tensors", broken)
    for call in (litert.benchmark, check_file):
        with pytest.raises(ValueError, match="Expected a file that the LiteRT runtime runs"):
            call(content)
    monkeypatch.undo()
    monkeypatch.setattr("ai_edge_litert.interpreter.Interpreter.invoke", broken)
    with pytest.raises(ValueError, match=r"with XNNPACK \(failed to create XNNPACK runtime\)"):
        litert.convert(dense_and_conv, tmp_path / "file.tflite", verbose=0)
    assert not list(tmp_path.iterdir())


def test_what_is_no_file(tmp_path: Path, contents: dict[str | None, bytes]):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"no such file")
    for read in (litert.read_file, litert.benchmark, check_file):
        with pytest.raises(ValueError, match=r"Expected a \.tflite file"):
            read(path)
    with pytest.raises(ValueError, match="Expected the path or the bytes"):
        litert.read_file(3)
    path.write_bytes(contents[None])
    assert litert.read_file(path) == litert.read_file(contents[None])


def test_litert_is_not_installed(
    dense_and_conv: Any, contents: dict[str | None, bytes], monkeypatch: pytest.MonkeyPatch
):
    for name in ("interpreter", "schema_py_generated"):
        monkeypatch.setitem(sys.modules, f"ai_edge_litert.{name}", None)
    for call in (
        lambda: litert.convert(dense_and_conv),
        lambda: litert.read_file(contents[None]),
        lambda: litert.benchmark(contents[None]),
        lambda: litert.compare(contents[None], contents[None]),
    ):
        with pytest.raises(ImportError, match=r'pip install "keras_alds\[litert\]"'):
            call()


# -- Measuring -----------------------------------------------------------------------------------


def test_benchmark(contents: dict[str | None, bytes], tmp_path: Path):
    path = tmp_path / "model.tflite"
    path.write_bytes(contents["int8"])
    for target in LOCAL:
        latency = litert.benchmark(path, runs=5, warmup=1, target=target, verbose=0)
        assert 0 < latency.fastest <= latency.lower <= latency.median <= latency.upper
        assert (latency.runs, latency.threads, latency.target) == (5, 1, target)
        assert latency.size == len(contents["int8"])
        printed: list[str] = []
        latency.summary(printed.append)
        kernels = "XNNPACK" if target == "litert" else "built-in kernels"
        assert printed == [f"{latency.size:,} bytes, 1 thread, {kernels}: {latency}"]
    for options in ({"runs": 0}, {"threads": 0}, {"warmup": -1}, {"runs": 2.5}):
        with pytest.raises(ValueError, match=f"Expected `{next(iter(options))}` to be a"):
            litert.benchmark(path, **options)


def test_compare(contents: dict[str | None, bytes], dense_and_conv: Any, data: np.ndarray):
    labels = np.random.default_rng(1).integers(0, 5, len(data))
    small = keras_alds.compress(dense_and_conv, 0.4)
    # A model, converted here, against a file; the model's own metric.
    found = litert.compare(dense_and_conv, contents["int8"], (data, labels), runs=3, verbose=0)
    for figures, content in (
        (found.original, contents[None]),
        (found.compressed, contents["int8"]),
    ):
        assert figures.size == len(content)
        assert figures.gzip_size == len(gzip.compress(content, mtime=0))
        predicted = Runner(content).predict(data).argmax(-1)
        assert dict(figures.metrics) == {"accuracy": np.mean(predicted == labels)}
        assert figures.latency.runs == 3
    assert found.latency_ratio > 0
    assert f"{found.original.size:,} → {found.compressed.size:,} bytes, latency × " in repr(found)
    assert len(repr(found)) < 150
    # Two models, quantized; another metric; no latency.
    found = litert.compare(
        dense_and_conv,
        small,
        (data, np.zeros((len(data), 5))),
        metric=lambda y, outputs: (y - outputs) ** 2,
        quantize="int8",
        representative_data=iter([data]),  # read once, for both
        runs=0,
        verbose=0,
    )
    assert found.latency_ratio is found.original.latency is None
    error = Runner(contents["int8"]).predict(data) ** 2
    np.testing.assert_allclose(found.original.metrics["<lambda>"], np.mean(error), rtol=1e-6)
    assert found.compressed.parameters < 0.62 * found.original.parameters
    printed: list[str] = []
    found.summary(printed.append)
    assert [row.split("|")[1].strip() for row in printed[0].splitlines()[-7:]] == [
        "bytes",
        "bytes, gzip",
        "parameters",
        "MACs",
        "peak activations, bytes",
        "arena, bytes",
        "<lambda>",
    ]


def test_a_layer_that_is_called_twice_gives_two_outputs():
    first, second = keras.Input((4,)), keras.Input((4,))
    shared, other = keras.layers.Dense(3, name="dense"), keras.layers.Dense(2, name="dense_1")
    model = keras.Model([first, second], [shared(first), shared(second), other(first)])
    x = zoo.examples(model, 8)
    runner = Runner(litert.convert(model, verbose=0))
    assert runner.output_names == ["dense_0", "dense_2", "dense_1"]
    for ours, theirs in zip(runner.predict(x), model(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_accuracy_wants_one_output():
    model = zoo.shared(keras)
    content = litert.convert(model, verbose=0)
    x = zoo.examples(model, 8)
    with pytest.raises(ValueError, match=r"Expected a model of one output.*Received: 2 outputs"):
        litert.compare(content, content, (x, [np.zeros(8)] * 2), runs=0, verbose=0)


def test_compare_metrics(contents: dict[str | None, bytes], dense_and_conv: Any, data: np.ndarray):
    scores = Runner(contents[None]).predict(data)
    labels = np.random.default_rng(1).integers(0, 5, len(data))
    one_hot = np.eye(5)[labels]

    def of(original: Any, y: Any, metric: Any) -> dict[str, float]:
        pair = original, contents[None]
        found = litert.compare(*pair, (data, y), metric=metric, runs=0, verbose=0)
        return dict(found.original.metrics)

    accuracy = {"accuracy": np.mean(scores.argmax(-1) == labels)}
    for y in (labels, labels[:, None], one_hot):
        assert of(contents[None], y, None) == accuracy
    second = keras.Sequential([keras.Input((8, 8, 12)), keras.layers.Flatten()])
    second.add(keras.layers.Dense(1, activation="sigmoid"))
    second.compile("sgd", "binary_crossentropy", metrics=["accuracy"])
    file = litert.convert(second, verbose=0)
    binary = labels % 2
    wanted = np.mean((Runner(file).predict(data)[:, 0] > 0.5) == binary)
    for y in (binary, binary[:, None]):
        found = litert.compare(second, file, (data, y), runs=0, verbose=0)
        assert dict(found.original.metrics) == {"accuracy": wanted}
    kinds = keras.metrics.MeanAbsoluteError, keras.metrics.MeanSquaredError
    second.compile("sgd", "mse", metrics=[kind(name="error") for kind in kinds])
    found = litert.compare(second, file, (data, binary[:, None]), runs=0, verbose=0)
    assert list(found.original.metrics) == ["error_0", "error_1"]
    for y in (np.random.default_rng(2).normal(size=scores.shape), labels + 0.5, labels[:4]):
        with pytest.raises(ValueError, match="Expected targets to be class numbers"):
            of(contents[None], y, None)
    error = np.mean(np.abs(scores - one_hot))
    for metric in ("mean_absolute_error", keras.metrics.MeanAbsoluteError(name="mae")):
        (value,) = of(dense_and_conv, one_hot, metric).values()
        np.testing.assert_allclose(value, error, rtol=1e-5)
    for y, metric, text in (
        (labels, "mae", "Expected `metric` to be a function"),
        (labels, 3, "Expected `metric` to be a function"),
    ):
        with pytest.raises(ValueError, match=text):
            of(contents[None], y, metric)
    with pytest.raises(ValueError, match="only with a model to convert"):
        litert.compare(contents[None], contents[None], quantize="float16")
    with pytest.raises(ValueError, match=r"Expected `data` to be a pair \(x, y\)"):
        litert.compare(contents[None], contents[None], data)


# -- Thin groups ---------------------------------------------------------------------------------


def single(layer: Any, channels: int = 64) -> Any:
    inputs = keras.Input((8, 8, channels))
    return keras.Model(inputs, keras.layers.ReLU()(layer(inputs)))


def factorized(slices: int, rank: int, channels: int = 64) -> Any:
    layer = keras_alds.FactorizedConv2D(32, 3, slices=slices, rank=rank, name="thin")
    return single(layer, channels)


def int8(model: Any) -> bytes:
    x = np.random.default_rng(0).standard_normal((8, *model.input_shape[1:])).astype("float32")
    return litert.convert(model, quantize="int8", representative_data=x, verbose=0)


THIN = "int8 convolutions? in groups of fewer than 32 channels"


def callers(record: Any) -> list[str]:
    """The files that warnings for users name. Other packages give other kinds of warnings."""
    return [warning.filename for warning in record if warning.category is UserWarning]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: factorized(4, 8), r"CONV_2D '.*thin.*' \(4 groups of 16\)"),
        (lambda: factorized(64, 2), r"DEPTHWISE_CONV_2D '.*thin.*' \(64 groups of 1\)"),
        # Stock groups run in a function of their own: no layer's name is in the file.
        (lambda: keras_alds.expand(factorized(4, 8)), r"CONV_2D '.+' \(4 groups of 16\)"),
        (lambda: single(keras.layers.Conv2D(64, 3, groups=8)), r"CONV_2D '.+' \(8 groups of 8\)"),
    ],
    ids=["factorized", "multiplier above 1", "expanded", "stock"],
)
def test_int8_files_with_thin_groups_are_named(make: Any, text: str):
    model = make()
    with pytest.warns(UserWarning, match=rf"^1 {THIN}.*: {text}\. Remedy: .*") as record:
        content = int8(model)
    assert callers(record) == [__file__]
    with pytest.warns(UserWarning, match=text) as record:
        litert.compare(content, content, runs=0, verbose=0)
    assert callers(record) == [__file__]


def test_models_with_thin_groups_are_named_once():
    inputs = x = keras.Input((8, 8, 64))
    for name in "abcde":
        name = f"thin_{name}"
        x = keras_alds.FactorizedConv2D(64, 1, slices=4, rank=4, name=name)(x)
    model = keras.Model(inputs, x)
    data = np.random.default_rng(0).standard_normal((8, 8, 8, 64)).astype("float32")
    dense = litert.convert(factorized(1, 8), verbose=0)
    options = {"quantize": "int8", "representative_data": data, "runs": 0, "verbose": 0}
    for pair in ((dense, model), (model, dense)):
        with pytest.warns(
            UserWarning, match=rf"^5 {THIN}.*thin_a.*thin_b.*thin_c.*, 2 more\."
        ) as r:
            litert.compare(*pair, **options)
        assert callers(r) == [__file__]
        assert not any("thin_d" in str(warning.message) for warning in r)


@pytest.mark.filterwarnings("error")
def test_other_files_are_not_named():
    thin = factorized(4, 8)
    files = [
        int8(factorized(1, 16)),
        int8(factorized(2, 8)),  # 32 channels a group
        int8(factorized(64, 1)),  # depthwise
        int8(single(keras.layers.DepthwiseConv2D(3))),
        int8(single(keras.layers.DepthwiseConv2D(3, depth_multiplier=4), channels=1)),
        litert.convert(thin, verbose=0),
        litert.convert(thin, quantize="float16", verbose=0),
        litert.convert(thin, quantize="dynamic", verbose=0),
    ]
    for content in files:
        litert.compare(files[0], content, runs=0, verbose=0)


def sliced_dense(slices=4, rank=6):
    """A model of one sliced dense layer, and inputs."""
    layer = FactorizedDense(32, slices=slices, rank=rank, activation="relu")
    model = keras.Sequential([keras.Input((64,)), layer])
    rng = np.random.default_rng(0)
    layer.set_weights([0.5 * rng.standard_normal(w.shape) for w in layer.weights])
    return model, rng.standard_normal((64, 64)).astype("float32")


def off(values, expected):
    """The mean error, relative to the mean of what is expected."""
    return np.abs(values - expected).mean() / np.abs(expected).mean()


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(("slices", "encoder"), [(2, "CONV_2D"), (8, "DEPTHWISE_CONV_2D")])
def test_files_do_not_depend_on_the_kernels_of_this_machine(monkeypatch, slices, encoder, quantize):
    # As on a processor without VNNI, where TensorFlow does without oneDNN.
    monkeypatch.setattr(tensors, "grouped_convolution_trains", lambda dtype: False)
    layer = FactorizedConv2D(4, 3, slices=slices, rank=1, padding="same")
    model = keras.Sequential([keras.Input((6, 6, 8)), layer])
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 8)).astype("float32")
    data = x if quantize else None
    content = litert.convert(model, quantize=quantize, representative_data=data, verbose=0)
    names = [operator.name for operator in litert.read_file(content).operators]
    assert [n for n in names if "QUANTIZE" not in n] == [encoder, "CONV_2D"]


@pytest.mark.parametrize("quantize", [None, "float16", "dynamic", "int8"])
@pytest.mark.parametrize(("slices", "rank"), [(4, 6), (64, 1), (1, 6)])
def test_slices_of_dense_layers_are_one_convolution(slices, rank, quantize):
    model, x = sliced_dense(slices, rank)
    data = x if quantize == "int8" else None
    content = litert.convert(model, quantize=quantize, representative_data=data, verbose=0)
    names = [operator.name for operator in litert.read_file(content).operators]
    assert "BATCH_MATMUL" not in names
    assert names.count("CONV_2D") + names.count("DEPTHWISE_CONV_2D") == (slices > 1)
    expected = model.predict(x, verbose=0)
    for target in LOCAL:
        assert off(Runner(content, target=target).predict(x), expected) < 0.04


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_compiled_models_run_sliced_dense_layers(quantize):
    compiled = pytest.importorskip("ai_edge_litert.compiled_model")
    model, x = sliced_dense()
    data = x if quantize == "int8" else None
    content = litert.convert(model, quantize=quantize, representative_data=data, verbose=0)
    runner = compiled.CompiledModel.from_buffer(content)
    inputs, outputs = runner.create_input_buffers(0), runner.create_output_buffers(0)
    inputs[0].write(x[:1])
    runner.run_by_index(0, inputs, outputs)
    expected = model.predict(x[:1], verbose=0)
    assert off(outputs[0].read(32, np.float32), expected[0]) < 0.1


@pytest.mark.parametrize("recipe", ["static_wi8_ai8", "dynamic_wi8_afp32"])
def test_ai_edge_quantizer_takes_sliced_dense_layers(recipe, tmp_path):
    """It makes the output of a batched product a constant."""
    quantizer = pytest.importorskip("ai_edge_quantizer.quantizer")
    recipes = pytest.importorskip("ai_edge_quantizer.recipe")
    model, x = sliced_dense()
    litert.convert(model, tmp_path / "float.tflite", verbose=0)
    made = quantizer.Quantizer(str(tmp_path / "float.tflite"), getattr(recipes, recipe)())
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter
    signatures = interpreter(str(tmp_path / "float.tflite")).get_signature_list()
    ((key, signature),) = signatures.items()
    examples = {key: [{signature["inputs"][0]: row[None]} for row in x]}
    ranges = made.calibrate(examples) if made.need_calibration else None
    content = bytes(made.quantize(calibration_result=ranges).quantized_model)
    assert off(Runner(content).predict(x), model.predict(x, verbose=0)) < 0.25


def test_files_are_written_for_cpus_wherever(monkeypatch):
    """On a GPU the layers would become batched products."""
    devices = [types.SimpleNamespace(device_type="GPU")]
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda: devices)
    assert not tensors.on_cpu()
    content = litert.convert(sliced_dense()[0], verbose=0)
    assert [op.name for op in litert.read_file(content).weighted] == [
        *("CONV_2D", "FULLY_CONNECTED")
    ]
    assert not tensors.on_cpu()
