"""What `ALDSCompress` does to the state of every optimizer."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import zoo
from fitting import EAGER, OPTIMIZERS, Spy, compiled, factorized, fit, make_optimizer, value

from keras_alds import ALDSCompress, apply_plan, compress, select
from keras_alds._backend import backend_of
from keras_alds.core.slicing import recompose
from keras_alds.models.optimizer import carried


def momentum_class(K, place):
    """A user's optimizer, which keeps its state in a dictionary or in pairs."""
    new = K.__name__ == "keras"

    class Momentum(K.optimizers.Optimizer):
        def __init__(self, learning_rate, name="momentum"):
            super().__init__(**({"learning_rate": learning_rate} if new else {}), name=name)
            if not new:
                self._learning_rate = self._build_learning_rate(learning_rate)

        def build(self, variables):
            if getattr(self, "built" if new else "_built", False):
                return
            super().build(variables)
            named = {"name": "m"} if new else {"variable_name": "m"}
            self.paths = [v.path if new else v._unique_id for v in variables]
            made = [(self.key(v), self.add_variable_from_reference(v, **named)) for v in variables]
            self.states = dict(made) if place == "dictionary" else made
            self._built = True

        def key(self, variable):
            return self.paths[self._get_variable_index(variable)] if new else variable._unique_id

        def momentum(self, variable):
            return dict(self.states)[self.key(variable)]

        def update_step(self, gradient, variable, learning_rate=None):
            state = self.momentum(variable)
            state.assign(0.9 * tf.convert_to_tensor(state) + gradient)
            variable.assign_sub(0.01 * tf.convert_to_tensor(state))

        def get_config(self):
            return {"learning_rate": 0.01, "name": self.name}

    return Momentum


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
        assert not backend.other_state(optimizer, backend.slots(optimizer, new))  # left over
        assert backend.value(optimizer.iterations) == scalars == 4
        history = fit(model, [], epochs=1)
        assert np.isfinite(history.history["loss"]).all()
        assert backend.value(optimizer.iterations) == 6

    @pytest.mark.parametrize("place", ["dictionary", "pairs"])
    def test_state_that_a_user_keeps_in_another_way(self, keras_module, place):
        K = keras_module
        model = compiled(K, momentum_class(K, place)(0.01), **EAGER)
        fit(model, [], epochs=1)
        optimizer, head = model.optimizer, model.get_layer("head").kernel
        before = np.array(optimizer.momentum(head))
        plan = select(model, 0.4, exclude="head")
        if place == "dictionary":
            apply_plan(model, plan)
            np.testing.assert_array_equal(optimizer.momentum(head), before)
            states = [v for v in optimizer.variables if len(v.shape)]
            assert len(states) == len(model.trainable_variables)
        else:
            with pytest.warns(UserWarning, match=r"of the optimizer .*\(Momentum\) is reset"):
                apply_plan(model, plan)
        fit(model, [], epochs=1)

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

    @pytest.mark.both
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
        from keras_alds import apply_plan

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
