"""`ALDSCompress` in `fit`, in Keras 3 and tf_keras."""

from __future__ import annotations

import copy
import csv
import functools
import pickle
import tempfile
import warnings

import numpy as np
import pytest
import tensorflow as tf
import zoo

from keras_alds import (
    ALDSCompress,
    CalibrationStats,
    apply_plan,
    compress,
    select,
)
from keras_alds._backend import backend_of
from keras_alds.core.slicing import recompose
from keras_alds.kinds.base import is_factorized
from keras_alds.models.inventory import walk
from keras_alds.models.optimizer import carried

#: A few steps take less time than their graph. Where graphs matter, models are trained in them.
EAGER = {"run_eagerly": True}


def value(tensor):
    return np.asarray(tf.convert_to_tensor(tensor))


def compiled(K, optimizer=None, model=None, **options):
    K.utils.set_random_seed(0)
    model = zoo.functional(K) if model is None else model
    model.compile(
        K.optimizers.SGD(0.01, momentum=0.9) if optimizer is None else optimizer,
        K.losses.SparseCategoricalCrossentropy(from_logits=True),
        **{"metrics": ["accuracy"], **options},
    )
    return model


def fit(model, callbacks, epochs=3, **options):
    x, y = zoo.images()
    options = {"verbose": 0, "batch_size": 32, "shuffle": False, **options}
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **options)


def factorized(model):
    return [layer for _, layer in walk(model) if is_factorized(layer)]


class Spy:
    """Records what a callback sees at the start of every epoch; duck-typed like any callback."""

    def __new__(cls, K, look):
        class Recorder(K.callbacks.Callback):
            def __init__(self):
                super().__init__()
                self.seen = []

            def on_epoch_begin(self, epoch, logs=None):
                self.seen.append(look(self.model))

            def on_epoch_end(self, epoch, logs=None):
                self.seen.append(look(self.model))

        return Recorder()


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
                x, y = data
                with tf.GradientTape() as tape:
                    error = self(x, training=True) - tf.one_hot(tf.cast(y, tf.int32), 10)
                    loss = tf.reduce_mean(tf.square(error))
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
                x, y = data
                with tf.GradientTape() as tape:
                    error = self(x, training=True) - tf.one_hot(tf.cast(y, tf.int32), 10)
                    loss = tf.reduce_mean(tf.square(error))
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
                error = model(x, training=True) - tf.one_hot(tf.cast(y, tf.int32), 10)
                loss = tf.reduce_mean(tf.square(error))
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
                x, y = data
                with tf.GradientTape() as tape:
                    error = self(x, training=True) - tf.one_hot(tf.cast(y, tf.int32), 10)
                    loss = tf.reduce_mean(tf.square(error))
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


OPTIMIZERS = {
    "sgd": lambda K: K.optimizers.SGD(0.01, momentum=0.9),
    "adam": lambda K: K.optimizers.Adam(1e-3, amsgrad=True),
    "adamw": lambda K: K.optimizers.AdamW(1e-3),
    "nadam": lambda K: K.optimizers.Nadam(1e-3),
    "adamax": lambda K: K.optimizers.Adamax(1e-3),
    "rmsprop": lambda K: K.optimizers.RMSprop(1e-3, momentum=0.5, centered=True),
    "adagrad": lambda K: K.optimizers.Adagrad(1e-2),
    "adadelta": lambda K: K.optimizers.Adadelta(1e-2),
    "ftrl": lambda K: K.optimizers.Ftrl(1e-2),
    "adafactor": lambda K: K.optimizers.Adafactor(1e-3),
    "lion": lambda K: K.optimizers.Lion(1e-4),
    "ema": lambda K: K.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.9),
    "legacy_sgd": lambda K: K.optimizers.legacy.SGD(0.01, momentum=0.9),
    "legacy_adam": lambda K: K.optimizers.legacy.Adam(1e-3),
    "legacy_rmsprop": lambda K: K.optimizers.legacy.RMSprop(1e-3, centered=True),
}
ONLY_KERAS_3 = ("lion", "adamw")


def make_optimizer(K, name):
    if name.startswith("legacy") and K.__name__ == "keras":
        pytest.skip("Keras 3 has no legacy optimizers")
    if not hasattr(K.optimizers, "Lion") and name == "lion":
        pytest.skip(f"{K.__name__} has no Lion")
    if not hasattr(K.optimizers, "AdamW") and name == "adamw":
        pytest.skip(f"{K.__name__} has no AdamW")
    return OPTIMIZERS[name](K)


