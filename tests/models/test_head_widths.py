"""Attention layers with narrower heads: outputs, files that need no package, reasons."""

from __future__ import annotations

import re
import zipfile

import keras
import numpy as np
import pytest

import keras_alds
from keras_alds import litert, narrow_heads
from keras_alds.core.calibration.curves import Curve
from keras_alds.litert.runs import Runner
from keras_alds.models.head_widths import find_heads
from keras_alds.models.inventory import Inventory

rng = np.random.default_rng(0)
X = [rng.standard_normal(shape).astype("f") for shape in ((24, 6, 12), (24, 4, 10))]
X[1][:5, 2:] = 0  # masked


def assert_close(actual, expected, tolerance=1e-4):
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def outputs(model):
    return np.asarray(model(X, training=False))


def model_of(K):
    """Self-attention, cross-attention of other sizes, and attention along one of two axes."""
    L = K.layers
    a, b = K.Input((6, 12)), K.Input((4, 10))
    x = L.MultiHeadAttention(2, 8, dropout=0.1, name="causal")(a, a, use_causal_mask=True)
    cross = L.MultiHeadAttention(3, 8, value_dim=16, output_shape=12, use_bias=False, name="cross")
    x = L.Add()([x, cross(x, L.Masking()(b))])
    x = L.Reshape((2, 3, 12))(x)
    axes = L.MultiHeadAttention(2, 8, attention_axes=(2,), output_shape=(2, 4), name="axes")
    x = L.Reshape((6, 8))(axes(x, x))
    if hasattr(L, "GroupQueryAttention"):
        x = L.GroupQueryAttention(8, 4, 2, name="groups")(x, x)
    x = L.Dense(3, name="head")(L.GlobalAveragePooling1D()(x))
    return K.Model([a, b], x)


def attention_layers(model):
    return [layer for layer in model.layers if "Attention" in type(layer).__name__]


def widths(model):
    names = ("key_dim", "value_dim", "head_dim")
    found = [layer.get_config() for layer in attention_layers(model)]
    return [tuple(config[n] for n in names if n in config) for config in found]


