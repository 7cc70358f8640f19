"""Models that were compressed in training are saved, copied, exported and restored."""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile

import numpy as np
import pytest
import tensorflow as tf
from fitting import EAGER, OPTIMIZERS, compiled, factorized, fit, value

from keras_alds import ALDSCompress, apply_plan, compress, select


def trained_through(K, optimizer, plan=None):
    """A small model that `ALDSCompress` compressed, and the plan; dense epochs only without one."""
    L = K.layers
    layers = [K.Input((48,)), L.Dense(64, name="a"), L.BatchNormalization(name="n")]
    model = K.Sequential([*layers, L.Dense(64, name="b"), L.Dense(3, name="c")], name="m")
    model.compile(optimizer, "mse", **EAGER)
    x = np.random.default_rng(0).normal(size=(32, 48)).astype("float32")
    if plan is None:
        model.fit(x, x[:, :3], verbose=0)
        with tempfile.TemporaryDirectory() as folder:
            saved(model).write(f"{folder}/dense")  # tf_keras remembers what a checkpoint held
    callback = ALDSCompress(0.4 if plan is None else None, plan=plan, verbose=0, at_epoch=0)
    model.fit(x, x[:, :3], epochs=2, callbacks=[callback], verbose=0)
    return model, callback.plan, x


def saved(model):
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


def state_of(optimizer):
    variables = optimizer.variables
    return [value(v) for v in (variables() if callable(variables) else variables)]


STATEFUL = {
    **{name: OPTIMIZERS[name] for name in ("sgd", "adam", "adamw", "nadam", "rmsprop", "ema")},
    "scaled": lambda K: (
        K.optimizers.LossScaleOptimizer
        if K.__name__ == "keras"
        else K.mixed_precision.LossScaleOptimizer
    )(K.optimizers.Adam(1e-3)),
    "accumulated": lambda K: K.optimizers.Adam(1e-3, gradient_accumulation_steps=2),
}


VECTORS = np.random.default_rng(0).normal(size=(16, 32)).astype("float32")


@pytest.fixture(scope="module")
def walked():
    """A function that makes a compressed model which was trained before and after.

    It is an autoencoder of models, with a layer that is called twice. With `apply_plan` it is
    another model round the encoder of such a one.
    """

    @functools.cache
    def make(K, way):
        L = K.layers
        encoder = K.Sequential([K.Input((32,)), L.Dense(48, "relu"), L.Dense(24)], name="encoder")
        decoder = K.Sequential([K.Input((24,)), L.Dense(48, "relu"), L.Dense(32)], name="decoder")
        inputs, twice = K.Input((32,)), L.Dense(32, name="twice")
        whole = K.Model(inputs, decoder(encoder(twice(twice(inputs)))))
        beside = K.Model(inputs, L.Dense(32, name="head")(encoder(inputs)))
        for model, optimizer in ((whole, "adam"), (beside, K.optimizers.SGD(0.01, momentum=0.9))):
            model.compile(optimizer, K.losses.MeanSquaredError(), **EAGER)
            model.fit(VECTORS, VECTORS, verbose=0)
        callbacks = [ALDSCompress(0.3, at_epoch=1, verbose=0)] if way == "fit" else []
        if way == "apply_plan":
            apply_plan(whole, select(whole, 0.3))
        model = {"fit": whole, "apply_plan": beside}.get(way) or compress(whole, 0.3)
        model.fit(VECTORS, VECTORS, epochs=2, verbose=0, callbacks=callbacks)
        assert factorized(model)
        return model

    return make


def with_weights(model, other):
    other.set_weights(model.get_weights())
    return other(VECTORS)


def through_cloudpickle(K, model, folder):
    cloudpickle = pytest.importorskip("cloudpickle")
    return cloudpickle.loads(cloudpickle.dumps(model))(VECTORS)


def through_an_export(K, model, folder):
    model.export(str(folder / "exported"))
    exported = tf.saved_model.load(str(folder / "exported"))
    return exported.serve(VECTORS)


def through_an_archive(K, model, folder):
    archive = K.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", model.call, [tf.TensorSpec((None, 32))])
    archive.write_out(str(folder / "archive"))
    exported = tf.saved_model.load(str(folder / "archive"))
    return exported.serve(VECTORS)


