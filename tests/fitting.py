"""Models, optimizers and short trainings for the tests of callbacks."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import zoo

from keras_alds.kinds.base import is_factorized
from keras_alds.models.inventory import walk

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


def squared_error(model, x, y):
    """The loss of a training step of one's own: how far the outputs are from one-hot labels."""
    error = model(x, training=True) - tf.one_hot(tf.cast(y, tf.int32), 10)
    return tf.reduce_mean(tf.square(error))
