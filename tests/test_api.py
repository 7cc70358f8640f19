"""`select`, `compress` and `apply_plan`: what they have in common."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import zoo

from keras_alds import CalibrationStats, apply_plan, compress, select


class Block(keras.layers.Layer):
    """A layer that makes another one in code."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = keras.layers.Dense(16)

    def call(self, x):
        return self.inner(x)


@pytest.fixture(scope="module")
def model():
    return zoo.functional(keras)


@pytest.fixture(scope="module")
def statistics(model):
    stats = CalibrationStats.collect(model, zoo.images(16)[0], verbose=0)
    bias = model.get_layer("head").bias
    bias.assign(np.asarray(bias) + 1)  # no input of a kernel changes, and the weights do
    return stats


def unmatched(model, statistics):
    options = {"exclude": "nothing", "bounds": {"none": (None, 0.5)}}
    select(model, 0.4, **options)
    compress(model, 0.4, **options)


def other_weights(model, statistics):
    plan = select(model, 0.4, calibration_data=statistics)
    compress(model, 0.4, calibration_data=statistics)
    compress(model, plan=plan, calibration_data=statistics)


def no_data(model, statistics):
    plan = dataclasses.replace(select(model, 0.4), method="activation")
    compress(model, plan=plan)


def code(model, statistics):
    coded = keras.Sequential([keras.Input((32,)), Block()])
    compress(coded, 0.4)
    apply_plan(coded, select(coded, 0.4))


@pytest.mark.parametrize(
    ("function", "text", "count"),
    [
        (unmatched, "entry .* matches no layer", 4),
        (other_weights, "other weights", 3),
        (no_data, "there are none to make the factors with", 1),
        (code, "are made in code", 2),
    ],
)
def test_warnings_name_the_callers_line(function, text, count, model, statistics):
    with pytest.warns(UserWarning, match=text) as caught:
        function(model, statistics)
    assert [warning.filename for warning in caught] == [__file__] * count
