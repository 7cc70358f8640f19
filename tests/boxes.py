"""Layers and models of a user's own, as a module that a fresh process can import."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import keras
import tf_keras

#: How a `Box` holds its layers.
HOLDERS = ("attributes", "list", "dict", "sequential")


class Classes(NamedTuple):
    """The classes for Keras 3 or tf_keras."""

    box: Any
    net: Any
    backbone: Any


def _define(K: ModuleType) -> Classes:
    L = K.layers
    register = K.saving.register_keras_serializable(package="boxes")

    class Box(L.Layer):  # type: ignore[name-defined,misc]
        """A residual block of dense layers and boxes, which its code makes from a tree.

        Args:
            tree: A list of widths (dense layers) and trees (boxes inside).
            holder: One of `HOLDERS`.
            late: Whether `build` makes the layers, and not `__init__`.
            twice: Whether the first layer is called twice.
        """

        def __init__(
            self,
            tree: list[Any],
            holder: str = "list",
            late: bool = False,
            twice: bool = False,
            **kwargs: Any,
        ) -> None:
            super().__init__(**kwargs)
            self.tree, self.holder, self.late, self.twice = tree, holder, late, twice
            if not late:
                self._make()

        def _make(self) -> None:
            made = [
                L.Dense(part, activation="tanh")
                if isinstance(part, int)
                else type(self)(part, self.holder, self.late)
                for part in self.tree
            ]
            if self.holder == "attributes":
                for index, layer in enumerate(made):
                    setattr(self, f"part_{index}", layer)
            elif self.holder == "list":
                self.parts = made
            elif self.holder == "dict":
                self.parts = {f"part_{index}": layer for index, layer in enumerate(made)}
            else:
                self.parts = K.Sequential(made)

        def build(self, shape: Any) -> None:
            if self.late:
                self._make()
            for layer in self._layers_inside():
                if not layer.built:
                    layer.build(shape)
                shape = layer.compute_output_shape(shape)
            super().build(shape)

        def _layers_inside(self) -> list[Any]:
            if self.holder == "attributes":
                return [getattr(self, f"part_{index}") for index in range(len(self.tree))]
            if self.holder == "list":
                return list(self.parts)
            if self.holder == "dict":
                return [self.parts[f"part_{index}"] for index in range(len(self.tree))]
            return [self.parts]

        def compute_output_shape(self, shape: Any) -> Any:
            return shape

        def call(self, inputs: Any) -> Any:
            x = inputs
            for layer in self._layers_inside():
                x = layer(x)
            if self.twice:
                x = x + self._layers_inside()[0](inputs)
            return inputs + x

        def get_config(self) -> dict[str, Any]:
            own = {"tree": self.tree, "holder": self.holder, "late": self.late, "twice": self.twice}
            return {**super().get_config(), **own}

    class Net(K.Model):  # type: ignore[name-defined,misc]
        """A subclassed model with a list of layers and a Sequential."""

        def __init__(self, width: int = 24, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.width = width
            self.blocks = [L.Dense(width, activation="tanh") for _ in range(2)]
            self.head = K.Sequential([L.Dense(20), L.Dense(6)])

        def build(self, shape: Any) -> None:
            for block in self.blocks:
                block.build(shape)
                shape = (*shape[:-1], self.width)
            self.head.build(shape)
            self.built = True

        def call(self, x: Any) -> Any:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "width": self.width}

    class Backbone(K.Model):  # type: ignore[name-defined,misc]
        """A Functional model whose constructor makes the graph, as KerasHub's backbones do."""

        def __init__(self, width: int = 24, **kwargs: Any) -> None:
            inputs = K.Input((16,))
            x = L.Dense(width, activation="tanh", name="inner")(inputs)
            super().__init__(inputs, L.Dense(width, name="outer")(x), **kwargs)
            self.width = width

        def get_config(self) -> dict[str, Any]:
            return {"name": self.name, "width": self.width}

    return Classes(register(Box), register(Net), register(Backbone))


CLASSES = {K.__name__: _define(K) for K in (keras, tf_keras)}
for library, classes in CLASSES.items():
    for cls in classes:  # `pickle` looks classes up by their names in the module
        cls.__qualname__ = f"{library}_{cls.__name__}"
        globals()[cls.__qualname__] = cls
