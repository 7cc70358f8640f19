"""`ALDSCompress` in models that train others: teachers and students, adversarial nets, VAEs."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import tensorflow as tf
from fitting import Spy, factorized, value

from keras_alds import ALDSCompress, apply_plan, compress, select
from keras_alds._backend import backend_of

X = np.random.default_rng(0).normal(size=(32, 48)).astype("float32")


def net(K, *widths, name, inputs=48):
    layers = [K.layers.Dense(width, "relu") for width in widths[:-1]]
    return K.Sequential([K.Input((inputs,)), *layers, K.layers.Dense(widths[-1])], name=name)


def step(tape, loss, weights, optimizer):
    optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))


def distiller(K):
    """A teacher and its student; the teacher has most of the parameters."""

    class Distiller(K.Model):
        def __init__(self):
            super().__init__()
            self.student = net(K, 64, 5, name="student")
            self.teacher = net(K, 96, 96, 5, name="teacher")
            self.teacher.trainable = False

        def call(self, x, training=False):
            return self.student(x, training=training)

        def train_step(self, data):
            x = data[0] if isinstance(data, tuple) else data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self.student(x, training=True) - self.teacher(x)))
            step(tape, loss, self.student.trainable_weights, self.optimizer)
            return {"distance": loss}

    model = Distiller()
    model.compile(K.optimizers.Adam(1e-2))
    return model


def adversaries(K):
    """Two nets with an optimizer each, and no `call`."""

    class GAN(K.Model):
        def __init__(self):
            super().__init__()
            self.generator = net(K, 64, 48, name="g", inputs=8)
            self.discriminator = net(K, 64, 1, name="d")

        def compile(self, g_optimizer, d_optimizer):
            super().compile(run_eagerly=True)
            self.g_optimizer, self.d_optimizer = g_optimizer, d_optimizer

        def train_step(self, data):
            x = data[0] if isinstance(data, tuple) else data
            noise = tf.random.normal([len(X), 8])
            with tf.GradientTape() as tape:
                fake = self.discriminator(self.generator(noise))
                loss = tf.reduce_mean(fake - self.discriminator(x))
            step(tape, loss, self.discriminator.trainable_weights, self.d_optimizer)
            with tf.GradientTape() as tape:
                fooled = -tf.reduce_mean(self.discriminator(self.generator(noise)))
            step(tape, fooled, self.generator.trainable_weights, self.g_optimizer)
            return {"d": loss, "g": fooled}

    model = GAN()
    model.compile(K.optimizers.Adam(1e-2), K.optimizers.SGD(1e-2, momentum=0.9))
    return model


def vae(K):
    """An encoder with two outputs and a decoder, as in Keras's example."""
    inputs = K.Input((48,))
    x = K.layers.Dense(64, "relu")(inputs)
    encoder = K.Model(inputs, [K.layers.Dense(4)(x), K.layers.Dense(4)(x)], name="encoder")

    class VAE(K.Model):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = encoder, net(K, 64, 48, name="decoder", inputs=4)
            self.total = K.metrics.Mean(name="total")

        @property
        def metrics(self):
            return [self.total]

        def train_step(self, data):
            x = data[0] if isinstance(data, tuple) else data
            with tf.GradientTape() as tape:
                mean, spread = self.encoder(x)
                z = mean + tf.exp(0.5 * spread) * tf.random.normal(tf.shape(mean))
                loss = tf.reduce_mean(tf.square(self.decoder(z) - x))
                loss += tf.reduce_mean(tf.square(mean) + tf.exp(spread) - 1 - spread)
            step(tape, loss, self.trainable_weights, self.optimizer)
            self.total.update_state(loss)
            return {"total": self.total.result()}

    model = VAE()
    model.compile(K.optimizers.Adam(1e-2), run_eagerly=True)
    return model


def contrastive(K):
    """SimCLR: a contrastive optimizer for an encoder and its head, and another for a probe."""

    class Contrastive(K.Model):
        def __init__(self):
            super().__init__()
            self.encoder = net(K, 64, 32, name="encoder")
            self.projection = net(K, 32, 8, name="projection", inputs=32)
            self.probe = K.Sequential([K.Input((32,)), K.layers.Dense(5)], name="probe")

        def compile(self, contrastive_optimizer, probe_optimizer):
            super().compile(run_eagerly=True)
            self.contrastive_optimizer = contrastive_optimizer
            self.probe_optimizer = probe_optimizer

        def train_step(self, data):
            x = data[0] if isinstance(data, tuple) else data
            with tf.GradientTape() as tape:
                one, two = (self.projection(self.encoder(x + noise)) for noise in (0.0, 0.1))
                loss = tf.reduce_mean(tf.matmul(one, two, transpose_b=True))
            weights = self.encoder.trainable_weights + self.projection.trainable_weights
            step(tape, loss, weights, self.contrastive_optimizer)
            with tf.GradientTape() as tape:
                probed = tf.reduce_mean(tf.square(self.probe(self.encoder(x))))
            step(tape, probed, self.probe.weights, self.probe_optimizer)
            return {"contrast": loss, "probe": probed}

    model = Contrastive()
    model.compile(K.optimizers.Adam(1e-3), K.optimizers.Adam(1e-3))
    return model


