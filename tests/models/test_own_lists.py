"""Lists of users that go by the weights of a model are found, and others are not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tensorflow as tf
import zoo
from fitting import compiled, fit

from keras_alds import ALDSCompress
from keras_alds.models.inventory import Inventory
from keras_alds.models.own_lists import own_lists


def net(K, name="net"):
    layers = [K.layers.Dense(32, activation="relu"), K.layers.BatchNormalization()]
    return K.Sequential([K.Input((24,)), *layers, K.layers.Dense(6)], name=name)


def found(model, *callbacks, part=None):
    part = model if part is None else part
    return list(own_lists(model, part, callbacks, Inventory.of(part).candidates))


def zeros(variables):
    return [tf.Variable(tf.zeros(v.shape), trainable=False) for v in variables]


KEPT = {
    "gradients": lambda model: zeros(model.trainable_variables),
    "variables": lambda model: model.trainable_variables,
    "weights": lambda model: model.get_weights(),
    "tuple": lambda model: tuple(model.get_weights()),
    "by name": lambda model: {str(n): w for n, w in enumerate(model.get_weights())},
    "of each epoch": lambda model: [model.get_weights()],
}
OTHERS = {
    "nothing": lambda model: None,
    "fewer": lambda model: model.get_weights()[1:],
    "of a layer": lambda model: zeros(model.layers[0].trainable_variables),
    "losses": lambda model: [0.5] * len(model.weights),
    "shapes": lambda model: [w.shape for w in model.get_weights()],
    "an array": lambda model: np.zeros((4, 4)),
}


@pytest.mark.parametrize("kept", [*KEPT, *OTHERS])
def test_what_is_found(keras_module, kept):
    K = keras_module

    class Averaging(K.callbacks.Callback):
        pass

    class Trained(K.Sequential):
        pass

    model = net(K)
    callback = Averaging()
    callback.kept = {**KEPT, **OTHERS}[kept](model)
    assert found(model, callback) == ([("Averaging.kept", "net")] if kept in KEPT else [])
    trained = Trained(model.layers, name="net")
    trained.kept = {**KEPT, **OTHERS}[kept](model)
    # Layers whose variables the model itself has in a list stay dense.
    is_found = kept in KEPT and kept != "variables"
    assert found(trained) == ([("Trained.kept", "net")] if is_found else [])


def test_parts_of_models(keras_module):
    K = keras_module

    class Adversaries(K.Model):
        def __init__(self):
            super().__init__()
            self.generator, self.critic = net(K, "g"), net(K, "c")
            self.sums = zeros(self.critic.trainable_variables)

    model = Adversaries()
    assert found(model) in ([("Adversaries.sums", "g")], [("Adversaries.sums", "c")])
    assert found(model, part=model.critic) == [("Adversaries.sums", "c")]


def test_nothing_is_said_of_callbacks_of_keras(keras_module, tmp_path):
    K = keras_module

    class Patient(K.callbacks.EarlyStopping):
        pass

    callbacks = [
        K.callbacks.EarlyStopping("loss", restore_best_weights=True),
        Patient("loss", restore_best_weights=True),
        K.callbacks.ModelCheckpoint(str(tmp_path / "best.weights.h5"), save_weights_only=True),
        K.callbacks.BackupAndRestore(str(tmp_path / "backup")),
        K.callbacks.ReduceLROnPlateau("loss"),
        *([K.callbacks.SwapEMAWeights()] if hasattr(K.callbacks, "SwapEMAWeights") else []),
    ]
    options = {"use_ema": True}
    model = compiled(K, K.optimizers.SGD(0.01, **options))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*entry for each weight")
        fit(model, [*callbacks, ALDSCompress(0.4, at_epoch=2, verbose=0)])


class TestInFit:
    def test_a_list_made_before_fit_is_named_at_its_start(self, keras_module):
        K = keras_module

        class Accumulating(K.Model):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                self.sums = zeros(self.trainable_variables)

        model = zoo.functional(K)
        model = compiled(K, model=Accumulating(model.inputs, model.outputs))
        callback = ALDSCompress(0.4, at_epoch=9, verbose=0)
        with pytest.warns(
            UserWarning, match="`Accumulating.sums` is a list with one array for each weight"
        ):
            fit(model, [callback], epochs=1)

    def test_a_list_made_in_the_first_epochs_is_named_at_the_compression(self, keras_module):
        K = keras_module

        class Averaging(K.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                self.weights = self.model.get_weights()

        model = compiled(K)
        callbacks = [Averaging(), ALDSCompress(0.4, at_epoch=1, verbose=0)]
        with pytest.warns(UserWarning, match="`Averaging.weights` is a list") as seen:
            fit(model, callbacks)
        assert sum("is a list" in str(w.message) for w in seen) == 1

    def test_it_may_be_made_again_in_the_epoch_of_the_compression(self, keras_module):
        """This is what the warning says, in graphs that were traced before."""
        K = keras_module

        class Accumulating(K.Model):
            def renew(self):
                self.sums = zeros(self.trainable_variables)

            def train_step(self, data):
                x, y = data
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
                variables = self.trainable_variables
                for total, gradient in zip(self.sums, tape.gradient(loss, variables), strict=True):
                    total.assign_add(gradient)
                self.optimizer.apply_gradients(zip(self.sums, variables, strict=True))
                return {"distance": loss}

        class Renew(K.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 1:
                    self.model.renew()

        inputs = K.Input((24,))
        model = Accumulating(inputs, net(K)(inputs))
        model.renew()
        model.compile(K.optimizers.SGD(1e-3))
        x, y = np.ones((32, 24), "float32"), np.ones((32, 6), "float32")
        callbacks = [ALDSCompress(0.2, at_epoch=1, verbose=0), Renew()]
        with pytest.warns(UserWarning, match="`Accumulating.sums` is a list"):
            history = model.fit(x, y, epochs=3, verbose=0, callbacks=callbacks).history
        assert len(model.sums) == len(model.trainable_variables) == 7
        assert history["distance"][2] < history["distance"][0]
