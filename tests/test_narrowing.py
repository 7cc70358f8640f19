"""`narrow`: mobile blocks with fewer channels."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
import zoo

import keras_alds
from keras_alds import api

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((64, 10, 10, 3)).astype("float32")
DEAD = np.arange(3, 24, 2)  # eleven of 24


def block(K, x, name, filters, *, strides=1, norm=True):
    L = K.layers
    x = L.DepthwiseConv2D(3, strides, padding="same", name=f"{name}_deep")(x)
    x = L.BatchNormalization(name=f"{name}_norm")(x) if norm else x
    x = L.ReLU(6.0, name=f"{name}_relu")(x)
    return L.Conv2D(filters, 1, use_bias=False, name=f"{name}_out")(x)


def mobile(K):
    """Expand, depthwise, project with a shortcut; then depthwise, pointwise as in MobileNetV1."""
    L = K.layers
    inputs = K.Input((10, 10, 3))
    x = shortcut = L.Conv2D(16, 3, padding="same", name="stem")(inputs)
    x = L.Conv2D(24, 1, name="expand")(x)
    x = L.BatchNormalization(name="norm")(x)
    x = L.Activation("relu", name="relu")(x)
    x = L.Add(name="add")([block(K, x, "first", 16), shortcut])
    x = L.Conv2D(24, 1, activation="relu", name="wide")(x)
    x = L.ZeroPadding2D(1, name="padding")(x)
    x = L.ReLU(name="second_in")(block(K, x, "second", 32, strides=2))
    x = block(K, x, "third", 16, norm=False)  # reads what "second" makes
    x = L.GlobalAveragePooling2D(name="pool")(x)
    return K.Model(inputs, L.Dense(10, name="head")(x), name="mobile")


def with_dead_channels(model):
    """Channels of `expand` that are always zero, of `wide` that are always the same."""
    gamma, beta, *rest = model.get_layer("norm").get_weights()
    gamma[DEAD], beta[DEAD] = 0, -1
    model.get_layer("norm").set_weights([gamma, beta, *rest])
    kernel, bias = model.get_layer("wide").get_weights()
    kernel[..., DEAD] = 0
    bias[DEAD] = 0
    model.get_layer("wide").set_weights([kernel, bias])
    gamma, beta, *rest = model.get_layer("second_norm").get_weights()
    beta[DEAD] = 2
    model.get_layer("second_norm").set_weights([gamma, beta, *rest])
    return model


@pytest.mark.both
def test_channels_that_say_nothing_are_removed_without_a_loss(keras_module, tmp_path):
    model = with_dead_channels(mobile(keras_module))
    model.get_layer("first_deep").trainable = False
    if keras_module is keras:  # only there, single variables can be frozen
        model.get_layer("wide").kernel.trainable = False
    model.compile("sgd", "mse")
    result = keras_alds.narrow(model, calibration_data=X, verbose=0)
    small = result.model
    sizes = {row.layer: (row.width, row.before, row.after) for row in result.layers}
    assert sizes["first_out"] == ("channels of 'expand'", 24, 16)
    assert sizes["second_out"] == ("channels of 'wide'", 24, 16)
    assert sizes["third_out"][:2] == ("channels of 'second_out'", 32)
    assert small.get_layer("expand").kernel.shape == (1, 1, 16, 16)
    assert small.get_layer("first_deep").get_weights()[0].shape == (3, 3, 16, 1)
    wanted = zoo.outputs(model, X)
    assert np.abs(zoo.outputs(small, X) - wanted).max() < 1e-3 * np.abs(wanted).max()
    assert result.cost == (keras_alds.count_macs(model), keras_alds.count_macs(small))
    assert [layer.name for layer in small.layers] == [layer.name for layer in model.layers]
    assert not small.get_layer("first_deep").trainable
    assert small.get_layer("expand").trainable
    assert small.get_layer("wide").bias.trainable
    assert small.get_layer("wide").kernel.trainable == (keras_module is not keras)
    small.fit(X, np.zeros((64, 10)), verbose=0)  # compiled as `model` is
    small.save(tmp_path / "small.keras")
    loaded = keras_module.models.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(zoo.outputs(loaded, X), zoo.outputs(small, X), atol=1e-5)
    assert "third_out" in result.to_markdown()
    assert "removed" in repr(result)


def test_the_fraction_is_removed_where_it_costs_least(keras_module):
    model = mobile(keras_module)
    stats = keras_alds.CalibrationStats.collect(model, X, verbose=0)
    wanted = zoo.outputs(model, X)
    errors = []
    for cr in (0.1, 0.25):
        result = keras_alds.narrow(model, cr, calibration_data=stats, verbose=0)
        small = result.model
        assert result.cost.removed >= cr
        assert result.cost == (keras_alds.count_macs(model), keras_alds.count_macs(small))
        assert all(row.after % 8 == 0 for row in result.layers)
        errors.append(float(np.square(zoo.outputs(small, X) - wanted).mean() / wanted.var()))
    assert errors[0] <= errors[1] < 0.5
    for row in result.layers:  # what the same channels cost without a refit
        if row.after < row.before:
            assert row.error < 0.5
    smaller = keras_alds.compress(small, 0.2, calibration_data=X, target="size")
    assert keras_alds.expand(smaller).count_params() < small.count_params()
    file = keras_alds.litert.convert(
        keras_alds.expand(small, fold_batch_norm=True),
        quantize="int8",
        representative_data=X,
        verbose=0,
    )
    assert keras_alds.litert.read_file(file).macs == keras_alds.count_macs(small)


def test_what_stays_and_why(keras_module):
    K, L = keras_module, keras_module.layers
    inputs = K.Input((8, 8, 16))
    x = L.Conv2D(16, 1, name="gated")(inputs)
    x = L.Multiply(name="gate")([x, L.GlobalAveragePooling2D(keepdims=True, name="mean")(x)])
    x = block(K, x, "a", 16)
    x = block(K, L.Softmax(name="softmax")(x), "b", 16)
    x = block(K, x, "c", 16)
    model = K.Model(inputs, [block(K, x, "d", 16), x], name="stays")
    data = RANDOM.standard_normal((16, 8, 8, 16)).astype("float32")
    with pytest.raises(ValueError, match="none to narrow") as error:
        keras_alds.narrow(model, calibration_data=data, exclude="c_out", verbose=0)
    text = str(error.value)
    for part in (
        "'a_out': 'gate' (Multiply) may mix channels",
        "'b_out': 'softmax' (Softmax) may mix channels",
        "'c_out': it is excluded",
        "'d_out': the output of 'c_out' is used elsewhere too",
    ):
        assert part in text


def test_what_a_wrapper_holds_stays(keras_module):
    inputs = keras_module.Input((2, 10, 10, 3))
    frames = keras_module.layers.TimeDistributed(mobile(keras_module), name="frames")
    model = keras_module.Model(inputs, frames(inputs))
    with pytest.raises(ValueError, match="'frames/mobile/first_out': it is inside a wrapper"):
        keras_alds.narrow(model, calibration_data=X.reshape(32, 2, 10, 10, 3), verbose=0)


def test_channels_first_stays(keras_module):
    K, L = keras_module, keras_module.layers
    inputs = K.Input((3, 8, 8))
    first = {"data_format": "channels_first"}
    x = L.Conv2D(16, 1, **first)(inputs)
    x = L.DepthwiseConv2D(3, **first)(x)
    x = L.BatchNormalization(axis=1)(x)
    model = K.Model(inputs, L.Conv2D(8, 1, name="out", **first)(x))
    data = RANDOM.standard_normal((16, 3, 8, 8)).astype("float32")
    with pytest.raises(ValueError, match="'out' is channels_first"):
        keras_alds.narrow(model, calibration_data=data, verbose=0)


def test_errors_name_the_limit_and_change_nothing(keras_module):
    model = mobile(keras_module)
    for cr in (1, 0, -0.1, True, "half"):
        with pytest.raises(ValueError, match="0 < cr < 1"):
            keras_alds.narrow(model, cr, calibration_data=X, verbose=0)
    with pytest.raises(ValueError, match=r"to be at most 0.*cr=0\.99") as error:
        keras_alds.narrow(model, 0.99, calibration_data=X, verbose=0)
    limit = float(re.search(r"at most (\S+),", str(error.value)).group(1))
    result = keras_alds.narrow(model, limit, calibration_data=X, multiple=8, verbose=0)
    assert result.cost.removed >= limit
    with pytest.raises(ValueError, match="'first_out': it reads 24 channels only"):
        keras_alds.narrow(model, calibration_data=X, multiple=32, verbose=0)
    small = keras_alds.compress(model, 0.2, method="energy", target="size")
    with pytest.raises(ValueError, match="Narrow first"):
        keras_alds.narrow(small, 0.2, calibration_data=X, verbose=0)


def warned(model, **options):
    with pytest.warns(UserWarning, match="loses much") as caught:
        keras_alds.select(model, calibration_data=X, target="size", **options)
    return next(str(w.message) for w in caught if "loses much" in str(w.message))


def test_select_names_narrow_where_it_may_lose_less(monkeypatch):
    monkeypatch.setattr(api, "_FAR", 0.0)
    text = warned(mobile(keras), cr=0.6, objective="macs")
    assert re.search(r"such as the one that '\w+_out' ends, .* `keras_alds\.narrow`", text)
    assert "narrow" not in warned(mobile(keras), cr=0.6)
    assert "narrow" not in warned(mobile(keras), cr={"params": 0.6, "memory": 0.0})
    plain = keras.Sequential(
        [
            keras.Input((10, 10, 3)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )
    assert "narrow" not in warned(plain, cr=0.7, objective="macs")


def test_weights_that_are_not_finite_are_found_before_the_model_runs():
    model = mobile(keras)
    model.get_layer("wide").kernel.assign(np.full((1, 1, 16, 24), np.nan))

    def examples():
        raise AssertionError("the model was run")

    with pytest.raises(ValueError, match="NaN or infinity in the kernel of layer 'wide'"):
        keras_alds.narrow(model, calibration_data=examples, verbose=0)


@pytest.mark.parametrize("name", ["narrow", "narrow_heads"])
def test_a_copy_is_told_of_at_the_users_line(name):
    if name == "narrow":
        inputs = keras.Input((8, 8, 8))
        x = keras.layers.DepthwiseConv2D(3)(keras.layers.Conv2D(16, 1)(inputs))
        model = keras.Model(inputs, keras.layers.Conv2D(8, 1)(x))
    else:
        inputs = keras.Input((6, 32))
        model = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 8)(inputs, inputs))
    data = RANDOM.standard_normal((64, *inputs.shape[1:])).astype("float32")
    with pytest.warns(UserWarning, match="Nothing in .* can be narrower for free") as caught:
        getattr(keras_alds, name)(model, calibration_data=data, verbose=0)
    (told,) = [w for w in caught if "Nothing in" in str(w.message)]
    assert told.filename == __file__