def task(K):
    """A backbone that a task wraps, with blocks that hold layers."""
    L = K.layers

    class Block(L.Layer):
        def __init__(self):
            super().__init__()
            self.widen, self.narrow = L.Dense(64, "relu"), L.Dense(48)

        def build(self, shape):
            self.widen.build(shape)
            self.narrow.build((None, 64))
            super().build(shape)

        def call(self, x):
            return x + self.narrow(self.widen(x))

    class Task(K.Model):
        def __init__(self):
            super().__init__()
            self.backbone, self.blocks = net(K, 80, 48, name="backbone"), [Block(), Block()]

        def call(self, x):
            return self.blocks[1](self.blocks[0](self.backbone(x)))

    model = Task()
    model.compile(K.optimizers.Adam(1e-2), "mse", run_eagerly=True)
    return model


def params(model):
    return sum(weight.size for weight in model.get_weights())


def fit(model, callbacks, epochs=3):
    return model.fit(X, X, epochs=epochs, callbacks=callbacks, verbose=0).history


CASES = {
    "distiller": (distiller, "student"),
    "adversaries": (adversaries, "generator"),
    "vae": (vae, "decoder"),
    "contrastive": (contrastive, "encoder"),
    "task": (task, "backbone"),
    "block": (task, "blocks.1"),
}


