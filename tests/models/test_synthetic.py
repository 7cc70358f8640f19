"""Synthetic examples in place of calibration data."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from keras_alds import ALDSCompress, CompressionPlan, apply_plan, compress, count_macs, select
from keras_alds._backend.calls import replaced_calls, watched
from keras_alds.models import synthetic
from keras_alds.models.inventory import Inventory
from keras_alds.models.synthetic import Synthetic, noise, unsuitable

SHAPE = (24, 24, 3)


def images(count=64, seed=1):
    """Smooth images in 0–255."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, *SHAPE))
    for axis in (1, 2):
        x = np.cumsum(x, axis=axis)
        x -= x.mean(axis=axis, keepdims=True)
    x = x.mean(axis=-1, keepdims=True) + 0.3 * x
    return (100 + 40 * x / x.std()).astype("float32")


def settle(model, x):
    """Gives every BatchNormalization the statistics of its inputs, the first one first."""
    for layer in model.layers:
        if hasattr(layer, "moving_mean"):

            def see(norm, inputs, outputs):
                values = inputs.numpy()
                axes = tuple(range(values.ndim - 1))
                norm.moving_mean.assign(values.mean(axes))
                norm.moving_variance.assign(values.var(axes))
                return outputs

            with replaced_calls(watched([layer], see)):
                model(x, training=False)
    return model


@pytest.fixture
def network(keras_module):
    """A network with random weights, and BatchNormalization that knows the images."""
    K, layers = keras_module, keras_module.layers
    K.utils.set_random_seed(3)
    inputs = y = K.Input(SHAPE)
    for n, filters in enumerate((12, 16, 24)):
        y = layers.Conv2D(filters, 3, padding="same", name=f"conv{n}")(y)
        y = layers.BatchNormalization(
            name=f"norm{n}", beta_initializer=K.initializers.Constant(0.3)
        )(y)
        y = layers.ReLU()(y)
        y = layers.MaxPooling2D()(y)
    y = layers.GlobalAveragePooling2D()(y)
    model = K.Model(inputs, layers.Dense(12, name="head")(y))
    return settle(model, images(seed=0))


def error(model, small, x):
    before, after = model(x, training=False).numpy(), small(x, training=False).numpy()
    return np.square(after - before).sum() / np.square(before - before.mean(0)).sum()


@pytest.mark.parametrize("shape", [(50, 2), (16, 12, 3), (6, 7, 8, 1)])
def test_noise_is_standardized_and_always_the_same(shape):
    x = noise(12, shape)
    axes = tuple(range(len(shape)))
    np.testing.assert_allclose(x.mean(axes), 0, atol=1e-9)
    np.testing.assert_allclose(x.std(axes), 1)
    np.testing.assert_array_equal(x, noise(12, shape))
    assert not np.allclose(x, noise(12, shape, seed=1))
    neighbours = np.corrcoef(x[:, 1:, ..., 0].ravel(), x[:, :-1, ..., 0].ravel())[0, 1]
    assert neighbours > 0.5, "it is smooth"


def test_examples_have_the_scale_of_the_training_data(network):
    made, x = Synthetic(network), images()
    assert made.examples.shape == (256, *SHAPE)
    assert made.examples.dtype == np.float32
    spread = made.examples.std() / x.std()
    assert 0.5 < spread < 2
    assert abs(made.examples.mean() - x.mean()) < x.std()
    assert made.probes.shape[1:] == SHAPE
    assert not (made.probes[:1] == made.examples).all((1, 2, 3)).any()


def test_large_networks_are_probed_with_fewer_examples(network, monkeypatch):
    inventory = Inventory.of(network)
    stats = synthetic.synthetic_stats(inventory, curves=False, verbose=0)
    records = stats.match(inventory).candidates
    of_one = len(records) * count_macs(network)
    for budget, expected in ((1e6 * of_one, 16), (6.5 * of_one, 6), (of_one, 4)):
        monkeypatch.setattr(synthetic, "_PROBED_MACS", budget)
        assert synthetic._affordable(records, stats.examples) == expected


def test_every_batch_normalization_sees_its_moving_statistics(network):
    made = Synthetic(network)
    norms = [layer for layer in network.layers if hasattr(layer, "moving_mean")]
    outputs = {}

    def see(layer, inputs, found):
        outputs[layer] = found.numpy()
        return found

    with replaced_calls(made.normalized(), watched(norms, see)):
        network(made.examples[:64], training=False)
    assert len(outputs) == 3
    for layer, values in outputs.items():
        np.testing.assert_allclose(values.mean((0, 1, 2)), layer.beta.numpy(), atol=0.1)
        np.testing.assert_allclose(values.std((0, 1, 2)), 1, atol=0.1)


