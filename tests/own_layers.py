"""A user's own layers and models that hold Keras layers, however these are made and kept.

Each is registered, and maps `[batch, WIDTH]` to `[batch, WIDTH]`. A program that loads a saved
model imports this module first, as it would a user's own.
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

    class Named(InInit):
        def make(self):
            self.a, self.b = L.Dense(self.n, "relu", name="a"), L.Dense(self.n, name="b")

    class SameNames(Own):
        def make(self):
            self.first, self.second = Named(self.n, name="first"), Named(self.n, name="second")

        def call(self, x):
            return self.second(self.first(x))

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
            self.blocks = [L.Dense(self.n, "relu"), L.Dropout(0.1), L.Dense(self.n)]

        def call(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    class InLists(Own):
        def make(self):
            self.blocks = [[L.Dense(self.n, "relu")], {"second": (L.Dense(self.n), L.ReLU())}]

        def call(self, x):
            (first,), later = self.blocks
            second, relu = later["second"]
            return relu(second(first(x)))

    class InDict(Own):
        def make(self):
            self.parts = {"b/c": L.Dense(self.n, "relu"), "a": L.Dense(self.n)}
            self.pair = L.Dense(self.n), L.ReLU()

        def call(self, x):
            dense, relu = self.pair
            return relu(dense(self.parts["a"](self.parts["b/c"](x))))

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


#: Layers and models of `own_classes` that stand in other models.
INSIDE = (
    *("InInit", "InBuild", "BuiltInBuild", "InList", "InLists", "InDict", "InSequential"),
    *("InFunctional", "InOwn", "InOwnInBuild", "Shared", "Frozen", "StockHolders", "InConfig"),
    *("SameNames", "NoConfig", "Subclassed", "OwnFunctional"),
)
#: What tf_keras does not save, compressed or not: layers in nested lists, and in h5 files layers
#: whose `build` is called by code, or that are made by code from the config.
NOT_IN_TF_KERAS = {
    ".keras": {"InLists"},
    ".h5": {"InBuild", "BuiltInBuild", "InOwn", "InOwnInBuild", "Subclassed", "InConfig"},
}


def names_for(K: ModuleType, suffix: str) -> list[str]:
    """The layers and models that can be saved in a format before they are compressed."""
    if not suffix:  # a SavedModel takes seconds for each layer
        return ["InInit", "InOwnInBuild", "OwnFunctional"]
    left_out = NOT_IN_TF_KERAS[suffix] if K.__name__ == "tf_keras" else set()
    return [name for name in INSIDE if name not in left_out]


def model_of(K: ModuleType, *names: str) -> Any:
    """A compiled model that calls layers and models of `own_classes` one by one."""
    x = inputs = K.Input((WIDTH,))
    outputs = [x := own_classes(K)[name](name=name.lower())(x) for name in names]
    model = K.Model(inputs, outputs)
    model.compile("sgd", [K.losses.MeanSquaredError() for _ in names])
    return model


def alone(K: ModuleType, name: str) -> Any:
    """One of the models of `own_classes`, compiled and called."""
    model = own_classes(K)[name](name=name.lower())
    model.compile("sgd", K.losses.MeanSquaredError())
    model(np.zeros((2, WIDTH), "float32"))
    return model
