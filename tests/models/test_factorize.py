"""Factorized layers of stock ones: equal at full rank, with their settings."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

import keras_alds
from keras_alds import compress
from keras_alds.kinds.base import is_factorized


def value(tensor):
    return np.asarray(tf.convert_to_tensor(tensor))


class TestFullRank:
    """At full rank of every slice the factorized layer computes what the stock layer does."""

    OPTIONS = (
        ("Conv2D", {"filters": 8, "kernel_size": 3}, (9, 9, 4)),
        ("Conv2D", {"filters": 8, "kernel_size": (3, 1), "strides": (2, 1)}, (9, 9, 4)),
        ("Conv2D", {"filters": 8, "kernel_size": 3, "padding": "same", "strides": 2}, (9, 9, 4)),
        ("Conv2D", {"filters": 8, "kernel_size": 3, "dilation_rate": 2}, (9, 9, 4)),
        ("Conv2D", {"filters": 8, "kernel_size": 3, "use_bias": False}, (9, 9, 4)),
        ("Conv2D", {"filters": 8, "kernel_size": 3, "activation": "tanh"}, (9, 9, 4)),
        ("Conv2D", {"filters": 8, "kernel_size": 1}, (9, 9, 4)),
        ("Conv1D", {"filters": 8, "kernel_size": 3, "padding": "causal"}, (9, 4)),
        ("Conv1D", {"filters": 8, "kernel_size": 3, "padding": "same", "strides": 2}, (9, 4)),
        ("Conv1D", {"filters": 8, "kernel_size": 3, "dilation_rate": 2}, (9, 4)),
        ("Dense", {"units": 8, "activation": "relu"}, (4,)),
        ("Dense", {"units": 8, "use_bias": False}, (5, 6, 4)),
    )

    @pytest.mark.parametrize(("kind", "options", "shape"), OPTIONS)
    @pytest.mark.parametrize("slices", [1, 2, 4])
    def test_equals_the_stock_layer(self, keras_module, kind, options, shape, slices):
        keras_module.utils.set_random_seed(0)
        layer = getattr(keras_module.layers, kind)(
            **options, bias_initializer="uniform" if options.get("use_bias", True) else "zeros"
        )
        x = np.random.default_rng(0).standard_normal((3, *shape)).astype("float32")
        expected = value(layer(x))
        kernel = tuple(layer.kernel.shape)
        rank = min(int(np.prod(kernel[:-1])) // slices, kernel[-1])
        choice = keras_alds.LayerChoice(layer.name, kind, kernel, slices, rank, 0, {}, 0.0, None)
        result = value(zoo.factorized_layer(layer, choice)(x))
        assert np.abs(result - expected).max() <= 1e-4 * np.abs(expected).max()


class TestSettings:
    def test_settings_carry_over(self, keras_module):
        L, K = keras_module.layers, keras_module
        layer = L.Conv2D(
            16,
            3,
            kernel_regularizer=K.regularizers.L2(1e-3),
            bias_regularizer=K.regularizers.L1(1e-4),
            bias_constraint=K.constraints.MaxNorm(2.0),
            activity_regularizer=K.regularizers.L2(1e-5),
            kernel_initializer="he_normal",
            name="conv",
        )
        model = K.Sequential([K.Input((8, 8, 8)), layer])
        made = compress(model, 0.4).get_layer("conv")
        assert type(made).__name__ == "FactorizedConv2D"
        assert made.name == "conv"
        for factor in ("encoder", "decoder"):
            config = getattr(made, f"{factor}_regularizer").get_config()
            assert config["l2"] == pytest.approx(1e-3)
            assert type(getattr(made, f"{factor}_initializer")).__name__ == "HeNormal"
        assert made.bias_regularizer.get_config()["l1"] == pytest.approx(1e-4)
        assert made.bias_constraint.get_config()["max_value"] == 2.0
        assert made.activity_regularizer is not None

    def test_frozen_layers_stay_frozen(self, small):
        small.get_layer("down").trainable = False
        compressed = compress(small, 0.4)
        assert is_factorized(compressed.get_layer("down"))
        assert compressed.get_layer("down").trainable is False
        assert compressed.get_layer("hidden").trainable is True
        assert not compressed.get_layer("down").trainable_weights
        compressed.get_layer("down").trainable = True
        assert len(compressed.get_layer("down").trainable_weights) == 3

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
    def test_dtype_policies(self, keras_module, policy):
        K = keras_module
        layer = K.layers.Conv2D(16, 3, dtype=policy, name="conv")
        model = K.Sequential([K.Input((8, 8, 8)), layer])
        compressed = compress(model, 0.4)
        made = compressed.get_layer("conv")
        assert made.compute_dtype == layer.compute_dtype
        x = np.random.default_rng(0).standard_normal((2, 8, 8, 8)).astype("float32")
        assert value(compressed(x)).dtype == value(model(x)).dtype

    def test_variables_that_are_frozen_one_by_one(self):
        layer = keras.layers.Dense(16, name="partly")
        model = keras.Sequential([keras.Input((16,)), layer, keras.layers.Dense(4)])
        layer.kernel.trainable = False
        small = compress(model, 0.3).get_layer("partly")
        assert [v.trainable for v in (small.encoder, small.decoder, small.bias)] == [
            False,
            False,
            True,
        ]
