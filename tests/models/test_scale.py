"""The warning of examples of another scale than the training data."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import tensorflow as tf
import zoo

from keras_alds import ALDSCompress, CalibrationStats, apply_plan, compress, litert, select

OFF = "seem to be of another scale than the training data: the inputs of BatchNormalization 'bn'"


def images(count=64, seed=0):
    """Images in 0–1, and labels."""
    rng = np.random.default_rng(seed)
    shades = rng.random((count, 1, 1, 3)) * np.linspace(0.2, 1, zoo.IMAGE[0])[:, None, None]
    return (shades + 0.3 * rng.random((count, *zoo.IMAGE))).astype("float32"), rng.integers(
        0, 10, count
    )


@pytest.fixture
def trained(keras_module):
    """A function that returns a model after some epochs of training."""

    def make(epochs=2, scale=1.0):
        keras_module.utils.set_random_seed(0)
        model = zoo.functional(keras_module)
        model.compile("sgd", "sparse_categorical_crossentropy")
        x, y = images()
        if epochs:
            model.fit(scale * x, y, epochs=epochs, batch_size=16, verbose=0)
        return model

    return make


def settle(K, model):
    """The model, not compiled, with moving averages as after a long training."""
    weights, model = model.get_weights(), K.models.clone_model(model)
    model.set_weights(weights)
    norm = model.get_layer("bn")
    inputs = np.asarray(model.get_layer("stem")(images()[0]))
    norm.moving_mean.assign(inputs.mean((0, 1, 2)))
    norm.moving_variance.assign(inputs.var((0, 1, 2)))
    return model


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Without retraining")
        return function(*arguments, **options)


@pytest.mark.parametrize("epochs", [0, 2, 8])
def test_right_data_give_no_warning_however_long_the_training(trained, epochs):
    model = trained(epochs)
    quietly(select, model, 0.3, calibration_data=images(seed=1)[0])
    quietly(select, model, 0.3, calibration_data=images(8, seed=2)[0])


def test_right_data_of_a_settled_model_that_is_compiled_anew(keras_module, trained):
    model = settle(keras_module, trained())
    quietly(select, model, 0.3, calibration_data=images(8, seed=1)[0])
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = images()
    model.fit(x, y, epochs=1, batch_size=16, verbose=0)
    quietly(select, model, 0.3, calibration_data=x)


@pytest.mark.parametrize(("scale", "text"), [(255, r"vary 2\d\d times"), (1 / 255, r"vary 0\.\d")])
def test_data_of_another_scale_warn(keras_module, trained, scale, text):
    model = settle(keras_module, trained())
    x, plan = images(seed=1)[0], select(model, 0.3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        select(model, 0.3, calibration_data=scale * x)
        compress(model, plan=plan, calibration_data=scale * x)
        compress(model, plan=plan, calibration_data=scale * x, sequential=False)
        CalibrationStats.collect(model, tf.data.Dataset.from_tensor_slices(scale * x).batch(8))
        apply_plan(model, plan, calibration_data=(scale * x[i : i + 8] for i in range(0, 64, 8)))
    found = [item for item in caught if "another scale" in str(item.message)]
    assert len(found) == 5
    assert all(re.match(f"The examples {OFF} {text}", str(item.message)) for item in found)
    assert {item.filename for item in found} == {__file__}


def test_representative_data(keras_module, trained):
    pytest.importorskip("ai_edge_litert")
    small = compress(settle(keras_module, trained()), 0.3, max_slices=1)
    x = images(16, seed=1)[0]
    options = {"quantize": "int8", "verbose": 0}
    quietly(litert.convert, small, representative_data=x, **options)
    with pytest.warns(UserWarning, match=OFF) as caught:
        litert.convert(small, representative_data=255 * x, **options)
    assert caught[0].filename == __file__


def test_after_a_short_training_it_is_still_seen(trained):
    with pytest.warns(UserWarning, match=OFF):
        select(trained(8), 0.3, calibration_data=255 * images()[0])


def test_in_training_the_data_of_fit_are_compared(keras_module):
    L = keras_module.layers
    x, y = images()
    made = [L.Conv2D(16, 3), L.GlobalAveragePooling2D(), L.Dense(32), L.Dense(10)]
    model = keras_module.Sequential([keras_module.Input(zoo.IMAGE), *made])
    model.compile("sgd", "sparse_categorical_crossentropy")

    def fit(data, x):
        model.fit(
            x,
            y,
            verbose=0,
            callbacks=[ALDSCompress(0.3, at_epoch=1, max_slices=1, **data, verbose=0)],
        )

    with pytest.warns(UserWarning, match=r"they vary 2[45]\d times as much"):
        fit({"calibration_data": (255 * x)[:16]}, x)
    for data in (x[:16], [x[:16]], lambda: [x[:8], x[8:16]], tf.data.Dataset.from_tensors(x)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "The model (was not|will not be) compressed")
            fit({"calibration_data": data}, x)


def test_in_training_inputs_are_compared_by_name(keras_module):
    K, L = keras_module, keras_module.layers

    class Net(K.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.wide, self.head = L.Dense(32), L.Dense(8)

        def call(self, inputs, training=False):
            x = self.wide(inputs["second"])
            return self.head(x + inputs["first"] if "first" in inputs else x)

    rows = np.random.default_rng(0).standard_normal((2, 64, 32)).astype("float32")
    data = {"second": rows[0], "first": rows[1]}

    def symbolic():
        inputs = {name: K.Input((32,), name=name) for name in data}
        joined = L.Add()([L.Dense(32)(inputs["second"]), inputs["first"]])
        return K.Model([*inputs.values()], L.Dense(8)(joined))

    def python():
        model = Net()
        model(data)
        return model

    def fit(make, given):
        alds = ALDSCompress(0.3, at_epoch=0, calibration_data=given, verbose=0)
        model = make()
        model.compile("sgd", "mse", run_eagerly=True)
        model.fit(data, np.zeros((64, 8)), verbose=0, callbacks=[alds])

    for make, given in (
        (symbolic, [rows[0], 255 * rows[1]]),
        (python, {"second": 255 * rows[0]}),
        (python, {"first": 255 * rows[1], "second": rows[0]}),
    ):
        with pytest.warns(UserWarning, match=r"they vary 2[45]\d times as much"):
            fit(make, given)
    for make, given in ((symbolic, [*rows]), (python, {"second": rows[0]})):
        quietly(fit, make, given)
