"""`rewind_epochs` of `ALDSCompress`: the learning rates before the compression come again."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from fitting import EAGER, Spy, compiled, fit, value

from keras_alds import ALDSCompress, rewinding
from keras_alds._backend import backend_of
from keras_alds._backend.clocks import set_back


def rates(K, model, callbacks, **options):
    """The learning rate in every epoch."""
    spy = Spy(K, lambda m: backend_of(m).learning_rate(m.optimizer))
    fit(model, [*callbacks, spy], **options)
    return [float(f"{rate:.4g}") for rate in spy.seen[::2]]  # at the beginning of each epoch


def scheduled(K, kind=None, **options):
    """A model whose learning rate halves in every epoch, of two steps."""
    schedule = K.optimizers.schedules.ExponentialDecay(0.016, 2, 0.5, staircase=True)
    return compiled(K, (kind or K.optimizers).Adam(schedule), **EAGER, **options)


class TestSchedules:
    @pytest.mark.parametrize("legacy", [False, True])
    def test_in_the_optimizer(self, keras_module, legacy, tmp_path):
        K = keras_module
        if legacy and K is keras:
            pytest.skip("only tf_keras has legacy optimizers")
        model = scheduled(K, K.optimizers.legacy if legacy else None)
        steps = ALDSCompress([0.3, 0.5], at_epoch=[2, 4], rewind_epochs=2, verbose=0)
        again = [0.016, 0.008]
        assert rates(K, model, [steps], epochs=7) == [*again, *again, *again, 0.004]
        assert int(model.optimizer.iterations) == 6  # for good: a saved model goes on from here
        if not legacy:
            model.save(tmp_path / "model.keras")
            loaded = K.models.load_model(tmp_path / "model.keras")
            assert rates(K, loaded, [], initial_epoch=7, epochs=8) == [0.002]

    @pytest.mark.filterwarnings("ignore:Training starts at epoch 5, after at_epoch=3")
    def test_of_a_callback(self, keras_module):
        K = keras_module
        scheduler = K.callbacks.LearningRateScheduler(lambda epoch: 0.016 / 2**epoch)
        halved = K.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2 if epoch else rate)
        expected = [0.016, 0.008, 0.004, 0.008, 0.004, 0.002]
        for one, first in ((scheduler, False), (halved, True)):
            model = compiled(K, K.optimizers.SGD(0.016), **EAGER)
            alds = ALDSCompress(0.4, at_epoch=3, rewind_epochs=2, verbose=0)
            callbacks = [one, alds] if first else [alds, one]
            assert rates(K, model, callbacks, epochs=6) == expected
            assert "on_epoch_begin" not in vars(one)
        # A run that was stopped goes on where it was, and one that compresses late rewinds once.
        alds = ALDSCompress(0.4, at_epoch=3, rewind_epochs=2, verbose=0)
        for resumed in (model, compiled(K, K.optimizers.SGD(0.016), **EAGER)):
            assert rates(K, resumed, [scheduler, alds], initial_epoch=5, epochs=6) == [0.002]
        # A fit that leaves the model as it is rewinds nothing.
        assert rates(K, model, [scheduler, alds], epochs=4)[3] == 0.002

    def test_of_a_plateau(self, keras_module):
        K = keras_module
        model = compiled(K, K.optimizers.SGD(1e-4), **EAGER)
        plateau = K.callbacks.ReduceLROnPlateau(
            monitor="loss", factor=0.5, patience=1, min_delta=10.0
        )
        alds = ALDSCompress(0.4, at_epoch=4, rewind_epochs=2, verbose=0)
        expected = [1e-4, 1e-4, 5e-5, 2.5e-5, 5e-5, 5e-5, 2.5e-5]
        assert rates(K, model, [plateau, alds], epochs=7) == expected
        model = compiled(K, K.optimizers.SGD(1e-4), **EAGER)
        with pytest.warns(UserWarning, match="Expected training to start at epoch 2 or before"):
            found = rates(K, model, [plateau, alds], initial_epoch=4, epochs=5)
        assert found == [1e-4]

    def test_after_a_resumed_run(self, keras_module):
        K = keras_module
        model = scheduled(K)
        fit(model, [], epochs=3)
        alds = ALDSCompress(0.4, at_epoch=3, rewind_epochs=2, verbose=0)
        found = rates(K, model, [alds], initial_epoch=3, epochs=5)
        assert found == [0.008, 0.004]  # the epochs 1 and 2, which this run has not seen
        assert rates(K, model, [alds], initial_epoch=5, epochs=6) == [0.002]


def averages(backend, optimizer, targets):
    slots = backend.slots(optimizer, targets)
    return {name: [value(v) for v in slot] for name, slot in slots.items() if slot}


def test_corrected_averages_stay(keras_module):
    K = keras_module
    kinds = ["Adam", "Adamax", "Nadam", *(["Lamb"] if hasattr(K.optimizers, "Lamb") else [])]
    model = K.Sequential([K.Input((3,)), K.layers.Dense(2)])
    variables = [backend_of(model).value(v) for v in model.trainable_variables]
    for kind in kinds:
        optimizer, backend = getattr(K.optimizers, kind)(1e-3), backend_of(model)
        for _ in range(10):
            gradients = [tf.ones(v.shape) for v in variables]
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        targets = backend.optimizer_targets(optimizer, model.variables)
        before = averages(backend, optimizer, targets)
        set_back(backend, model, optimizer, 8)
        assert int(optimizer.iterations) == 2
        both = ["_momentums", "_velocities"]
        changed = {"Adamax": ["_m"], "Nadam": ["_velocities"]}.get(kind, both)
        for name, slot in averages(backend, optimizer, targets).items():
            beta = optimizer.beta_2 if name == "_velocities" else optimizer.beta_1
            after = (1 - beta**2) / (1 - beta**10) if name in changed else 1.0
            for new, old in zip(slot, before[name], strict=True):
                np.testing.assert_allclose(new, old * after, rtol=1e-4)
        set_back(backend, model, optimizer, 8)
        assert int(optimizer.iterations) == 0
        assert changed[0] in before
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_optimizers_have_steps_of_their_own(monkeypatch):
    back = {}
    monkeypatch.setattr(
        rewinding, "set_back", lambda _, __, optimizer, by: back.update({optimizer: by})
    )
    monkeypatch.setattr(rewinding, "clock", lambda _: 0)
    records = {
        0: rewinding._Record({}, {"a": 0, "b": 0}),
        2: rewinding._Record({}, {"a": 8, "b": 4}),
    }
    late = object.__new__(rewinding.Rewinding)
    vars(late).update(_backend=None, _model=None, _epochs=1, _records=records, _restored={2})
    late.rewind(2, times=2, steps=None)
    assert back == {"a": 8, "b": 4}


class TestToldBeforeTraining:
    def test_nothing_to_rewind(self, keras_module):
        model = compiled(keras_module, **EAGER)
        alds = ALDSCompress(0.4, at_epoch=2, rewind_epochs=1)
        with pytest.raises(ValueError, match="Expected a learning rate that changes"):
            fit(model, [alds])
        assert int(model.optimizer.iterations) == 0
        two = [ALDSCompress(cr, at_epoch=e, rewind_epochs=1) for cr, e in ((0.3, 1), (0.5, 2))]
        with pytest.raises(ValueError, match="in one ALDSCompress callback of `fit`"):
            fit(scheduled(keras_module), two)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"rewind_epochs": -1}, "an integer >= 0"),
            ({"rewind_epochs": True}, "an integer >= 0"),
            ({"rewind_epochs": 3}, "at most the epochs that lie before each compression"),
            ({"cr": [0.3, 0.5], "at_epoch": [3, 4], "rewind_epochs": 2}, "at_epoch=3, 4"),
        ],
    )
    def test_arguments(self, options, text):
        with pytest.raises(ValueError, match=text):
            ALDSCompress(**{"cr": 0.5, "at_epoch": 2, **options})