def halve_ranks(layer):
    """Projects keys and values of every head to half of its width; all else is random."""
    for name in ("key", "value"):
        dense = getattr(layer, f"_{name}_dense")
        heads, width = dense.kernel.shape[1:]
        maps = rng.standard_normal((heads, width, width // 2))
        maps = maps @ rng.standard_normal((heads, width // 2, width)) / width
        kernel = rng.standard_normal(dense.kernel.shape)
        dense.kernel.assign(np.einsum("ahn,hnm->ahm", kernel, maps))
        if dense.bias is not None:
            bias = rng.standard_normal((heads, width))
            if name == "value":
                bias = np.einsum("hn,hnm->hm", bias, maps)
            dense.bias.assign(bias)
    for dense in (layer._query_dense, layer._output_dense):
        for weight in dense.weights:
            weight.assign(rng.standard_normal(weight.shape) / 3)


@pytest.mark.parametrize("data", [False, True])
def test_heads_of_a_smaller_rank_become_narrower_exactly(keras_module, data, tmp_path):
    K = keras_module
    model = model_of(K)
    for layer in attention_layers(model):
        halve_ranks(layer)
    model.compile("adam", "mse")
    expected = outputs(model)
    removed = [
        weight.size // 2
        for layer in attention_layers(model)
        for name in ("query", "key", "value", "output")
        for weight in getattr(layer, f"_{name}_dense").get_weights()
        if name != "output" or weight.ndim > 2  # not its bias
    ]
    result = narrow_heads(
        model, sum(removed) / model.count_params(), calibration_data=X if data else None, verbose=0
    )
    narrow = result.model
    assert result.cost == (model.count_params(), narrow.count_params())
    assert {(row.layer, row.width, row.before, row.after) for row in result.layers} >= {
        ("cross", "key_dim", 8, 4),
        ("cross", "value_dim", 16, 8),
    }
    assert max(row.error for row in result.layers) < 1e-6
    assert widths(narrow) == [tuple(n // 2 for n in some) for some in widths(model)]
    assert model.count_params() - narrow.count_params() == sum(removed)
    assert_close(outputs(narrow), expected)
    assert [type(a) for a in narrow.layers] == [type(a) for a in model.layers]
    if data:
        return
    before = narrow.get_weights()
    narrow.fit(X, np.ones((24, 3)), batch_size=24, verbose=0)
    moved = [not np.array_equal(a, b) for a, b in zip(before, narrow.get_weights(), strict=True)]
    assert sum(moved) >= len(moved) - 3  # a key's bias has no effect
    narrow.save(tmp_path / "narrow.keras")
    with zipfile.ZipFile(tmp_path / "narrow.keras") as file:
        assert "keras_alds" not in file.read("config.json").decode()
    loaded = K.models.load_model(tmp_path / "narrow.keras")
    assert_close(outputs(loaded), outputs(narrow))
    expanded = keras_alds.expand(narrow)
    assert widths(expanded) == widths(narrow)


def test_widths_are_chosen_by_what_they_do_to_the_outputs():
    """One layer's queries and keys are far less than another's: its heads shrink first."""
    inputs = keras.Input((6, 12))
    x = inputs
    for n in range(2):
        layer = keras.layers.MultiHeadAttention(2, 8, name=f"attention_{n}")
        x = keras.layers.Add()([x, layer(x, x)])
    model = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling1D()(x)))
    first, second = attention_layers(model)
    for dense in (first._query_dense, first._key_dense):
        dense.kernel.assign(1e-3 * dense.get_weights()[0])
    for dense in (second._query_dense, second._key_dense):
        dense.kernel.assign(4 * dense.get_weights()[0])
    x = rng.standard_normal((64, 6, 12)).astype("f")
    narrow = narrow_heads(model, 0.15, calibration_data=x, multiple=1, verbose=0).model
    assert 1 - narrow.count_params() / model.count_params() >= 0.15
    (first_width, _), (second_width, _) = widths(narrow)
    assert first_width < second_width
    near = narrow_heads(model, calibration_data=x, verbose=0).model
    first, second = (m.predict(x, verbose=0) for m in (model, near))
    assert near.count_params() < model.count_params()
    assert 0 < np.square(first - second).mean() / first.var(axis=0).mean() < 2e-3
    with pytest.raises(ValueError, match="Expected `cr`, or examples"):
        narrow_heads(model)
    lines: list[str] = []
    kept = narrow_heads(model, 0.1, exclude="attention_0", multiple=1)
    assert widths(kept.model)[0] == (8, 8) > widths(kept.model)[1]
    assert kept.skipped == {"attention_0": "it is excluded"}
    kept.summary(lines.append)
    assert "attention_0: it is excluded" in lines[0]
    attention_layers(model)[1]._query_dense.bias.assign(np.full((2, 8), np.nan))
    with pytest.raises(ValueError, match=r"NaN or infinity in the bias .*attention_1.*query"):
        narrow_heads(model, 0.1)


def test_widths_are_choices():
    layer = keras.layers.MultiHeadAttention(2, 8, name="attention")
    inputs = keras.Input((6, 12))
    inventory = Inventory.of(keras.Model(inputs, layer(inputs, inputs)))
    ((heads,), _) = find_heads(inventory, 2)
    curve = Curve((0.01, 0.5), (0.1, 0.7))
    for product in heads.products(2):
        table = product.table(None, 1.0)
        assert table.rank.tolist() == [2, 4, 6, 8]
        assert np.array_equal(table.error, product.errors)
        assert np.ptp(table.cost[:, 0] / table.rank) == 0
        table = product.table(curve, 0.5)
        np.testing.assert_allclose(table.error**2, curve(product.errors) * product.errors)


@pytest.mark.parametrize("name", ["attention", "encoder/attention"])
def test_names_with_a_slash_and_heads_without_a_smaller_width(name):
    tf_keras = pytest.importorskip("tf_keras")
    inputs = tf_keras.Input((6, 12))
    outputs = tf_keras.layers.MultiHeadAttention(2, 8, name=name)(inputs, inputs)
    model = tf_keras.Model(inputs, outputs)
    assert widths(narrow_heads(model, 0.2).model) < widths(model)
    with pytest.raises(ValueError, match="its heads are not wider than 8"):
        narrow_heads(model, 0.2, multiple=8)


def test_files_of_litert():
    model = model_of(keras)
    narrow = narrow_heads(model, 0.3, calibration_data=X, verbose=0).model
    expected = outputs(narrow)
    content = litert.convert(narrow, verbose=0)
    int8 = litert.convert(narrow, quantize="int8", representative_data=X, verbose=0)
    assert_close(Runner(content).predict(X), expected)
    assert np.corrcoef(Runner(int8).predict(X).ravel(), expected.ravel())[0, 1] > 0.9


class Own(keras.layers.MultiHeadAttention):
    def _compute_attention(self, query, *args, **kwargs):
        return super()._compute_attention(keras.ops.roll(query, 1, axis=1), *args, **kwargs)


class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(2, 8, name="attention")

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


def test_layers_that_keep_their_heads():
    L = keras.layers
    inputs = keras.Input((6, 12))
    x = L.MultiHeadAttention(2, 8, use_gate=True, name="gated")(inputs, inputs)
    x = L.GroupQueryAttention(8, 4, 2, use_gate=True, name="gated_group")(x, x)
    x = Block(name="block")(Own(2, 8, name="own")(x, x))
    model = keras.Model(inputs, x)
    result = narrow_heads(model, 0.03)
    narrow = result.model
    assert result.skipped.keys() == {"gated_group", "own", "block/attention"}
    for reason, known in zip(
        ("it has a gate", "Own is not the stock MultiHeadAttention", "'block' calls it in Python"),
        result.skipped.values(),
        strict=True,
    ):
        assert known.startswith(reason)
    assert widths(narrow)[0][1] == 8 > widths(narrow)[0][0]
    with pytest.raises(ValueError, match=r"Expected 0 < cr <= 0\.\d+") as error:
        narrow_heads(model, 0.9, exclude=["gated_group", "own", "block"])
    limit = float(re.search(r"<= ([\d.]+\d)", str(error.value)).group(1))
    assert narrow_heads(model, limit).cost.removed >= limit
    with pytest.raises(ValueError, match="heads can be narrower"):
        narrow_heads(keras.Sequential([keras.Input((3,)), L.Dense(2)], name="plain"), 0.5)
