"""`GraphRebuilder`: rebuilds Functional and Sequential models with some layers replaced."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend import tensors as nest
from keras_alds.models.inventory import walk

#: A part of a layer's replacement: a layer, or a function of symbolic tensors.
Piece = Any


def check_symbolic(model: Any, user: str) -> _backend.Backend:
    """The backend of a built Functional or Sequential model.

    Raises:
        ValueError: If `model` is anything else.
    """
    backend = _backend.backend_of(model)
    if not backend.is_symbolic(model):
        raise ValueError(
            f"Expected a Functional or Sequential model for `{user}`. Received: {model.name!r} of "
            f"type {type(model).__name__}, which calls its layers in Python code. Remedy: make it "
            "functional (call its layers on a `keras.Input` and give `keras.Model` the inputs and "
            "outputs), or export it as it is: `model.export` and the TFLite converter run "
            "factorized layers."
        )
    if not backend.has_graph(model):
        raise ValueError(
            f"Expected a built Sequential model for `{user}`. Received: '{model.name}', which was "
            "never called. Call it once on a batch, or `build()` it."
        )
    return backend


class GraphRebuilder:
    """Rebuilds symbolic models layer by layer.

    By default every layer is copied. A subclass defines what is changed in a copy (`changed`), or
    replaces layers (`pieces`).
    """

    def __init__(self, source: _backend.Backend, target: _backend.Backend) -> None:
        self.source = source
        self.target = target
        self.names: set[str] = set()
        self._models: dict[Any, Any] = {}
        self._once: dict[tuple[Any, Any], Any] = {}
        self._flags: list[tuple[Any, Any]] = []  # (old, new): children before their parents
        self._values: list[tuple[Any, list[np.ndarray]]] = []
        self._origins: list[tuple[Any, Any, list[Any]]] = []  # as in `record`
        self._warnings: list[str] = []

    def pieces(self, call: _backend.GraphCall) -> list[Piece]:
        """The replacement of `call.layer` in this call; empty if the input passes through."""
        return [self.copied_piece(call.layer)]

    def copied_piece(self, layer: Any) -> Piece:
        """The new layer, model or operation for an old one: the same object for every call."""
        if self.source.is_symbolic(layer):
            return self.model(layer)
        return self.once(layer, "new", lambda: self._copied(layer))

    def _copied(self, layer: Any) -> Piece:
        if not isinstance(layer, self.source.keras.layers.Layer):
            return self.copy_of(layer)  # an operation of Keras 3: `x + 1`, `keras.ops.mean(x)`
        changes, values, origins = self.changed(layer)
        new = self.copy_of(layer, changes)
        self.record(layer, new, values, origins)
        return new

    def changed(self, layer: Any) -> tuple[dict[str, Any], list[np.ndarray], list[Any]]:
        """The changes of a layer's config for its copy, and the copy's weights; see `record`."""
        return {}, layer.get_weights(), list(layer.weights)

    def input_layer(self, layer: Any) -> Any:
        """The new input layer for an old one."""
        return type(layer).from_config(layer.get_config())

    def copy_of(self, layer: Any, changes: Mapping[str, Any] | None = None) -> Any:
        """A new layer, or operation of Keras 3, with the old one's config and some changes.

        Raises:
            ValueError: If the config holds what cannot be read back.
        """
        try:
            return self.source.copy_layer(layer, changes or {})
        except Exception as error:
            name = getattr(layer, "name", type(layer).__name__)  # initializers have no name
            raise ValueError(
                f"A copy of the layer '{name}' could not be made from its config "
                f"{self.source.copy_problem(error, [layer])}."
            ) from error

    def arguments(
        self, call: _backend.GraphCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for a replacement of one piece, from the new tensors."""
        return args, kwargs

    def last_call(
        self, call: _backend.GraphCall, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the last of several pieces, from the output of those before."""
        return (value,), {}

    def calls(self, model: Any) -> list[_backend.GraphCall]:
        """The calls of a model's graph to rebuild."""
        return self.source.graph(model)

    def construct(self, model: Any, *parts: Any) -> Any:
        """A model like `model`, from its inputs and outputs or from a list of layers."""
        keras = self.target.keras
        cls = keras.Model if len(parts) == 2 else keras.Sequential
        if self.source is self.target and issubclass(type(model), keras.Sequential) == (
            cls is keras.Sequential
        ):
            if self.source.can_construct(model):
                cls = type(model)
            else:
                self.warn(
                    f"{type(model).__name__} has its own constructor and cannot be made from "
                    f"inputs and outputs: the new '{model.name}' is a plain "
                    f"{cls.__name__}, without its `train_step` and other methods."
                )
        return cls(*parts, name=model.name)

    def rebuild(self, model: Any, *, stacklevel: int = 2) -> Any:
        """The new model, with weights and trainable flags.

        Args:
            model: The model.
            stacklevel: The frame that warnings name; 1 is the caller of this method. Defaults to 2,
                for one that is called by the public function.
        """
        self.names |= {layer.name for _, layer in walk(model)}
        new = self.model(model)
        self._finish()
        for text in self._warnings:
            warnings.warn(text, stacklevel=stacklevel + 1)
        return new

    def warn(self, text: str) -> None:
        """Defers a warning until the model is rebuilt, so that it names the user's line."""
        self._warnings.append(text)

    def record(
        self,
        old: Any,
        new: Any,
        values: list[np.ndarray] | None = None,
        origins: list[Any] | None = None,
    ) -> None:
        """Records that `new` gets the flags of `old` and the weights `values` at the end.

        `origins` are the old weights that the new ones replace, or None.
        """
        self._flags.append((old, new))
        if values:
            self._values.append((new, values))
            self._origins.append((old, new, origins or []))

    def once(self, layer: Any, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make()`, called once for each layer and key."""
        if (layer, key) not in self._once:
            self._once[layer, key] = make()
        return self._once[layer, key]

    def pairs(self) -> list[tuple[Any, Any]]:
        """Pairs of old and new weights, once the model is rebuilt."""
        return [pair for _, pairs in self._pairs_by_layer() for pair in pairs]

    def _pairs_by_layer(self) -> Iterator[tuple[Any, list[tuple[Any, Any]]]]:
        for layer, new, origins in self._origins:
            pairs = zip(origins, new.weights, strict=bool(origins))
            yield layer, [(old, weight) for old, weight in pairs if old is not None]

    def unique(self, name: str) -> str:
        """A layer name, numbered if it is taken."""
        count, result = 1, name
        while result in self.names:
            count += 1
            result = f"{name}_{count}"
        self.names.add(result)
        return result

    def model(self, model: Any) -> Any:
        """The new model for a symbolic model; the same object on every call."""
        if model not in self._models:
            self._models[model] = self._rebuilt(model)
            self.record(model, self._models[model])
        return self._models[model]

    def _rebuilt(self, model: Any) -> Any:
        steps = []
        for call in self.calls(model):
            if isinstance(call.layer, self.source.keras.layers.InputLayer):
                steps.append((call, [self.input_layer(call.layer)]))
            else:
                steps.append((call, self.pieces(call)))
            if type(call.layer).__name__ in ("AddLoss", "AddMetric"):
                self.warn(
                    f"Losses and metrics of '{model.name}' from `add_loss` or `add_metric` are not "
                    "copied: add them to the new model."
                )
        layers = [piece for _, pieces in steps for piece in pieces]
        if isinstance(model, self.source.keras.Sequential) and all(
            isinstance(piece, self.target.keras.layers.Layer) for piece in layers
        ):
            return self.construct(model, layers)
        tensors: dict[int, Any] = {}
        for call, pieces in steps:
            outputs = self._run(call, pieces, tensors)
            tensors.update(
                (id(old), new) for old, new in zip(call.outputs, nest.flatten(outputs), strict=True)
            )
        return self.construct(
            model, *(_renewed(ends, tensors) for ends in self.source.graph_ends(model))
        )

    def _run(self, call: _backend.GraphCall, pieces: list[Piece], tensors: dict[int, Any]) -> Any:
        if isinstance(call.layer, self.source.keras.layers.InputLayer):
            return pieces[0].output
        args, kwargs = _renewed((call.args, call.kwargs), tensors)
        if len(pieces) == 1:
            args, kwargs = self.arguments(call, tuple(args), kwargs)
            return pieces[0](*args, **kwargs)
        value = nest.flatten((args, list(kwargs.values())))[0]
        for piece in pieces[:-1]:
            value = piece(value)
        if not pieces:
            return value
        args, kwargs = self.last_call(call, value, tuple(args), kwargs)
        return pieces[-1](*args, **kwargs)

    def _finish(self) -> None:
        # Flags first: in tf_keras they determine the order of a wrapper's weights. Parents come
        # before children, because a parent's flag overwrites those of its children.
        for old, new in reversed(self._flags):
            new.trainable = old.trainable
            if isinstance(new, self.target.keras.Model):
                continue
            inner = self.source.children(old), self.target.children(new)
            if len(inner[0]) == len(inner[1]):
                for old_child, new_child in zip(
                    *map(_below, (old, new), (self.source, self.target)), strict=False
                ):
                    new_child.trainable = old_child.trainable
        for new, values in self._values:
            shapes = [tuple(value.shape) for value in values]
            if [tuple(weight.shape) for weight in new.weights] != shapes:
                raise ValueError(
                    f"Expected the new layer '{new.name}' ({type(new).__name__}), made from the "
                    "old one's config, to have weights of the same shapes. Received: "
                    f"{[tuple(weight.shape) for weight in new.weights]} for {shapes}. Let "
                    "`get_config()` of the layer return every constructor argument."
                )
            new.set_weights(values)
            if hasattr(new, "finalize_state"):  # Normalization caches values derived from them
                new.finalize_state()
        for layer, pairs in self._pairs_by_layer():
            own = {id(weight) for weight in layer.weights}
            for old, weight in pairs:  # folding takes a bias from another layer
                if layer.trainable and id(old) in own:
                    self.target.copy_trainable(old, weight)
        for old, new in self._flags:
            if type(old) is type(new):
                self.source.copy_assets(old, new)


def _below(layer: Any, backend: _backend.Backend) -> list[Any]:
    found = []
    for child in backend.children(layer):
        found += [child, *_below(child, backend)]
    return found


def _renewed(structure: Any, tensors: dict[int, Any]) -> Any:
    return nest.map_structure(lambda leaf: tensors.get(id(leaf), leaf), structure)


def first_tensor(call: _backend.GraphCall) -> Any:
    """The first symbolic tensor among a call's arguments."""
    return nest.flatten((call.args, list(call.kwargs.values())))[0]