def test_better_than_the_weights_alone(network):
    x, before = images(seed=5), [w.copy() for w in network.get_weights()]
    for cr in (0.4, 0.6):
        small = compress(network, cr, method="synthetic")
        blind = compress(network, cr, method="energy")
        assert error(network, small, x) < 0.7 * error(network, blind, x)
    for old, new in zip(before, network.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_default_without_data_and_the_same_every_time(network, monkeypatch):
    plan = select(network, 0.3)
    assert plan.method == "synthetic"
    assert any(choice.divergence for choice in plan.choices)

    def fail(model):
        raise AssertionError("the statistics are made again")

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "Synthetic", fail)
        assert select(network, 0.3) == plan
    synthetic._CACHE.clear()
    assert select(network, 0.3) == plan
    synthetic._CACHE.clear()
    small = compress(network, plan=CompressionPlan.from_dict(plan.to_dict()))
    other = compress(network, 0.3)
    for mine, theirs in zip(small.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    network.get_layer("conv1").kernel.assign(network.get_layer("conv1").kernel * 2)
    monkeypatch.setattr(synthetic, "Synthetic", fail)
    with pytest.raises(AssertionError, match="made again"):
        select(network, 0.3)


def test_a_plan_fits_a_new_instance_before_its_weights_are_loaded(network, keras_module):
    plan = select(network, 0.3)
    new = keras_module.models.clone_model(network)  # its BatchNormalization is not trained
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_plan(new, plan)
    assert new.count_params() == compress(network, plan=plan).count_params()


def test_in_fit(network, keras_module):
    network.compile("sgd", "sparse_categorical_crossentropy")
    callback = ALDSCompress(0.4, at_epoch=1, verbose=0)
    network.fit(images(32), np.arange(32) % 12, epochs=2, verbose=0, callbacks=[callback])
    assert callback.plan.method == "synthetic"
    assert callback.plan.cr >= 0.4


def unsuitable_models(K):
    """Models for which no synthetic examples can be made, and a part of the reason."""
    layers = K.layers
    norm = layers.BatchNormalization

    def conv(shape, *more, **options):
        inputs = K.Input(shape, **options)
        y = layers.Conv2D(8, 3)(inputs)
        for layer in more:
            y = layer(y)
        return K.Model(inputs, layers.Dense(16)(layers.GlobalAveragePooling2D()(y)))

    first, second = K.Input((8, 8, 3)), K.Input((8, 8, 3))
    y = layers.Conv2D(8, 3)(layers.Add()([first, second]))
    tokens = K.Input((9,), dtype="int32")
    z = layers.Dense(16)(layers.Embedding(30, 8)(tokens))
    table = K.Input((20,))
    return [
        (conv(SHAPE), "few BatchNormalization layers, or none"),
        (conv(SHAPE, norm()), "not trained"),
        (conv((None, None, 3), norm()), "images or signals of a known size"),
        (K.Model([first, second], norm()(y)), "not one tensor of floating-point numbers"),
        (K.Model(tokens, z), "not one tensor of floating-point numbers"),
        (K.Model(table, layers.Dense(16)(norm()(table))), "images or signals of a known size"),
    ]


def test_other_models_are_compressed_by_their_weights_with_a_warning(keras_module):
    for model, reason in unsuitable_models(keras_module):
        assert reason in unsuitable(Inventory.of(model))
        with pytest.raises(ValueError, match=f"another method than 'synthetic'.*{reason}"):
            compress(model, 0.15, method="synthetic")
        text = rf"remove more than 10% without.*the weights alone, as .*{reason}"
        with pytest.warns(UserWarning, match=text) as found:
            small = compress(model, 0.15)
        assert found[0].filename == __file__
        named = compress(model, 0.15, method="energy")
        for mine, theirs in zip(small.get_weights(), named.get_weights(), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_warns_of_much_without_data_only(network):
    text = "remove more than 30% without retraining.*made from noise"
    with pytest.warns(UserWarning, match=text) as found:
        compress(network, 0.4)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Without retraining")
        compress(network, 0.3)
        compress(network, 0.4, method="synthetic")
        select(network, 0.4)
        compress(network, 0.4, calibration_data=images(), sequential=False)


def test_schemes_use_noise_and_error_measures_the_weights(network):
    plan = select(network, 0.3)
    assert plan.method == "synthetic"
    assert {choice.scheme for choice in plan.factorized} != {0}
    for own, every in zip(plan.choices, select(network, 0.3, schemes="all").choices, strict=True):
        assert (own.scheme, own.slices, own.rank) == (every.scheme, every.slices, every.rank)
    assert select(network, 0.3, error_measure="spectral").method == "alds"
    assert compress(network, 0.3, error_measure="energy").count_params() < network.count_params()
    with pytest.raises(ValueError, match="Expected no `error_measure` with the method 'synthetic'"):
        select(network, 0.3, method="synthetic", error_measure="slice")
