"""A user's own layers and models that hold Keras layers, in every way of making and keeping them.

Each is registered, and maps `[batch, WIDTH]` to `[batch, WIDTH]`. A program that loads a saved model
imports this module first, as it would a user's own.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np

WIDTH = 16


@functools.cache
def own_classes(K: ModuleType) -> dict[str, type]:
    """The classes of layers and models, by their names."""
    L = K.layers

    class Own(L.Layer):
        def __init__(self, n=WIDTH, **kwargs):
            super().__init__(**kwargs)
            self.n = n
            self.make()

        def make(self):
            """What `__init__` makes."""

        def get_config(self):
            return {**super().get_config(), "n": self.n}

    class InInit(Own):
        def make(self):
            self.a, self.b = L.Dense(self.n, "relu"), L.Dense(self.n)

        def call(self, x):
            return self.b(self.a(x))

    class InBuild(Own):
        def build(self, shape):
            InInit.make(self)
            self.a.build(shape)
            self.b.build((*shape[:-1], self.n))
            self.built = True

        call = InInit.call

    class BuiltInBuild(InInit):
        def build(self, shape):
            self.a.build(shape)
            self.b.build((*shape[:-1], self.n))
            self.built = True

    class InList(Own):
        def make(self):
            self.blocks = [L.Dense(self.n, "relu"), [L.Dense(self.n), L.Dropout(0.1)]]

        def call(self, x):
            first, (second, dropout) = self.blocks
            return dropout(second(first(x)))

    class InDict(Own):
        def make(self):
            self.parts = {"b": L.Dense(self.n, "relu"), "a": (L.Dense(self.n), L.ReLU())}

        def call(self, x):
            dense, relu = self.parts["a"]
            return relu(dense(self.parts["b"](x)))

    class InSequential(Own):
        def make(self):
            self.net = K.Sequential([L.Dense(self.n, "relu"), L.Dense(self.n)])
            self.built_net = K.Sequential([K.Input((WIDTH,)), L.Dense(self.n)])

        def call(self, x):
            return self.built_net(self.net(x))

    class InFunctional(Own):
        def make(self):
            inputs = K.Input((WIDTH,))
            self.net = K.Model(inputs, L.Dense(self.n)(L.Dense(self.n, "relu")(inputs)))

        def call(self, x):
            return self.net(x)

    class InOwn(Own):
        def make(self):
            self.first = InInit(self.n)
            self.blocks = [InBuild(self.n), InList(self.n)]
            self.head = L.Dense(self.n)

        def call(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    class InOwnInBuild(Own):
        def build(self, shape):
            self.inner = InOwn(self.n)
            self.inner.build(shape)
            self.built = True

        def call(self, x):
            return self.inner(x)

    class Shared(Own):
        def make(self):
            self.one = L.Dense(self.n)
            self.same = self.one
            self.inner = InInit(self.n)
            self.inner_first = self.inner.a

        def call(self, x):
            return self.one(self.inner(self.inner_first(self.same(x))))

    class Frozen(InInit):
        def make(self):
            super().make()
            self.a.trainable = False

    class StockHolders(Own):
        def make(self):
            self.attention = L.MultiHeadAttention(2, 8)
            self.lstm = L.Bidirectional(L.LSTM(8, return_sequences=True))
            self.rnn = L.RNN(L.GRUCell(8), return_sequences=True)
            self.each = L.TimeDistributed(L.Dense(self.n))
            self.conv = L.Conv1D(self.n, 3, padding="same")

        def call(self, x):
            y = K.layers.Reshape((2, WIDTH // 2))(x)
            y = self.rnn(self.lstm(self.attention(y, y)))
            return K.layers.Flatten()(self.conv(self.each(y)))[:, :WIDTH]

    class InConfig(L.Layer):
        def __init__(self, blocks=None, **kwargs):
            super().__init__(**kwargs)
            self.blocks = blocks or [L.Dense(WIDTH, "relu"), InInit()]

        def call(self, x):
            for block in self.blocks:
                x = block(x)
            return x

        def get_config(self):
            blocks = [K.saving.serialize_keras_object(block) for block in self.blocks]
            return {**super().get_config(), "blocks": blocks}

        @classmethod
        def from_config(cls, config):
            blocks = [K.saving.deserialize_keras_object(block) for block in config.pop("blocks")]
            return cls(blocks, **config)

    class NoConfig(L.Layer):
        def __init__(self, n=WIDTH, **kwargs):
            super().__init__(**kwargs)
            self.a, self.b = L.Dense(n, "relu"), L.Dense(n)

        call = InInit.call

    class Subclassed(K.Model):
        def __init__(self, n=WIDTH, **kwargs):
            super().__init__(**kwargs)
            self.n = n
            self.stem, self.blocks = L.Dense(n, "relu"), [InOwn(n), InBuild(n)]

        def call(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return x

        def get_config(self):
            return {"n": self.n, "name": self.name}

    class OwnFunctional(K.Model):
        def __init__(self, n=WIDTH, **kwargs):
            inputs = K.Input((WIDTH,))
            x = InInit(n)(L.Dense(n)(inputs))
            super().__init__(inputs, L.Dense(WIDTH)(x), **kwargs)
            self.n = n

        def get_config(self):
            return {"n": self.n, "name": self.name}

        @classmethod
        def from_config(cls, config, custom_objects=None):
            return cls(**config)

    found = [value for value in list(locals().values()) if isinstance(value, type)]
    return {cls.__name__: K.saving.register_keras_serializable("own")(cls) for cls in found}


def model_with(K: ModuleType, name: str) -> Any:
    """A compiled model with one of the layers or models inside, or that is one of the models."""
    cls, _, where = name.partition(" ")
    own = own_classes(K)[cls](name=cls.lower())
    if where:
        model = own
        model(np.zeros((2, WIDTH), "float32"))
    else:
        model = K.Sequential([K.Input((WIDTH,)), own, K.layers.Dense(3, name="head")])
    model.compile("sgd", K.losses.MeanSquaredError())
    return model


#: What `model_with` takes: layers and models inside a model, and models by themselves.
INSIDE = (
    *("InInit", "InBuild", "BuiltInBuild", "InList", "InDict", "InSequential", "InFunctional"),
    *("InOwn", "InOwnInBuild", "Shared", "Frozen", "StockHolders", "InConfig", "NoConfig"),
    *("Subclassed", "OwnFunctional"),
)
ALONE = ("Subclassed alone", "OwnFunctional alone")