class TestSubmodel:
    @pytest.mark.parametrize("case", list(CASES))
    @pytest.mark.filterwarnings("default:The code of")
    def test_only_it_is_compressed_and_trains_on(self, keras_module, case, capsys):
        make, path = CASES[case]
        model = make(keras_module)
        if case in ("task", "block"):
            model(X)
        part = model
        for name in path.split("."):
            part = part[int(name)] if name.isdigit() else getattr(part, name)
        dense, whole = params(part), params(model)
        moved = Spy(keras_module, lambda _: [value(la.decoder) for la in factorized(part)])
        callback = ALDSCompress(0.4, at_epoch=1, submodel=path)
        logs = fit(model, [callback, moved])
        after = params(part)
        assert logs["alds_params"] == [dense, after, after]
        assert logs["alds_cr"] == [0.0, callback.plan.cr, callback.plan.cr]
        assert callback.plan.params_before == dense
        assert after <= 0.6 * dense
        assert whole - params(model) == dense - after
        assert len(factorized(model)) == len(factorized(part)) > 0
        for before, now in zip(moved.seen[2], moved.seen[3], strict=True):
            assert np.abs(now - before).max() > 0
        line = next(li for li in capsys.readouterr().out.splitlines() if "ALDSCompress" in li)
        assert f"epoch 1: {path}: {dense:,} → {after:,} parameters" in line
        fit(model, [ALDSCompress(0.4, at_epoch=0, submodel=part)], epochs=1)
        assert f"already compressed to cr={callback.plan.cr:.2f}" in capsys.readouterr().out
        assert params(part) == after

    def test_distiller_of_keras(self):
        import keras

        teacher, student = net(keras, 96, 5, name="teacher"), net(keras, 64, 5, name="student")
        distillation = pytest.importorskip("keras.distillation")
        model = distillation.Distiller(
            teacher, student, distillation_losses=distillation.LogitsDistillation()
        )
        model.compile("adam", "sparse_categorical_crossentropy")
        before = teacher.get_weights()
        callback = ALDSCompress(0.4, at_epoch=1, submodel="student", verbose=0)
        model.fit(X, np.arange(32) % 5, epochs=2, callbacks=[callback], verbose=0)
        assert factorized(student)
        for a, b in zip(before, teacher.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_every_optimizer_follows(self, keras_module):
        model = adversaries(keras_module)
        fit(model, [], epochs=1)
        backend = backend_of(model)
        optimizer, layer = model.d_optimizer, model.discriminator.layers[0]

        def momentum(variable):
            targets = backend.optimizer_targets(optimizer, list(model.variables))
            slots = backend.slots(optimizer, targets)
            (slot,) = slots.values()
            return value(slot[[id(t) for t in targets].index(id(variable))])

        before = momentum(layer.bias)
        seen = Spy(keras_module, lambda _: momentum(layer.bias))
        fit(model, [ALDSCompress(0.3, at_epoch=0, submodel="discriminator", verbose=0), seen], 1)
        np.testing.assert_array_equal(seen.seen[0], before)
        assert np.abs(seen.seen[1] - before).max() > 0
        assert int(optimizer.iterations) == int(model.g_optimizer.iterations) == 2

    def test_two_in_one_fit_have_logs_of_their_own(self, keras_module, tmp_path):
        model = adversaries(keras_module)
        callbacks = [
            ALDSCompress(0.4, at_epoch=1, submodel="generator", verbose=0),
            ALDSCompress(0.3, at_epoch=2, submodel="discriminator", verbose=0),
            ALDSCompress(0.6, at_epoch=2, submodel="generator", verbose=0),
            keras_module.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        ]
        fit(model, callbacks)
        *_, last = csv.DictReader((tmp_path / "log.csv").open())
        assert float(last["alds_cr_generator"]) == callbacks[2].plan.cr >= 0.6
        assert float(last["alds_cr_discriminator"]) == callbacks[1].plan.cr
        assert int(last["alds_params_discriminator"]) == params(model.discriminator)

    def test_calibration_data_are_its_inputs(self, keras_module):
        model = vae(keras_module)
        z = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
        callback = ALDSCompress(
            {"params": 0.4, "macs": 0.3},
            at_epoch=1,
            submodel="decoder",
            calibration_data=z,
            verbose=0,
        )
        fit(model, [callback])
        assert callback.plan.method == "activation"
        wrong = ALDSCompress(0.6, at_epoch=1, submodel="decoder", calibration_data=X)
        with pytest.raises(ValueError, match=r"Received: shape=\(32, 48\)"):
            fit(model, [wrong])

    def test_what_is_refused(self, keras_module):
        with pytest.raises(ValueError, match="inputs of the submodel"):
            ALDSCompress(0.4, at_epoch=0, submodel="decoder", method="activation")
        model = task(keras_module)
        model(X)
        weights = model.get_weights()
        callback = ALDSCompress(0.4, at_epoch=1, submodel="blocks.0", objective="macs")
        with pytest.raises(ValueError, match=r"Received: the layer '.*' of type Block"):
            fit(model, [callback])
        with pytest.raises(ValueError, match=r"submodel='backbnoe'\. Its models: 'backbone'"):
            fit(model, [ALDSCompress(0.4, at_epoch=1, submodel="backbnoe")])
        for a, b in zip(weights, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


class TestFrozenParts:
    def test_are_refused_before_the_first_step(self, keras_module):
        model = distiller(keras_module)
        for options in ({"cr": 0.5}, {"cr": None, "plan": select_in_silence(model, 0.5)}):
            text = "Received: 'teacher', a frozen part of .* such as 'student'. Pass the path"
            with pytest.raises(ValueError, match=text):
                fit(model, [ALDSCompress(**options, at_epoch=1)])
        assert int(model.optimizer.iterations) == 0
        assert not factorized(model)

    @pytest.mark.filterwarnings("default:The code of")
    def test_excluded_they_count(self, keras_module):
        model = distiller(keras_module)
        dense = params(model)
        callback = ALDSCompress(0.01, at_epoch=1, exclude="teacher", verbose=0)
        logs = fit(model, [callback])
        assert logs["alds_params"][0] == callback.plan.params_before == dense
        assert factorized(model) == factorized(model.student)

    @pytest.mark.filterwarnings("default:The code of")
    def test_are_cut_if_asked_for(self, keras_module, capsys):
        model = distiller(keras_module)
        fit(model, [ALDSCompress(0.5, at_epoch=1, submodel=model)])
        assert factorized(model.teacher)
        assert "of them frozen) in" in capsys.readouterr().out

    def test_of_a_functional_model(self, keras_module):
        K = keras_module
        base = net(K, 80, 48, name="base")
        base.trainable = False
        model = K.Sequential([K.Input((48,)), base, K.layers.Dense(48)])
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match="'base', a frozen part"):
            fit(model, [ALDSCompress(0.4, at_epoch=1)])
        fit(model, [ALDSCompress(0.4, at_epoch=1, submodel="base", verbose=0)])
        assert factorized(base)

    def test_select_and_compress_name_the_submodels(self, keras_module):
        model = distiller(keras_module)
        with pytest.warns(UserWarning, match="factorizes 'teacher', a frozen part of"):
            plan = select(model, 0.5)
        with pytest.raises(ValueError, match=r"`compress\(model.student, …\)`, `compress\(model\."):
            compress(model, plan=plan)
        with pytest.raises(ValueError, match=r"inside it \(generator, discriminator\)"):
            select(adversaries(keras_module), 0.4, objective="macs")
        apply_plan(model.student, select(model.student, 0.4))
        assert factorized(model.student)


def select_in_silence(model, cr):
    with pytest.warns(UserWarning, match="frozen part"):
        return select(model, cr)


@pytest.mark.parametrize("submodel", [None, "online"])
def test_a_momentum_encoder_is_told_before_the_first_epoch(keras_module, submodel):
    K = keras_module

    class Momentum(K.Model):
        def __init__(self):
            super().__init__()
            self.online, self.target = (net(K, 64, 8, name=name) for name in ("a", "b"))

        def call(self, x):
            return self.online(x)

    model = Momentum()
    model(X)
    model.compile("sgd", "mse")
    callback = ALDSCompress(0.4, at_epoch=1, submodel=submodel, verbose=0)
    with pytest.warns(UserWarning, match="'online' and 'target' have weights of the same shapes"):
        model.fit(X, np.zeros((len(X), 8)), epochs=2, callbacks=[callback], verbose=0)
