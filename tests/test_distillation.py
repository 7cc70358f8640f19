"""`distill=` of `ALDSCompress`: the dense model teaches the compressed one in the same `fit`."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo
from fitting import EAGER, compiled, fit
from scipy.special import log_softmax

from keras_alds import ALDSCompress, compress
from keras_alds._backend import distilling
from keras_alds._backend.refining import log_odds
from keras_alds.distillation import Distillation

HOOKS = {"train_step", "compute_loss", "make_train_function"}


def distance(model, teacher, x):
    ours, wanted = (log_softmax(zoo.outputs(m, x), -1) for m in (model, teacher))
    return float((np.exp(wanted) * (wanted - ours)).sum(-1).mean())


def hooks(model):
    return HOOKS & vars(model).keys()


class TestTraining:
    @pytest.mark.parametrize("options", [{"jit_compile": True, "steps_per_execution": 2}, EAGER])
    def test_without_labels(self, keras_module, options, tmp_path):
        """With no loss but the teacher's, the outputs come nearer to those of the dense model."""
        K = keras_module
        model = zoo.functional(K)
        teacher = K.models.clone_model(model)
        x = 3 * zoo.images(64)[0]
        model.layers[-1].set_weights([8 * w for w in model.layers[-1].get_weights()])
        teacher.set_weights(model.get_weights())
        model.compile(K.optimizers.Adam(3e-3), **options)
        variables = len(compress(model, 0.5).variables)
        alds = ALDSCompress(0.5, at_epoch=0, distill={"features": ["down"]}, verbose=0)
        at = []

        class Look(K.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                at.append(distance(model, teacher, x))
                assert hooks(model) == HOOKS
                if epoch == 1:
                    model.save(tmp_path / "model.keras")

        model.fit(x, epochs=6, verbose=0, callbacks=[alds, Look()], batch_size=16)
        assert distance(model, teacher, x) < 0.7 * at[0]
        assert not hooks(model)
        loaded = K.models.load_model(tmp_path / "model.keras")
        for saved in (model, loaded):
            assert len(saved.variables) == variables
            assert len(saved.layers) == len(teacher.layers)

    def test_is_added_to_any_loss_and_ends_with_the_training(self, keras_module):
        K, results = keras_module, []
        x, y = zoo.images(32)
        for weight in (None, 1e-12, 5):
            model = compiled(K, K.optimizers.SGD(0.01), **EAGER)
            alds = ALDSCompress(0.5, at_epoch=1, distill=weight or False, verbose=0)
            log = fit(model, [alds], epochs=2, validation_data=(x, y)).history
            results.append(model.get_weights())
            # Validation is that of the compiled loss.
            assert log["val_loss"][-1] == pytest.approx(
                model.evaluate(x, y, verbose=0)[0], rel=1e-5
            )
        plain, nothing, strong = results
        assert all(map(np.allclose, plain, nothing))
        assert not all(map(np.allclose, plain, strong))
        fit(model, [], epochs=1)

    def test_the_model_before_the_first_step_teaches_in_all(self, keras_module, monkeypatch):
        teachers, start = [], Distillation.start

        def noted(self, model, part, teacher, data):
            teachers.append(teacher)
            start(self, model, part, teacher, data)

        monkeypatch.setattr(Distillation, "start", noted)
        model = compiled(keras_module, **EAGER)
        dense = model.get_weights()
        options = {"calibration_data": zoo.images(32)[0], "refine": 5, "distill": True}
        alds = ALDSCompress([0.2, 0.4], at_epoch=[0, 1], verbose=0, **options)
        fit(model, [alds], epochs=2)
        assert len(teachers) == 2
        for teacher in teachers:
            assert all(map(np.array_equal, teacher.get_weights(), dense))

    def test_an_interrupted_fit_leaves_no_teacher(self, keras_module):
        model = compiled(keras_module, **EAGER)

        class Stop(keras_module.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(model, [ALDSCompress(0.5, at_epoch=0, distill=True, verbose=0), Stop()])
        assert hooks(model) == HOOKS
        fit(model, [], epochs=1)
        assert not hooks(model)

    @pytest.mark.both
    def test_mixed_precision(self, keras_module):
        K = keras_module
        before = (
            K.mixed_precision.global_policy() if K is not keras else keras.config.dtype_policy()
        )
        try:
            K.mixed_precision.set_global_policy("mixed_float16")
            model = compiled(K, K.optimizers.Adam(1e-3))
        finally:
            K.mixed_precision.set_global_policy(before)
        alds = ALDSCompress(0.4, at_epoch=0, distill={"features": True}, verbose=0)
        assert np.isfinite(fit(model, [alds], epochs=2).history["loss"]).all()
        assert int(model.optimizer.iterations) > 0
        assert all(np.isfinite(weight).all() for weight in model.get_weights())

    def test_a_loss_that_calls_the_model(self, keras_module):
        K = keras_module

        class Own(K.Model):
            def compute_loss(self, x=None, y=None, **kwargs):
                return tf.reduce_mean(tf.square(self(x, training=True) - tf.one_hot(y, 10)))

            def train_step(self, data):
                x, y = data
                with tf.GradientTape() as tape:
                    loss = self.compute_loss(x, y)
                gradients = tape.gradient(loss, self.trainable_variables)
                pairs = zip(gradients, self.trainable_variables, strict=True)
                self.optimizer.apply_gradients(pairs)
                return {"loss": loss}

        results = []
        for weight in (1e-6, 50.0):
            K.utils.set_random_seed(0)
            plain = zoo.functional(K)
            model = Own(plain.inputs, plain.outputs)
            model.compile("sgd", **EAGER)
            alds = ALDSCompress(0.4, at_epoch=0, distill=weight, verbose=0)
            fit(model, [alds], epochs=1)
            results.append(model.get_weights()[-1])
        assert not np.allclose(*results, atol=1e-4)

    def test_a_part_of_a_model_with_its_own_step(self, keras_module):
        K = keras_module

        class Trainer(K.Model):
            def __init__(self, student, times):
                super().__init__()
                self.student, self.times = student, times

            def call(self, x):
                return self.student(x)

            def train_step(self, data):
                x, y = data
                with tf.GradientTape() as tape:
                    loss = self.loss_of(x, y)
                sources = self.student.trainable_variables
                gradients = tape.gradient(loss, sources)
                self.optimizer.apply_gradients(zip(gradients, sources, strict=True))
                return {"loss": loss}

            def loss_of(self, x, y):
                outputs = self.student(x, training=True)
                return sum(self.compute_loss(y=y, y_pred=outputs) for _ in range(self.times))

        results = []
        # The teacher counts once for each call of the part, however often the loss is asked for.
        for distill, times, rate in ((False, 1, 0.02), (50.0, 1, 0.02), (100.0, 2, 0.01)):
            K.utils.set_random_seed(0)
            model = Trainer(zoo.functional(K), times)
            loss = K.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(K.optimizers.SGD(rate), loss, **EAGER)
            data = zoo.images(16)[0]
            options = {"submodel": "student", "calibration_data": data, "distill": distill}
            fit(model, [ALDSCompress(0.4, at_epoch=0, verbose=0, **options)], epochs=2)
            results.append(model.get_weights())
        alone, once, twice = results
        assert not all(map(np.allclose, alone, once))
        for a, b in zip(once, twice, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_divergences_are_those_of_the_probabilities():
    rng = np.random.default_rng(0)
    ours, wanted = (rng.normal(size=(5, 4)).astype("float32") for _ in range(2))
    for temperature in (1.0, 3.0):
        found = distilling.softmax_divergence(ours, wanted, temperature)
        p, q = (tf.nn.softmax(scores / temperature).numpy() for scores in (wanted, ours))
        expected = temperature**2 * (p * np.log(p / q)).sum(-1).mean()
        assert float(found) == pytest.approx(expected, rel=1e-4)
    p, q = (tf.sigmoid(scores).numpy() for scores in (wanted, ours))
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    term = distilling.divergence_of(distilling.sigmoid_divergence, log_odds, 1.0)
    assert float(term(tf.constant(q), tf.constant(p))) == pytest.approx(expected, rel=1e-4)


class TestToldBeforeTraining:
    @pytest.mark.parametrize(
        "distill",
        [0, -1.0, "yes", float("nan"), {"weigth": 1}, {"features": [3]}, {"weight": True}],
    )
    def test_arguments(self, distill):
        with pytest.raises(ValueError, match="Expected `distill` to be True, False, a weight"):
            ALDSCompress(0.5, at_epoch=1, distill=distill)

    def test_models(self, keras_module):
        K = keras_module

        class Own(K.Model):
            def train_step(self, data):
                return {"loss": tf.reduce_mean(self(data[0], training=True))}

        plain = zoo.functional(K)
        own = compiled(K, model=Own(plain.inputs, plain.outputs), **EAGER)
        cases = [
            (own, True, "to get its loss from `self.compute_loss`"),
            (
                compiled(K, **EAGER),
                {"features": ["nowhere"]},
                "'nowhere', the name of 0 layers",
            ),
        ]
        for model, distill, text in cases:
            with pytest.raises(ValueError, match=text):
                fit(model, [ALDSCompress(0.5, at_epoch=1, distill=distill)])
            assert int(model.optimizer.iterations) == 0
        with pytest.raises(ValueError, match="for `distill` to run the models on"):
            ALDSCompress(0.5, at_epoch=1, distill=True, submodel="student")

    def test_a_compressed_model_has_no_teacher(self, keras_module):
        model = compiled(keras_module, model=compress(compiled(keras_module), 0.5), **EAGER)
        with pytest.warns(UserWarning, match="goes on without a teacher"):
            fit(model, [ALDSCompress(0.5, at_epoch=1, distill=True, verbose=0)], epochs=1)
        model, steps = compiled(keras_module, **EAGER), ([0.3, 0.31], [0, 1])  # one meets the other
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Expected a model that is not compressed")
            alds = ALDSCompress(steps[0], at_epoch=steps[1], distill=True, verbose=0)
            assert len(set(fit(model, [alds], epochs=2).history["alds_cr"])) == 1
