"""`ALDSCompress` in `fit`, in Keras 3 and tf_keras."""

from __future__ import annotations

import csv
import warnings

import numpy as np
import pytest
import tensorflow as tf
import zoo
from fitting import EAGER, Spy, compiled, factorized, fit, make_optimizer, squared_error, value

from keras_alds import ALDSCompress, CalibrationStats, apply_plan, compress, select
from keras_alds._backend import backend_of
from keras_alds.kinds.base import is_factorized
from keras_alds.models.inventory import walk


class TestTraining:
    def test_the_progress_line_shows_what_is_compressed_only_then(self, keras_module, capsys):
        model = compiled(keras_module)
        history = fit(model, [ALDSCompress(cr=0.4, at_epoch=1, verbose=0)], epochs=2, verbose=2)
        lines = [line for line in capsys.readouterr().out.splitlines() if "loss:" in line]
        assert ["alds_" in line for line in lines] == [False, True]
        assert f"alds_cr: {history.history['alds_cr'][1]:.4f}" in lines[1]
        assert len(history.history["alds_params"]) == 2

    def test_same_model_is_compressed_and_goes_on_training(self, keras_module, capsys):
        model = compiled(keras_module)
        layers = dict(walk(model))
        params = model.count_params()
        callback = ALDSCompress(cr=0.4, at_epoch=1)
        spy = Spy(keras_module, lambda m: [value(la.encoder) for la in factorized(m)])
        x, y = zoo.images(32)
        history = fit(model, [callback, spy], validation_data=(x, y))

        assert dict(walk(model)) == layers
        assert callback.plan.cr >= 0.4
        assert 1 - model.count_params() / params == callback.plan.cr
        assert spy.seen[0] == spy.seen[1] == []
        begin, end = spy.seen[2], spy.seen[3]
        assert len(begin) == len(callback.plan.factorized) > 0
        for before, after in zip(begin, end, strict=True):
            assert np.abs(after - before).max() > 0
        assert history.history["alds_cr"] == [0.0, callback.plan.cr, callback.plan.cr]
        after = model.count_params()
        assert history.history["alds_params"] == [params, after, after]
        loss, accuracy = model.evaluate(x, y, verbose=0)
        assert loss == pytest.approx(history.history["val_loss"][-1], rel=1e-5)
        assert accuracy == pytest.approx(history.history["val_accuracy"][-1], abs=1e-6)
        line = [li for li in capsys.readouterr().out.splitlines() if li.startswith("ALDSCompress")]
        assert len(line) == 1
        assert f"{params:,} → {model.count_params():,} parameters" in line[0]

    def test_silent(self, keras_module, capsys):
        model = compiled(keras_module, **EAGER)
        fit(model, [ALDSCompress(cr=0.4, at_epoch=1, verbose=0)], epochs=2)
        assert "ALDSCompress" not in capsys.readouterr().out

    def test_compression_before_the_first_epoch_equals_compress_then_fit(self, keras_module):
        from keras_alds import compress

        K = keras_module
        in_fit = compiled(K)
        by_hand = compiled(K, model=compress(compiled(K), 0.4))
        fit(in_fit, [ALDSCompress(cr=0.4, at_epoch=0, verbose=0)], epochs=2)
        fit(by_hand, [], epochs=2)
        for a, b in zip(in_fit.get_weights(), by_hand.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["nested", "subclassed", "sequential", "temporal", "wrapped"])
    def test_kinds_of_models(self, keras_module, kind):
        K = keras_module
        K.utils.set_random_seed(0)
        model = compiled(K, model=zoo.MODELS[kind](K))
        x = zoo.examples(model, 16)
        y = np.arange(16) % 10
        if kind == "temporal":
            y = np.zeros((16, *value(model(x)).shape[1:-1]), int)
        moved = Spy(K, lambda m: [value(la.decoder) for la in factorized(m)])
        callback = ALDSCompress(0.3, at_epoch=1, verbose=0)
        model.fit(x, y, epochs=2, verbose=0, callbacks=[callback, moved])
        assert moved.seen[2]
        for before, after in zip(moved.seen[2], moved.seen[3], strict=True):
            assert np.abs(after - before).max() > 0

    def test_saved_model_continues_where_it_stopped(self, keras_module, tmp_path):
        model = compiled(keras_module, keras_module.optimizers.Adam(1e-3))
        fit(model, [ALDSCompress(cr=0.4, at_epoch=1, verbose=0)], epochs=2)
        model.save(tmp_path / "model.keras")
        loaded = keras_module.models.load_model(tmp_path / "model.keras")
        assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations) == 4
        fit(model, [], epochs=1)
        fit(loaded, [], epochs=1)
        for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


