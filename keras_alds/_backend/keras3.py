"""Keras 3."""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import Any

import h5py
import keras
import tensorflow as tf

from keras_alds._backend.base import (
    Backend,
    GraphCall,
    Layer,
    Model,
    Optimizer,
    Undo,
    Variable,
    remember,
    specs_from_shapes,
    specs_of,
    unknown_inputs,
)


class Keras3(Backend):
    name = "keras"
    keras = keras
    _identity = (
        "_inbound_nodes",
        "_outbound_nodes",
        "_name",
        "name",
        "_path",
        "_parent_path",
        "_called",
        "_build_shapes_dict",
        "_losses",
        "_loss_ids",
        "_losses_override",
    )
    _bound = ("build", "quantize")
    _not_slots = ("_variables", "_trainable_variables", "_tracked")

    def name_scope(self, layer: Layer) -> contextlib.AbstractContextManager[Any]:
        scopes = contextlib.ExitStack()
        for name in getattr(layer, "scope", "").split("/")[:-1]:  # the last is the layer's own
            scopes.enter_context(keras.name_scope(name))
        return scopes

    def own_variables(self, layer: Layer) -> list[Variable]:
        return [*layer._trainable_variables, *layer._non_trainable_variables]

    def is_compiled(self, model: Model) -> bool:
        return bool(model.compiled)

    def input_specs(self, model: Model) -> Any:
        if isinstance(model, keras.Sequential):
            return specs_of(model.inputs[0])
        if self.is_symbolic(model):
            return specs_of(model.input)
        config = model.get_build_config() if hasattr(model, "get_build_config") else None
        shapes = (config or {}).get("input_shape") or (config or {}).get("shapes_dict")
        if shapes is None:
            raise ValueError(unknown_inputs(model))
        return specs_from_shapes(shapes, model)

    def graph_ends(self, model: Model) -> tuple[Any, Any]:
        graph = self._functional_of(model)
        return graph._inputs_struct, graph._outputs_struct

    _takes_training = "_call_has_training_arg"

    def graph_inputs(self, model: Model, inputs: Any) -> list[Any]:
        return list(self._functional_of(model)._standardize_inputs(inputs))

    def _functional_of(self, model: Model) -> Model:
        return model._functional if isinstance(model, keras.Sequential) else model

    def _graph_call(self, node: Any) -> GraphCall:
        arguments = node.arguments
        return GraphCall(
            node.operation, tuple(arguments.args), dict(arguments.kwargs), list(node.outputs)
        )

    def _copy_layer_state(self, old: Layer, new: Layer) -> None:
        super()._copy_layer_state(old, new)
        if old.trainable:  # single variables can be frozen too
            pairs = zip(self.own_variables(old), self.own_variables(new), strict=True)
            for theirs, ours in pairs:
                self.copy_trainable(theirs, ours)

    def copy_trainable(self, old: Variable, new: Variable) -> None:
        if new.trainable != old.trainable:
            new.trainable = old.trainable

    def _clone(self, model: Model) -> Model:
        with warnings.catch_warnings():
            # Keras tries to copy the compile state; `_copy_compile_state` does it.
            warnings.simplefilter("ignore")
            compiled, model.compiled = model.compiled, False
            try:
                return keras.models.clone_model(model, recursive=True, clone_function=_clone_layer)
            finally:
                model.compiled = compiled

    def _compile_arguments(self, model: Model) -> dict[str, Any]:
        return {**model._compile_config.config, "optimizer": model.optimizer}

    def _share(self, variable: Variable, new: Layer, name: str) -> None:
        trainable = variable.trainable
        tracker = new._tracker
        locked = tracker.locked
        tracker.unlock()
        tracker.untrack(getattr(new, name))
        variable.trainable = True  # so that it is listed where `layer.trainable = …` looks for it
        setattr(new, name, variable)
        variable.trainable = trainable
        if locked:
            tracker.lock()

    def _forget_checkpoint(self, callback: Any) -> None:
        callback.best = None

    def _backup(self, callback: Any) -> dict[str, tuple[int, ...]] | None:
        latest = os.path.join(callback.backup_dir, "latest.weights.h5")
        for path in (latest, f"{latest}.bkp"):  # the second in place of a broken first
            with contextlib.suppress(OSError):
                return _datasets(path)
        return None

    def _saved(self, model: Model, folder: str) -> dict[str, tuple[int, ...]]:
        path = os.path.join(folder, "model.weights.h5")
        model.save_weights(path)
        return _datasets(path)

    def _optimizer_classes(self) -> tuple[type, ...]:
        return (keras.optimizers.Optimizer,)

    def inner_optimizer(self, optimizer: Optimizer) -> Optimizer | None:
        return getattr(optimizer, "inner_optimizer", None)

    def is_optimizer_built(self, optimizer: Optimizer) -> bool:
        return bool(optimizer.built)

    def optimizer_targets(self, optimizer: Optimizer, known: list[Variable]) -> list[Variable]:
        return list(optimizer._trainable_variables)

    def rebuild_optimizer(
        self,
        optimizer: Optimizer,
        old: list[Variable],
        new: list[Variable],
        undo_steps: list[Undo],
    ) -> None:
        tracker = optimizer._tracker
        restore, config, ids = remember(optimizer), tracker.config, tracker.stored_ids

        def undo() -> None:
            restore()
            tracker.config, tracker.stored_ids = config, ids

        undo_steps.append(undo)
        wrapper = self.inner_optimizer(optimizer) is not None
        dropped = {id(v) for slot in self.slots(optimizer, old).values() for v in slot}
        # Scalars that `build` makes (loss scale, step counters, …) keep their value by attribute.
        scalars = {
            name: value
            for name, value in vars(optimizer).items()
            if isinstance(value, keras.Variable) and tuple(value.shape) == ()
        }
        _track(optimizer, [v for v in optimizer._variables if id(v) not in dropped])
        optimizer._trainable_variables_indices = {}
        if wrapper:
            # `LossScaleOptimizer.build` would make its counters anew and build the inner one.
            keras.optimizers.Optimizer.build(optimizer, new)
        else:
            optimizer.built = False
            optimizer.build(new)
            made = {name: getattr(optimizer, name) for name in scalars}
            again = [name for name, value in scalars.items() if made[name] is not value]
            for name in again:
                made[name].assign(scalars[name])
            dropped = {id(scalars[name]) for name in again}
            _track(optimizer, [v for v in optimizer._variables if id(v) not in dropped])