def through_weights(K, model, folder):
    model.save_weights(str(folder / "model.weights.h5"))
    other = K.models.clone_model(model)
    other.load_weights(str(folder / "model.weights.h5"))
    return other(VECTORS)


def through_a_checkpoint(K, model, folder):
    other = copy.deepcopy(model)
    path = tf.train.Checkpoint(model=model).save(str(folder / "checkpoint"))
    other.set_weights([weight * 0 for weight in other.get_weights()])
    tf.train.Checkpoint(model=other).restore(path).assert_existing_objects_matched()
    return other(VECTORS)


def to_a_plot(K, model, folder):
    pytest.importorskip("pydot")
    K.utils.model_to_dot(model, expand_nested=True, show_shapes=True).to_string()


WALKS = {
    "deepcopy": lambda K, model, folder: copy.deepcopy(model)(VECTORS),
    "pickle": lambda K, model, folder: pickle.loads(pickle.dumps(model))(VECTORS),
    "cloudpickle": through_cloudpickle,
    "clone": lambda K, model, folder: with_weights(model, K.models.clone_model(model)),
    "config": lambda K, model, folder: with_weights(
        model, type(model).from_config(model.get_config())
    ),
    "summary": lambda K, model, folder: model.summary(expand_nested=True, print_fn=str),
    "plot": to_a_plot,
    "export": through_an_export,
    "archive": through_an_archive,
    "saved_model": lambda K, model, folder: tf.saved_model.save(model, str(folder / "saved")),
    "weights": through_weights,
    "checkpoint": through_a_checkpoint,
}


class TestSavedAfterwards:
    @pytest.mark.parametrize("name", list(STATEFUL))
    def test_checkpoints_and_saved_models(self, keras_module, name, tmp_path):
        K = keras_module
        if name == "accumulated" and K.__name__ != "keras":
            pytest.skip("tf_keras does not accumulate gradients")
        make = STATEFUL[name]
        model, plan, _ = trained_through(K, make(K))
        path = saved(model).save(str(tmp_path / "checkpoint"))
        other, *_ = trained_through(K, make(K), plan)
        saved(other).restore(path).assert_existing_objects_matched()
        for a, b in zip(state_of(model.optimizer), state_of(other.optimizer), strict=True):
            np.testing.assert_array_equal(a, b)
        tf.saved_model.save(model, str(tmp_path / "saved"))

    @pytest.mark.parametrize("way", ["fit", "compress", "apply_plan"])
    @pytest.mark.parametrize("name", list(WALKS))
    def test_whatever_walks_the_model(self, walked, keras_module, way, name, tmp_path):
        model = walked(keras_module, way)
        result = WALKS[name](keras_module, model, tmp_path)
        if result is not None:
            np.testing.assert_allclose(value(result), value(model(VECTORS)), rtol=0, atol=1e-5)

    def test_state_of_a_legacy_optimizer_is_loaded(self, tmp_path):
        K = pytest.importorskip("tf_keras")
        model, *_ = trained_through(K, OPTIMIZERS["legacy_adam"](K))
        model.save(tmp_path / "model.h5")
        loaded = K.models.load_model(tmp_path / "model.h5")
        for a, b in zip(state_of(model.optimizer), state_of(loaded.optimizer), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("name", ["adam", "nadam", "scaled"])
    def test_after_a_failure(self, keras_module, monkeypatch, name, tmp_path):
        from keras_alds import apply_plan
        from keras_alds.models import optimizer as module

        def fail(*_):
            raise MemoryError

        make, models = STATEFUL[name], []
        for _ in range(2):
            model = compiled(keras_module, make(keras_module), **EAGER)
            fit(model, [], epochs=1)
            models.append(model)
        model, other = models
        monkeypatch.setattr(module, "_carry", fail)
        with pytest.raises(MemoryError):
            apply_plan(model, select(model, 0.4))
        fit(model, [], epochs=1)
        path = saved(model).save(str(tmp_path / "checkpoint"))
        saved(other).restore(path).assert_existing_objects_matched()
        for a, b in zip(state_of(model.optimizer), state_of(other.optimizer), strict=True):
            np.testing.assert_array_equal(a, b)