class TestWaysToTrain:
    @pytest.mark.parametrize(
        "options",
        [
            {"run_eagerly": True},
            {"steps_per_execution": 2},
            pytest.param({"jit_compile": True}, marks=pytest.mark.slow),
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_compile_options(self, keras_module, options):
        model = compiled(keras_module, **options)
        moved = Spy(keras_module, lambda m: [value(la.encoder) for la in factorized(m)])
        history = fit(model, [ALDSCompress(0.4, at_epoch=1, verbose=0), moved], epochs=2)
        assert np.isfinite(history.history["loss"]).all()
        assert all(
            np.abs(b - a).max() > 0 for a, b in zip(moved.seen[2], moved.seen[3], strict=True)
        )
        assert moved.seen[2]

    def test_dataset_steps_and_initial_epoch(self, keras_module):
        model = compiled(keras_module)
        x, y = zoo.images()
        data = tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(16)
        callback = ALDSCompress(0.4, at_epoch=6, verbose=0)
        history = model.fit(
            data, steps_per_epoch=2, initial_epoch=5, epochs=8, verbose=0, callbacks=[callback]
        )
        assert history.history["alds_cr"] == [0.0, callback.plan.cr, callback.plan.cr]

    def test_training_that_starts_after_at_epoch(self, keras_module, capsys):
        model = compiled(keras_module)
        callback = ALDSCompress(0.4, at_epoch=3)
        # Or a checkpoint of a compressed model was loaded into the dense one, which Keras may do.
        with pytest.warns(UserWarning, match="starts at epoch 5, after at_epoch=3, with a model t"):
            history = fit(model, [callback], initial_epoch=5, epochs=6)
        assert history.history["alds_cr"] == [callback.plan.cr]
        capsys.readouterr()
        again = ALDSCompress(0.4, at_epoch=3)
        history = fit(model, [again], initial_epoch=6, epochs=7)
        assert "already compressed" in capsys.readouterr().out
        assert history.history["alds_cr"] == [callback.plan.cr]
        assert model.count_params() == callback.plan.params_after

    def test_custom_train_step(self, keras_module):
        K = keras_module

        class Custom(K.Model):
            def train_step(self, data):
                with tf.GradientTape() as tape:
                    loss = squared_error(self, *data)
                gradients = tape.gradient(loss, self.trainable_variables)
                self.optimizer.apply_gradients(
                    zip(gradients, self.trainable_variables, strict=True)
                )
                return {"loss": loss}

        base = zoo.functional(K)
        model = compiled(K, model=Custom(base.input, base.output), metrics=None)
        moved = Spy(K, lambda m: [value(la.encoder) for la in factorized(m)])
        fit(model, [ALDSCompress(0.4, at_epoch=1, verbose=0), moved])
        for before, after in zip(moved.seen[2], moved.seen[3], strict=True):
            assert np.abs(after - before).max() > 0

    # tf_keras cannot make a Functional model with this constructor from its config.
    @pytest.mark.filterwarnings("default:A saved file will not load")
    def test_every_optimizer_of_a_custom_train_step(self, keras_module):
        K = keras_module

        class Two(K.Model):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.head_optimizer = K.optimizers.Adam(1e-3)

            def train_step(self, data):
                with tf.GradientTape() as tape:
                    loss = squared_error(self, *data)
                variables = self.trainable_variables
                ours = [v for v in variables if "head" in getattr(v, "path", v.name)]
                rest = [v for v in variables if "head" not in getattr(v, "path", v.name)]
                g_ours, g_rest = tape.gradient(loss, (ours, rest))
                self.head_optimizer.apply_gradients(zip(g_ours, ours, strict=True))
                self.optimizer.apply_gradients(zip(g_rest, rest, strict=True))
                return {"loss": loss}

        base = zoo.functional(K)
        model = compiled(K, model=Two(base.input, base.output), metrics=None)
        moved = Spy(K, lambda m: [value(la.encoder) for la in factorized(m)])
        # The head has the largest error when it is factorized: ask for enough.
        fit(model, [ALDSCompress(0.75, at_epoch=1, method="alds", verbose=0), moved])
        assert is_factorized(model.get_layer("head"))
        for before, after in zip(moved.seen[2], moved.seen[3], strict=True):
            assert np.abs(after - before).max() > 0
        assert int(model.head_optimizer.iterations) == 6

    @pytest.mark.parametrize("method", [True, False], ids=["method", "elsewhere"])
    def test_a_step_in_a_tf_function_of_its_own(self, keras_module, method):
        K = keras_module

        def step(model, x, y):
            with tf.GradientTape() as tape:
                loss = squared_error(model, x, y)
            variables = model.trainable_variables
            for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
                variable.assign_sub(0.01 * gradient)
            return loss

        function = tf.function(step)

        class Stepping(K.Model):
            step = function

            def train_step(self, data):
                return {"loss": self.step(*data) if method else function(self, *data)}

        base = zoo.functional(K)
        model = Stepping(base.input, base.output)
        model = compiled(K, model=model, run_eagerly=True, metrics=None)
        moved = Spy(K, lambda m: [value(la.encoder) for la in factorized(m)])
        fit(model, [ALDSCompress(0.4, at_epoch=1, verbose=0), moved], epochs=2)
        for before, after in zip(moved.seen[2], moved.seen[3], strict=True):
            assert np.abs(after - before).max() > 0

    def test_a_step_with_a_list_of_old_variables_warns(self, keras_module):
        class Stepping(keras_module.Model):
            def train_step(self, data):
                with tf.GradientTape() as tape:
                    loss = squared_error(self, *data)
                gradients = tape.gradient(loss, old)
                for variable, gradient in zip(old, gradients, strict=True):
                    if gradient is not None:
                        variable.assign_sub(0.01 * gradient)
                return {"loss": loss}

        base = zoo.functional(keras_module)
        model = compiled(keras_module, model=Stepping(base.input, base.output), metrics=None)
        old = model.trainable_variables
        with pytest.warns(UserWarning, match="No factor has changed"):
            fit(model, [ALDSCompress(0.4, at_epoch=1, verbose=0)], epochs=2)

    @pytest.mark.parametrize("bound", [0.02, 10.0])
    def test_a_step_that_clips_the_factors_warns(self, keras_module, bound):
        class Clipping(keras_module.Model):
            def train_step(self, data):
                with tf.GradientTape() as tape:
                    loss = squared_error(self, *data)
                variables = self.trainable_variables
                gradients = tape.gradient(loss, variables)
                self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
                for variable in variables:
                    variable.assign(tf.clip_by_value(variable, -bound, bound))
                return {"loss": loss}

        base = zoo.functional(keras_module)
        model = compiled(keras_module, model=Clipping(base.input, base.output), metrics=None)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            fit(model, [ALDSCompress(0.4, at_epoch=1, verbose=0)], epochs=3)
        texts = [str(w.message) for w in seen if "All factors were clipped" in str(w.message)]
        assert len(texts) == (bound < 1)
        assert all(text.endswith("within ±0.02") for text in texts)


class TestBesideOtherCallbacks:
    @pytest.mark.parametrize("reached", [False, True])
    def test_a_checkpoint_keeps_its_threshold(self, keras_module, tmp_path, reached):
        K = keras_module
        file = tmp_path / "best.keras"
        checkpoint = K.callbacks.ModelCheckpoint(
            str(file), "loss", save_best_only=True, initial_value_threshold=1e9 if reached else 1e-9
        )
        fit(compiled(K, **EAGER), [ALDSCompress(0.4, at_epoch=1, verbose=0), checkpoint], epochs=2)
        assert file.exists() == reached
        if reached:
            assert factorized(K.models.load_model(file))

    def test_subclasses_do_not_begin_twice(self, keras_module):
        begun = []

        class Stopping(keras_module.callbacks.EarlyStopping):
            __hash__ = None  # as of a data class

            def on_train_begin(self, logs):  # without a default
                begun.append(1)
                super().on_train_begin(logs)

        stopping = Stopping("loss")
        fit(compiled(keras_module), [ALDSCompress(0.4, at_epoch=1, verbose=0), stopping], epochs=2)
        assert begun == [1]

    def test_the_best_epoch_of_a_tuner(self, keras_module):
        tuner = type(
            "SaveBestEpoch",
            (keras_module.callbacks.Callback,),
            {"__module__": "keras_tuner.engine"},
        )
        with pytest.warns(UserWarning, match="KerasTuner keeps the best epoch"):
            fit(
                compiled(keras_module),
                [ALDSCompress(0.4, at_epoch=1, verbose=0), tuner()],
                epochs=2,
            )

    def test_many_at_once(self, keras_module, tmp_path):
        K = keras_module
        model = compiled(K)
        x, y = zoo.images(32)
        callback = ALDSCompress(0.4, at_epoch=2, verbose=0)
        history = fit(
            model,
            [
                callback,
                K.callbacks.EarlyStopping("val_loss", patience=10, restore_best_weights=True),
                K.callbacks.ReduceLROnPlateau("val_loss", patience=1),
                K.callbacks.LearningRateScheduler(lambda epoch, lr: lr * 0.9),
                K.callbacks.ModelCheckpoint(
                    str(tmp_path / "best.keras"), "val_loss", save_best_only=True
                ),
                K.callbacks.TensorBoard(str(tmp_path / "board"), write_graph=False),
                K.callbacks.CSVLogger(str(tmp_path / "log.csv")),
            ],
            epochs=4,
            validation_data=(x, y),
        )
        assert len(history.history["loss"]) == 4
        rows = list(csv.DictReader((tmp_path / "log.csv").open()))
        assert [float(row["alds_cr"]) for row in rows] == history.history["alds_cr"]
        best = K.models.load_model(tmp_path / "best.keras")
        assert best.count_params() == model.count_params() == callback.plan.params_after
        assert best.evaluate(x, y, verbose=0)[0] == pytest.approx(
            min(history.history["val_loss"][2:]), rel=1e-4
        )

    @pytest.mark.parametrize("first", [True, False])
    def test_early_stopping_restores_compressed_weights(self, keras_module, first):
        K = keras_module
        model = compiled(K, **EAGER)
        x, y = zoo.images(32)
        # A rate at which the first epochs are the best.
        stopping = K.callbacks.EarlyStopping("loss", patience=1, restore_best_weights=True)
        blow_up = K.callbacks.LearningRateScheduler(lambda epoch: 0.01 if epoch < 2 else 50.0)
        compress = ALDSCompress(0.4, at_epoch=1, verbose=0)
        callbacks = [compress, stopping] if first else [stopping, compress]
        history = fit(model, [*callbacks, blow_up], epochs=9, validation_data=(x, y))
        assert len(history.history["loss"]) < 9
        assert model.count_params() == compress.plan.params_after
        assert np.isfinite(model.evaluate(x, y, verbose=0)[0])

    def test_plan_instead_of_cr(self, keras_module):
        model = compiled(keras_module, **EAGER)
        plan = select(model, 0.3)
        callback = ALDSCompress(plan=plan, at_epoch=1, verbose=0)
        fit(model, [callback], epochs=2)
        assert callback.plan is plan
        assert model.count_params() == plan.params_after


class TestErrors:
    @pytest.mark.parametrize("cr", [0, 1, "0.5", None])
    def test_cr(self, cr):
        with pytest.raises(ValueError, match="Received: cr="):
            ALDSCompress(cr=cr, at_epoch=1)

    @pytest.mark.parametrize("at_epoch", [-1, 1.5, "3", None])
    def test_at_epoch(self, at_epoch):
        with pytest.raises(ValueError, match="Received: at_epoch="):
            ALDSCompress(cr=0.5, at_epoch=at_epoch)

    def test_unreachable_cr_stops_before_the_first_epoch(self, keras_module):
        model = compiled(keras_module, **EAGER)
        weights = model.get_weights()
        with pytest.raises(ValueError, match="not reachable"):
            fit(model, [ALDSCompress(cr=0.99, at_epoch=2)])
        for a, b in zip(weights, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_weights_that_are_not_finite_stop_training_unchanged(self, keras_module):
        K = keras_module
        model = compiled(K, **EAGER)
        kinds = [(path, type(layer)) for path, layer in walk(model)]

        class Poison(K.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                layer = self.model.get_layer("down")
                layer.kernel.assign(value(layer.kernel) * np.nan)

        with pytest.raises(ValueError, match="NaN or infinity in the kernel of layer 'down'"):
            fit(model, [Poison(), ALDSCompress(cr=0.4, at_epoch=1)])
        assert [(path, type(layer)) for path, layer in walk(model)] == kinds
        assert len(fit(model, [], epochs=1).history["loss"]) == 1  # the optimizer is whole

    def test_a_plan_for_another_model_is_told_before_the_first_epoch(self, keras_module):
        model = compiled(keras_module, **EAGER)
        plan = select(zoo.sequential(keras_module), 0.3)
        with pytest.raises(ValueError, match="Expected a plan made for the model"):
            fit(model, [ALDSCompress(plan=plan, at_epoch=2)], epochs=3)
        assert int(model.optimizer.iterations) == 0

    @pytest.mark.parametrize("data", ["shape", "few", "kind", "statistics", "data set"])
    def test_bad_calibration_data_are_told_before_the_first_epoch(self, keras_module, data):
        model, (x, _) = compiled(keras_module, **EAGER), zoo.images(16)
        data, message = {
            "shape": (x[:, :5], r"Received: shape=\(16, 5, 12, 3\)"),
            "few": (x[:5], "at least 8 examples"),
            "kind": ("train", "Received: str"),
            "statistics": (
                CalibrationStats.collect(zoo.sequential(keras_module), x, verbose=0),
                "calibration statistics of the model",
            ),
            "data set": (tf.data.Dataset.from_tensor_slices(x), "batch the data"),
        }[data]
        with pytest.raises(ValueError, match=message):
            fit(model, [ALDSCompress(0.4, at_epoch=2, calibration_data=data)], epochs=3)
        assert int(model.optimizer.iterations) == 0

    def test_what_pca_cannot_do_is_told_at_once(self):
        message = "Expected sequential=None or False with the method 'pca'"
        with pytest.raises(ValueError, match=message):
            ALDSCompress(0.4, method="pca", sequential=True, at_epoch=0)
        with pytest.raises(ValueError, match=message):
            compress(None, 0.4, method="pca", calibration_data=[], sequential=True)

    @pytest.mark.parametrize(
        "options", [{"exclude": "down"}, {"max_slices": 2}, {"method": "alds"}]
    )
    def test_options_beside_a_plan(self, keras_module, options):
        plan = select(zoo.functional(keras_module), 0.3)
        with pytest.raises(ValueError, match="Expected no options beside `plan`"):
            ALDSCompress(plan=plan, at_epoch=0, **options)
        with pytest.raises(ValueError, match="to be a CompressionPlan"):
            ALDSCompress(plan="plan.json", at_epoch=0)

    def test_warnings_do_not_name_this_package(self, keras_module):
        callback = ALDSCompress(0.4, at_epoch=1, exclude="nothing", verbose=0)
        with pytest.warns(UserWarning, match="`exclude` entry") as found:
            fit(compiled(keras_module, **EAGER), [callback], epochs=2)
        assert not [w.filename for w in found if "keras_alds" in w.filename.split("/")]

    @pytest.mark.parametrize("name", ["adam", "legacy_adam", "sgd"])
    def test_a_failure_amid_the_optimizer_leaves_it_whole(self, keras_module, monkeypatch, name):
        from keras_alds.models import optimizer as module

        model = compiled(keras_module, make_optimizer(keras_module, name), **EAGER)
        fit(model, [], epochs=1)
        backend = backend_of(model)

        def state():
            targets = backend.optimizer_targets(model.optimizer, list(model.variables))
            slots = backend.slots(model.optimizer, targets)
            return [backend.value(v) for slot in slots.values() for v in slot]

        before, weights = state(), model.get_weights()

        def fail(*_):
            raise MemoryError

        monkeypatch.setattr(module, "_carry", fail)
        with pytest.raises(MemoryError):
            apply_plan(model, select(model, 0.4))
        assert not factorized(model)
        for old, new in zip([*before, *weights], [*state(), *model.get_weights()], strict=True):
            np.testing.assert_array_equal(old, new)
        fit(model, [], epochs=1)
        assert int(model.optimizer.iterations) == 4

    def test_at_epoch_beyond_the_end_warns(self, keras_module):
        model = compiled(keras_module, **EAGER)
        with pytest.warns(UserWarning, match=r"will not be compressed.*at_epoch=7.*epochs=2"):
            fit(model, [ALDSCompress(cr=0.4, at_epoch=7)], epochs=2)
        assert not factorized(model)

    def test_a_training_that_stops_early_warns(self, keras_module):
        model = compiled(keras_module, **EAGER)
        stop = keras_module.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True)
        )
        with pytest.warns(UserWarning, match=r"was not compressed.*at_epoch=1.*epochs=2"):
            fit(model, [ALDSCompress(cr=0.4, at_epoch=1), stop], epochs=2)

    def test_a_loss_that_reads_kernels_of_before(self, keras_module):
        K = keras_module
        model = compiled(K, **EAGER)
        kept = [v for v in model.trainable_variables if len(v.shape) > 1]

        def loss(y, predictions):
            norm = sum(tf.reduce_sum(tf.square(v)) for v in kept)
            return tf.reduce_mean(tf.square(predictions)) + 1e-4 * norm

        model.compile(K.optimizers.SGD(0.01), loss, run_eagerly=True)
        with pytest.warns(UserWarning, match="The loss is NaN since the compression"):
            fit(model, [ALDSCompress(0.4, at_epoch=1, verbose=0)], epochs=2)

    def test_a_good_run_warns_of_nothing(self, keras_module):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module="keras_alds")
            fit(
                compiled(keras_module, **EAGER),
                [ALDSCompress(0.4, at_epoch=1, verbose=0)],
                epochs=2,
            )


class TestWithoutCall:
    """A `train_step` and no `call`, as in Keras's examples of autoencoders and adversarial nets."""

    def make(self, K, built=True):
        L = K.layers

        class Coder(K.Model):
            def __init__(self):
                super().__init__()
                first = [K.Input((48,))] if built else []
                self.encoder = K.Sequential([*first, L.Dense(64, "relu"), L.Dense(48)])
                self.noise = L.GaussianNoise(0.1)

            def train_step(self, data):
                x = data[0] if isinstance(data, tuple) else data
                with tf.GradientTape() as tape:
                    outputs = self.encoder(self.noise(x, training=True), training=True)
                    loss = tf.reduce_mean(tf.square(x - outputs))
                weights = self.encoder.trainable_weights
                self.optimizer.apply_gradients(
                    zip(tape.gradient(loss, weights), weights, strict=True)
                )
                return {"loss": loss}

        model = Coder()
        model.compile(K.optimizers.Adam(1e-2))
        return model, np.random.default_rng(0).normal(size=(32, 48)).astype("float32")

    @pytest.mark.parametrize("built", [True, False])
    def test_is_compressed_and_trains_on(self, keras_module, built):
        model, x = self.make(keras_module, built)
        history = model.fit(
            x, epochs=3, callbacks=[ALDSCompress(0.4, at_epoch=1, verbose=0)], verbose=0
        )
        before, *after = history.history["alds_params"]
        assert before == 48 * 64 + 64 + 64 * 48 + 48
        assert after == [sum(w.size for w in model.encoder.get_weights())] * 2
        assert after[0] <= 0.6 * before
        assert factorized(model)

    def test_select_and_apply_plan(self, keras_module):

        model, x = self.make(keras_module)
        apply_plan(model, select(model, 0.4))
        assert factorized(model)
        model.fit(x, verbose=0)

    def test_what_needs_a_forward_pass_is_refused_before_the_first_step(self, keras_module):
        model, x = self.make(keras_module)
        for options in ({"objective": "macs"}, {"calibration_data": x}, {"method": "activation"}):
            with pytest.raises(ValueError, match="to have a `call`"):
                model.fit(x, callbacks=[ALDSCompress(0.4, at_epoch=0, **options)], verbose=0)
        assert int(model.optimizer.iterations) == 0
        with pytest.raises(ValueError, match="to have a `call`"):
            select(model, 0.4, objective="macs")
        with pytest.raises(ValueError, match="to have a `call`"):
            select(model, 0.4, calibration_data=x)

    def test_layers_that_are_not_built(self, keras_module):
        model, _ = self.make(keras_module, built=False)
        with pytest.raises(ValueError, match="Received: a model without weights"):
            select(model, 0.4)