def _track(optimizer: Optimizer, variables: list[Variable]) -> None:
    """Lets an optimizer hold these variables, in a new list.

    TensorFlow saves no list that something was taken out of; and Keras would make one of its own
    of a list that is assigned.
    """
    stored = tf.__internal__.tracking.wrap(variables)
    optimizer.__dict__["_variables"] = stored
    optimizer._track_trackable(stored, "_variables", overwrite=True)
    tracker = optimizer._tracker
    accepts, _ = tracker.config["variables"]
    tracker.config = {**tracker.config, "variables": (accepts, stored)}
    tracker.stored_ids = {**tracker.stored_ids, "variables": set(map(id, variables))}


def _datasets(path: str) -> dict[str, tuple[int, ...]]:
    found = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = tuple(item.shape)

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def _clone_layer(layer: Layer) -> Layer:
    # Functions and objects that Keras can write but not read back (lambdas, what is not
    # registered) have no state that a copy must own: both layers hold the same.
    config = layer.get_config()
    if isinstance(layer, keras.layers.Lambda):
        arguments = {key: config[key] for key in ("name", "trainable", "dtype")}
        return type(layer)(
            layer.function, layer._output_shape, layer.mask, layer.arguments, **arguments
        )
    for name in config:
        value = vars(layer).get(name)
        if callable(value) and not isinstance(value, (keras.layers.Layer, type)):
            config[name] = value
    return type(layer).from_config(config)