class TestOptimizers:
    @pytest.mark.parametrize("name", list(OPTIMIZERS))
    def test_state_of_untouched_variables_carries_on(self, keras_module, name):
        K = keras_module
        model = compiled(K, make_optimizer(K, name), **EAGER)
        optimizer, backend = model.optimizer, backend_of(model)
        fit(model, [], epochs=2)
        known = list(model.variables)
        targets = backend.optimizer_targets(optimizer, known)
        before = {
            (slot, id(target)): backend.value(variable)
            for slot, variables in backend.slots(optimizer, targets).items()
            for target, variable in zip(targets, variables, strict=True)
            if variable is not None
        }
        scalars = backend.value(optimizer.iterations)

        from keras_alds import apply_plan

        apply_plan(model, select(model, 0.4))
        assert model.optimizer is optimizer
        new = backend.optimizer_targets(optimizer, list(model.variables))
        assert {id(v) for v in new} == {id(v) for v in model.trainable_variables}
        kept = 0
        for slot, variables in backend.slots(optimizer, new).items():
            assert len(variables) == len(new)
            for target, variable in zip(new, variables, strict=True):
                if variable is not None and (slot, id(target)) in before:
                    np.testing.assert_array_equal(backend.value(variable), before[slot, id(target)])
                    kept += 1
        # stem, hidden or head may stay whole; biases and BatchNormalization always do
        if before:
            assert kept >= 5
        assert backend.value(optimizer.iterations) == scalars == 4
        history = fit(model, [], epochs=1)
        assert np.isfinite(history.history["loss"]).all()
        assert backend.value(optimizer.iterations) == 6

    @pytest.mark.parametrize("name", ["sgd", "adam", "legacy_sgd", "legacy_adam"])
    def test_moments_of_a_factorized_kernel_follow_the_chain_rule(self, keras_module, name):
        from keras_alds import apply_plan

        K = keras_module
        model = compiled(K, make_optimizer(K, name), **EAGER)
        optimizer, backend = model.optimizer, backend_of(model)
        fit(model, [], epochs=1)
        layer = model.get_layer("down")

        def state(target, kind):
            targets = backend.optimizer_targets(optimizer, list(model.variables))
            index = [id(t) for t in targets].index(id(target))
            names = {"first": ("momentums", "_momentums", "momentum", "m")}
            names["second"] = ("_velocities", "v")
            slots = backend.slots(optimizer, targets)
            found = [slots[n] for n in names[kind] if n in slots]
            return backend.value(found[0][index]).astype(np.float64) if found else None

        first, second = state(layer.kernel, "first"), state(layer.kernel, "second")
        assert np.abs(first).max() > 0
        apply_plan(model, select(model, 0.4, method="alds"))
        E, D = value(layer.encoder).astype(np.float64), value(layer.decoder).astype(np.float64)

        # ⟨state of W, dW⟩ for a small step of one factor equals ⟨state of the factor, its step⟩.
        rng = np.random.default_rng(0)
        step = rng.standard_normal(E.shape)
        moved = recompose(step, D[0, 0], layer.slices)
        assert np.sum(first * moved) == pytest.approx(
            np.sum(state(layer.encoder, "first") * step), rel=1e-4
        )
        step = rng.standard_normal(D.shape)
        moved = recompose(E, step[0, 0], layer.slices)
        assert np.sum(first * moved) == pytest.approx(
            np.sum(state(layer.decoder, "first") * step), rel=1e-4
        )
        if second is not None:
            assert state(layer.encoder, "second").min() >= 0
            expected = recompose(np.ones_like(E), D[0, 0] ** 2, layer.slices)
            assert np.sum(second * expected) == pytest.approx(
                np.sum(state(layer.encoder, "second")), rel=1e-4
            )

    @pytest.mark.parametrize("name", ["rmsprop", "legacy_rmsprop"])
    def test_centered_rmsprop_takes_no_root_of_a_negative_number(self, keras_module, name):
        optimizer = make_optimizer(keras_module, name)
        model = compiled(keras_module, optimizer, **EAGER)
        fit(model, [], epochs=2)
        apply_plan(model, select(model, 0.4))
        backend = backend_of(model)
        slots = backend.slots(optimizer, backend.optimizer_targets(optimizer, model.variables))
        means = next(
            slots[n] for n in ("mg", "_average_gradients", "average_gradients") if n in slots
        )
        squares = next(slots[n] for n in ("rms", "_velocities", "velocities") if n in slots)
        for mean, square in zip(means, squares, strict=True):
            assert (value(mean) ** 2 <= value(square) + 1e-9).all()

    def test_second_moments_are_the_expectation_for_uncorrelated_gradients(self):
        from keras_alds import FactorizedDense

        rng = np.random.default_rng(0)
        layer = FactorizedDense(6, slices=2, rank=2)
        layer.build((None, 8))
        backend = backend_of(layer)
        scale = rng.uniform(0.1, 2, (8, 6))
        encoder, decoder = carried(backend, "squared", scale**2, layer)

        G = (scale * rng.standard_normal((100_000, 8, 6))).reshape(-1, 2, 4, 6)
        E = value(layer.encoder).reshape(4, 2, 2).transpose(1, 0, 2)
        D = value(layer.decoder).reshape(2, 2, 6)
        exact = np.square(np.einsum("nkcf,kjf->nckj", G, D)).mean(0).reshape(4, 4)
        np.testing.assert_allclose(encoder, exact, rtol=0.05)
        exact = np.square(np.einsum("kcj,nkcf->nkjf", E, G)).mean(0).reshape(4, 6)
        np.testing.assert_allclose(decoder, exact, rtol=0.05)

    def test_average_of_weights_starts_at_the_factors(self, keras_module):
        K = keras_module
        model = compiled(K, K.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.9), **EAGER)
        fit(model, [], epochs=1)
        from keras_alds import apply_plan

        apply_plan(model, select(model, 0.4))
        backend = backend_of(model)
        targets = backend.optimizer_targets(model.optimizer, list(model.variables))
        averages = backend.slots(model.optimizer, targets)["_model_variables_moving_average"]
        for layer in factorized(model):
            for factor in (layer.encoder, layer.decoder):
                index = [id(t) for t in targets].index(id(factor))
                np.testing.assert_array_equal(backend.value(averages[index]), backend.value(factor))

    def test_learning_rate_schedule_carries_on(self, keras_module):
        K = keras_module
        schedule = K.optimizers.schedules.PiecewiseConstantDecay([2], [0.1, 0.001])
        model = compiled(K, K.optimizers.SGD(schedule), **EAGER)
        fit(model, [ALDSCompress(0.4, at_epoch=1, verbose=0)], epochs=2)
        assert int(model.optimizer.iterations) == 4
        assert float(value(model.optimizer.learning_rate)) == pytest.approx(0.001)

    def test_loss_scale_carries_on(self, keras_module):
        K = keras_module
        if K.__name__ == "keras":
            wrapped = K.optimizers.LossScaleOptimizer(
                K.optimizers.SGD(0.01, momentum=0.9), initial_scale=64.0
            )
        else:
            wrapped = K.mixed_precision.LossScaleOptimizer(
                K.optimizers.SGD(0.01, momentum=0.9), initial_scale=64.0
            )
        model = compiled(K, wrapped)
        moved = Spy(K, lambda m: [value(la.encoder) for la in factorized(m)])
        fit(model, [ALDSCompress(0.4, at_epoch=1, verbose=0), moved], epochs=2)
        scale = wrapped.dynamic_scale if K.__name__ == "keras" else wrapped.loss_scale
        assert float(value(scale)) == 64.0
        assert int(value(wrapped.inner_optimizer.iterations)) == 4
        for before, after in zip(moved.seen[2], moved.seen[3], strict=True):
            assert np.abs(after - before).max() > 0

    def test_weight_decay_exclusions_carry_on(self, keras_module):
        from keras_alds import apply_plan, compress

        K = keras_module
        optimizer = make_optimizer(K, "adamw")
        model = zoo.functional(K)
        optimizer.exclude_from_weight_decay(var_list=[model.get_layer("down").kernel])
        model = compiled(K, optimizer, model=model, **EAGER)
        fit(model, [], epochs=1)
        backend, plan = backend_of(model), select(model, 0.4)
        whole = compress(model, plan=select(model, 0.05, exclude="down"))
        kernel = whole.get_layer("down").kernel
        assert backend.is_excluded_from_weight_decay(whole.optimizer, kernel)
        bias = whole.get_layer("head").bias
        assert not backend.is_excluded_from_weight_decay(whole.optimizer, bias)
        apply_plan(model, plan)
        layer = model.get_layer("down")
        for factor in (layer.encoder, layer.decoder):
            assert backend.is_excluded_from_weight_decay(model.optimizer, factor)
        assert not backend.is_excluded_from_weight_decay(model.optimizer, layer.bias)
        fit(model, [], epochs=1)

    def test_distribution_strategy(self, keras_module):
        strategy = tf.distribute.MirroredStrategy(["/cpu:0"])
        with strategy.scope():
            model = compiled(keras_module)
        moved = Spy(keras_module, lambda m: [value(la.encoder) for la in factorized(m)])
        fit(model, [ALDSCompress(0.4, at_epoch=1, verbose=0), moved], epochs=2)
        assert moved.seen[2]
        for before, after in zip(moved.seen[2], moved.seen[3], strict=True):
            assert np.abs(after - before).max() > 0

    def test_gradient_accumulation(self):
        import keras

        model = compiled(keras, keras.optimizers.SGD(0.01, gradient_accumulation_steps=2))
        moved = Spy(keras, lambda m: [value(la.encoder) for la in factorized(m)])
        fit(model, [ALDSCompress(0.4, at_epoch=1, verbose=0), moved], epochs=3)
        assert np.abs(moved.seen[5][0] - moved.seen[2][0]).max() > 0


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


class TestBesideOtherCallbacks:
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
        from keras_alds import apply_plan
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
        with pytest.warns(UserWarning, match=r"was not compressed.*at_epoch=7.*epochs=2"):
            fit(model, [ALDSCompress(cr=0.4, at_epoch=7)], epochs=2)
        assert not factorized(model)

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
        from keras_alds import apply_plan

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
