"""What `_backend` asks of a model in training, in Keras 3 and tf_keras."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_alds import ALDSCompress, apply_plan, compress, expand, select
from keras_alds._backend import Callback, backend_of


def compiled(K):
    model = K.Sequential([K.Input((3,)), K.layers.Dense(2)])
    model.compile("sgd", "mse")
    return model


class Asks(Callback):
    """Asks for the `fit` that is calling, in several places."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def set_model(self, model):
        super().set_model(model)
        self.ask()

    def on_epoch_begin(self, epoch, logs=None):
        self.ask()

    def ask(self):
        self.seen.append(backend_of(self.model).calling_fit(self.model))


class TestCallingFit:
    @pytest.mark.parametrize("named", [False, True])
    def test_gives_the_data_and_the_callbacks(self, keras_module, named):
        model, asks = compiled(keras_module), Asks()
        other = keras_module.callbacks.Callback()
        x, y = np.ones((4, 3)), np.ones((4, 2))
        options = {"verbose": 0, "callbacks": [other, asks]}
        model.fit(x=x, y=y, **options) if named else model.fit(x, y, **options)
        assert len(asks.seen) == 2
        for found, callbacks in asks.seen:
            assert found is x
            assert callbacks[:2] == [other, asks]

    def test_is_the_one_of_this_model(self, keras_module):
        outer, inner, asks = compiled(keras_module), compiled(keras_module), Asks()
        x, y = np.ones((4, 3)), np.ones((4, 2))

        class Trains(Callback):
            def on_epoch_begin(self, epoch, logs=None):
                inner.fit(x[:2], y[:2], verbose=0, callbacks=[asks])

        outer.fit(x, y, verbose=0, callbacks=[Trains()])
        for found, callbacks in asks.seen:
            assert len(found) == 2
            assert callbacks[0] is asks

    def test_a_loop_of_its_own_has_callbacks_and_no_data(self, keras_module):
        model, asks = compiled(keras_module), Asks()
        callbacks = keras_module.callbacks.CallbackList([asks], model=model)
        callbacks.on_epoch_begin(0)
        assert asks.seen == [(None, [asks])] * 2

    def test_is_none_elsewhere(self, keras_module):
        model = compiled(keras_module)
        assert backend_of(model).calling_fit(model) == (None, [])


def test_slots_are_no_other_lists_of_an_optimizer(keras_module):
    # SGD of Keras 3 has as many variables of its own as this model.
    model = compiled(keras_module)
    for momentum in (0.0, 0.9):
        optimizer = keras_module.optimizers.SGD(momentum=momentum)
        optimizer.build(model.trainable_variables)
        slots = backend_of(model).slots(optimizer, model.trainable_variables)
        assert set(slots) <= {"momentums"}
        assert momentum == 0 or len(slots["momentums"]) == 2


def test_a_loss_scale_is_not_a_slot():
    """Its optimizer has four variables of its own, as many as this model has weights."""
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(8)])
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), "mse")
    model.optimizer.build(model.trainable_variables)
    own = model.optimizer.variables[:4]
    apply_plan(model, select(model, 0.3, target="size"))
    assert [id(v) for v in model.optimizer.variables[:4]] == [id(v) for v in own]


def test_whether_a_model_is_compiled(keras_module):
    model = compiled(keras_module)
    backend = backend_of(model)
    assert backend.is_compiled(model)
    assert not backend.is_compiled(keras_module.Sequential([keras_module.layers.Dense(2)]))


def test_whether_a_legacy_optimizer_is_built():
    tf_keras = pytest.importorskip("tf_keras")
    model, legacy = compiled(tf_keras), tf_keras.optimizers.legacy
    backend, x, y = backend_of(model), np.ones((4, 3)), np.ones((4, 2))
    for optimizer, expected in ((legacy.SGD(), False), (legacy.Nadam(), True)):
        assert not backend.is_optimizer_built(optimizer)
        model.compile(optimizer, "mse")
        model.fit(x, y, verbose=0)
        assert backend.is_optimizer_built(optimizer) is expected
        targets = backend.optimizer_targets(optimizer, model.trainable_variables)
        assert len(targets) == (2 if expected else 0)


def multi(K, model, by):
    """A `MultiOptimizer` with Adam for the layer "mid" and SGD for all else."""
    adam, sgd = K.optimizers.Adam(1e-3), K.optimizers.SGD(1e-2, momentum=0.9)
    if by == "a function":
        return K.optimizers.MultiOptimizer(lambda v: adam if "mid" in v.path else sgd)
    paths = K.optimizers.OptimizerMap(sgd)
    kernel = model.get_layer("mid").kernel.path
    paths[kernel if by == "the kernel" else ".*mid/.*"] = adam
    return K.optimizers.MultiOptimizer(paths)


@pytest.mark.parametrize("by", ["the kernel", "a pattern", "a function"])
@pytest.mark.parametrize("how", ["compress", "fit", "expand"])
def test_factors_have_the_optimizer_of_their_kernel(how, by):
    keras = pytest.importorskip("keras")
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has none yet")
    L = keras.layers
    layers = [L.Dense(24, name="first"), L.Dense(24, name="mid"), L.Dense(4, name="last")]
    model = keras.Sequential([keras.Input((20,)), *layers])
    model.compile(multi(keras, model, by), "mse")
    x, y = np.ones((8, 20), "float32"), np.ones((8, 4), "float32")
    if how == "fit":
        small = model
        small.fit(x, y, epochs=2, verbose=0, callbacks=[ALDSCompress(0.5, at_epoch=1, verbose=0)])
    else:
        model.fit(x, y, verbose=0)
        small = compress(model, 0.5)
        assert not set(small.optimizer.optimizers) & set(model.optimizer.optimizers)
        small = expand(small) if how == "expand" else small
    before = small.get_weights()
    small.fit(x, y, verbose=0)
    assert all((old != new).any() for old, new in zip(before, small.get_weights(), strict=True))
    adam, sgd = sorted(small.optimizer.optimizers, key=lambda optimizer: optimizer.name)
    in_mid = {"mid/encoder", "mid/decoder"} if how != "expand" else {"mid_encoder/kernel"}
    found = {v.path.partition("/")[2] for v in adam._trainable_variables}
    assert in_mid <= found
    if by != "the kernel":
        assert "mid/bias" in found
    others = [v.path for v in sgd._trainable_variables]
    assert len(others) + len(found) == len(small.trainable_variables)
    assert any("first" in path for path in others)
