"""The contract of every layer: arguments, errors, config, precision, training."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from layer_contract import FORMS, KERASES, as_array, check_layer, randomize, tf_variable


@pytest.fixture(params=list(KERASES))
def side(request):
    return KERASES[request.param]


CONTRACT = [
    (
        "FactorizedConv1D",
        {"filters": 6, "kernel_size": 3, "slices": 2, "rank": 2},
        (4, 9, 4),
        (4, 7, 6),
        [(3, 2, 4), (1, 4, 6), (6,)],
    ),
    (
        "FactorizedConv2D",
        {
            "filters": 6,
            "kernel_size": (3, 2),
            "slices": 2,
            "rank": 2,
            "strides": (2, 1),
            "padding": "same",
            "activation": "tanh",
        },
        (4, 9, 8, 4),
        (4, 5, 8, 6),
        [(3, 2, 2, 4), (1, 1, 4, 6), (6,)],
    ),
    (
        "FactorizedConv2D",
        {"filters": 4, "kernel_size": 3, "slices": 4, "rank": 3, "use_bias": False},
        (4, 5, 5, 4),
        (4, 3, 3, 4),
        [(3, 3, 1, 12), (1, 1, 12, 4)],
    ),
    (
        "FactorizedConv2D",
        {"filters": 4, "kernel_size": (3, 2), "slices": 2, "rank": 2, "strides": 2, "scheme": 1},
        (4, 7, 6, 4),
        (4, 3, 3, 4),
        [(1, 2, 2, 4), (3, 1, 4, 4), (4,)],
    ),
    (
        "FactorizedConv1D",
        {"filters": 4, "kernel_size": 3, "slices": 2, "rank": 2, "padding": "causal", "scheme": 3},
        (4, 7, 4),
        (4, 7, 4),
        [(1, 2, 4), (3, 4, 4), (4,)],
    ),
    (
        "TuckerConv2D",
        {"filters": 6, "kernel_size": (3, 2), "input_rank": 2, "rank": 3, "strides": (2, 1)},
        (4, 9, 8, 4),
        (4, 4, 7, 6),
        [(1, 1, 4, 2), (3, 2, 2, 3), (1, 1, 3, 6), (6,)],
    ),
    (
        "CPConv2D",
        {"filters": 6, "kernel_size": (3, 2), "rank": 3, "padding": "same", "use_bias": False},
        (4, 9, 8, 4),
        (4, 9, 8, 6),
        [(1, 1, 4, 3), (3, 1, 1, 3), (1, 2, 1, 3), (1, 1, 3, 6)],
    ),
    (
        "FactorizedDense",
        {"units": 5, "slices": 3, "rank": 2, "encoder_form": "split"},
        (8, 9),
        (8, 5),
        [(3, 6), (6, 5), (5,)],
    ),
    (
        "FactorizedDense",
        {"units": 5, "slices": 1, "rank": 2},
        (8, 3, 4, 6),
        (8, 3, 4, 5),
        [(6, 2), (2, 5), (5,)],
    ),
]


@pytest.mark.parametrize(("name", "arguments", "input_shape", "output_shape", "weights"), CONTRACT)
def test_contract(side, name, arguments, input_shape, output_shape, weights):
    check_layer(side, name, arguments, input_shape, output_shape, weights)


def make(side, kind, **options):
    """A layer of each kind and an input that fits it."""
    arguments = {"slices": 2, "rank": 2, **options}
    if kind == "Dense":
        return side.layers.FactorizedDense(5, **arguments), (3, 8)
    dimensions = int(kind[4])
    cls = getattr(side.layers, f"Factorized{kind}")
    return cls(5, 3, **arguments), (3, *(7, 6)[:dimensions], 8)


KINDS = ("Conv1D", "Conv2D", "Dense")


@pytest.mark.parametrize("kind", KINDS)
def test_regularizers_constraints_and_initializers_reach_their_weights(side, kind):
    regularizers, constraints = side.keras.regularizers, side.keras.constraints
    layer, shape = make(
        side,
        kind,
        encoder_initializer="ones",
        decoder_initializer=side.keras.initializers.Constant(0.5),
        bias_initializer="ones",
        encoder_regularizer=regularizers.L2(0.1),
        decoder_regularizer="l1",
        bias_regularizer=regularizers.L2(0.3),
        activity_regularizer=regularizers.L2(0.2),
        encoder_constraint=constraints.NonNeg(),
        decoder_constraint=constraints.MaxNorm(0.1),
        bias_constraint="non_neg",
    )
    x = np.ones(shape, "float32")
    y = as_array(layer(x))
    encoder, decoder, bias = layer.get_weights()
    assert (encoder == 1).all()
    assert (decoder == 0.5).all()
    assert (bias == 1).all()
    losses = sorted(float(loss) for loss in layer.losses)
    expected = [0.1 * encoder.size, 0.01 * 0.5 * decoder.size, 0.3 * bias.size]
    # A stock layer's penalty for the same activity: whether it is a mean over the batch depends on
    # the version of Keras.
    stock = side.keras.layers.Activation("linear", activity_regularizer=regularizers.L2(0.2))
    stock(y)
    expected.append(float(stock.losses[0]))
    np.testing.assert_allclose(losses, sorted(expected), rtol=1e-4)
    twin = type(layer).from_config(layer.get_config())
    assert twin.get_config() == layer.get_config()
    assert isinstance(twin.decoder_constraint, constraints.MaxNorm)

    model = side.keras.Sequential([side.keras.Input(shape[1:]), layer])
    model.compile(side.keras.optimizers.SGD(10.0), "mse")
    model.fit(x, -np.ones_like(y), verbose=0)
    encoder, decoder, bias = layer.get_weights()
    assert (encoder >= 0).all()
    assert (bias >= 0).all()
    assert np.linalg.norm(decoder, axis=0).max() <= 0.1 + 1e-5


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_precision(side, kind, policy, form):
    layer, shape = make(side, kind, dtype=policy, encoder_form=form)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    compute = {"mixed_float16": tf.float16, "mixed_bfloat16": tf.bfloat16}.get(policy, tf.float64)
    y = layer(x)
    assert y.dtype == compute
    randomize(layer)
    y = layer(x)
    variable = "float64" if policy == "float64" else "float32"
    assert all(tf.as_dtype(w.dtype).name == variable for w in layer.weights)
    reference, _ = make(side, kind)
    reference.build(shape)
    reference.set_weights(layer.get_weights())
    tolerance = {"mixed_float16": 2e-2, "mixed_bfloat16": 1.5e-1, "float64": 1e-5}[policy]
    np.testing.assert_allclose(
        tf.cast(y, tf.float64), as_array(reference(x)), rtol=tolerance, atol=tolerance
    )
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.cast(layer(x, training=True), tf.float32) ** 2)
    for gradient in tape.gradient(loss, [tf_variable(w) for w in layer.trainable_weights]):
        assert np.isfinite(as_array(gradient)).all()
        assert np.abs(as_array(gradient)).max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_is_differentiable_and_in_the_variables_dtype(side, kind):
    layer, shape = make(side, kind, dtype="mixed_float16")
    with pytest.raises(AttributeError, match="build"):
        _ = layer.kernel
    layer.build(shape)
    with tf.GradientTape() as tape:
        kernel = layer.kernel
        loss = tf.reduce_sum(kernel**2)
    assert kernel.dtype == tf.float32
    for gradient in tape.gradient(loss, [tf_variable(w) for w in layer.weights[:2]]):
        assert np.abs(as_array(gradient)).max() > 0


def test_frozen_layer_stays_frozen(side):
    layer, shape = make(side, "Conv2D")
    layer.trainable = False
    head = side.keras.layers.GlobalAveragePooling2D()
    model = side.keras.Sequential(
        [side.keras.Input(shape[1:]), layer, head, side.keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    before = layer.get_weights()
    model.fit(np.ones(shape, "float32"), np.ones((3, 1)), verbose=0)
    assert layer.trainable_weights == []
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_image_data_format_of_the_configuration_is_the_default(side):
    backend = side.keras.backend
    try:
        backend.set_image_data_format("channels_first")
        layer, _ = make(side, "Conv2D")
    finally:
        backend.set_image_data_format("channels_last")
    assert layer.data_format == "channels_first"
    assert make(side, "Conv2D")[0].data_format == "channels_last"


CONV_ERRORS = [
    ({"filters": 0}, r"`filters`.*Received: filters=0"),
    ({"filters": 2.5}, r"`filters`.*Received: filters=2.5"),
    ({"slices": 0}, r"`slices`.*Received: slices=0"),
    ({"slices": "2"}, r"`slices`.*Received: slices='2'"),
    ({"rank": 0}, r"`rank`.*Received: rank=0"),
    ({"rank": True}, r"`rank`.*Received: rank=True"),
    ({"kernel_size": 0}, r"`kernel_size`.*Received: kernel_size=0"),
    ({"kernel_size": (3, 3, 3)}, r"tuple of 2.*Received: kernel_size=\(3, 3, 3\)"),
    ({"strides": (1, 0)}, r"`strides`.*Received: strides=\(1, 0\)"),
    ({"strides": 2, "dilation_rate": 2}, r"Received: strides=\(2, 2\), dilation_rate=\(2, 2\)"),
    ({"padding": "causal"}, r"`padding`.*Received: padding='causal'"),
    ({"data_format": "last"}, r"`data_format`.*Received: data_format='last'"),
    ({"encoder_form": "fast"}, r"`encoder_form`.*Received: encoder_form='fast'"),
]


@pytest.mark.parametrize(("change", "message"), CONV_ERRORS)
def test_bad_arguments(side, change, message):
    arguments = {"filters": 4, "kernel_size": 3, "slices": 1, "rank": 1, **change}
    with pytest.raises(ValueError, match=message):
        side.layers.FactorizedConv2D(**arguments)


def test_bad_inputs(side):
    cls, dense = side.layers.FactorizedConv2D, side.layers.FactorizedDense
    with pytest.raises(ValueError, match="Received: slices=3, channels=4"):
        cls(4, 3, slices=3, rank=1).build((1, 8, 8, 4))
    with pytest.raises(ValueError, match=r"at most 18, .*Received: rank=19"):
        cls(64, 3, slices=2, rank=19).build((1, 8, 8, 4))
    with pytest.raises(ValueError, match=r"at most 4, .*Received: rank=5"):
        cls(4, 3, slices=1, rank=5).build((1, 8, 8, 4))
    with pytest.raises(ValueError, match=r"large enough.*Received: input_shape=\(1, 2, 8, 4\)"):
        cls(4, 3, slices=1, rank=1).build((1, 2, 8, 4))
    with pytest.raises(ValueError, match="Received: channels=None"):
        cls(4, 3, slices=1, rank=1).build((1, 8, 8, None))
    with pytest.raises(ValueError, match="Received: slices=3, channels=4"):
        dense(4, slices=3, rank=1).build((1, 4))
    with pytest.raises(ValueError, match="Received: rank=3"):
        dense(4, slices=2, rank=3).build((1, 4))
    layer = cls(4, 3, slices=2, rank=1)
    layer(np.ones((1, 8, 8, 4), "float32"))
    with pytest.raises(ValueError, match="axis"):
        layer(np.ones((1, 8, 8, 6), "float32"))
    with pytest.raises(ValueError, match="ndim"):
        layer(np.ones((1, 8, 4), "float32"))


def test_unknown_spatial_axes_and_time_distributed(side):
    layer = side.layers.FactorizedConv2D(5, 3, slices=2, rank=2, strides=2)
    inputs = side.keras.Input((None, None, 4))
    model = side.keras.Model(inputs, layer(inputs))
    assert tuple(model.output_shape) == (None, None, None, 5)
    x = np.random.default_rng(0).normal(size=(2, 9, 7, 4)).astype("float32")
    np.testing.assert_allclose(model.predict(x, verbose=0), as_array(layer(x)), rtol=1e-5)

    wrapped = side.keras.layers.TimeDistributed(side.layers.FactorizedDense(3, slices=2, rank=1))
    y = wrapped(x[:, :, 0])
    inner = wrapped.layer
    np.testing.assert_allclose(as_array(y), as_array(inner(x[:, :, 0])), rtol=1e-5, atol=1e-6)


def test_several_batch_axes(side):
    for data_format, shape in (
        ("channels_last", (2, 3, 7, 6, 4)),
        ("channels_first", (2, 3, 4, 7, 6)),
    ):
        layer = side.layers.FactorizedConv2D(5, 3, slices=2, rank=2, data_format=data_format)
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        y = as_array(layer(x))
        assert y.shape == tuple(layer.compute_output_shape(shape))
        for i in range(2):
            np.testing.assert_allclose(y[i], as_array(layer(x[i])), rtol=1e-5, atol=1e-5)


def test_dense_keeps_a_mask(side):
    layer = side.layers.FactorizedDense(3, slices=1, rank=2)
    embedded = side.keras.layers.Embedding(5, 4, mask_zero=True)(np.array([[1, 2, 0]]))
    y = layer(embedded)
    assert as_array(y._keras_mask).tolist() == [[True, True, False]]
